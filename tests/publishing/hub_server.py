"""A small hub: the routes of its HTTP API that an upload uses, in memory, with faults to order.

`server.fail("put", 500)` answers the next PUT of a blob with 500; `server.cut("put")` reads half of it and closes the
connection. Routes: whoami, create, validate, preupload, batch, put, commit, info, tree.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS: dict[str, dict[str, Any]] = {
    "hf_write": {"role": "write"},
    "hf_read": {"role": "read"},
    "hf_fine": {
        "role": "fineGrained",
        "fineGrained": {"scoped": [{"permissions": ["repo.content.read", "repo.write"]}]},
    },
    "hf_fine_read": {"role": "fineGrained", "fineGrained": {"scoped": [{"permissions": ["repo.content.read"]}]}},
}
USER = "ann"
ORGS = [{"name": "acme", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/[^/]+"),
    "batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/blobs/(?P<oid>[0-9a-f]{64})"),
    "commit": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/[^/]+"),
    "tree": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+"),
    "resolve": ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)"),
    "info": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/[^/]+)?"),
}


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)


@dataclass
class Fault:
    route: str
    status: int | None  # None: the connection is cut in the middle of the body
    times: int
    headers: dict[str, str]
    after: bool  # the request is carried out first, and its answer lost


class HubServer:
    """Started by `with HubServer() as hub:`; `hub.endpoint` is its address."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.puts: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, route: str, status: int, *, times: int = 1, **headers: str) -> None:
        """Answer the next `times` requests of a route with `status` and do nothing."""
        self.faults.append(Fault(route, status, times, headers, False))

    def cut(self, route: str, *, times: int = 1, after: bool = False) -> None:
        """Close the connection: in the middle of the request, or (after) when it is done and before the answer."""
        self.faults.append(Fault(route, None, times, {}, after))

    def fault(self, route: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.route == route and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        path = self.path.partition("?")[0]
        matches = ((name, re.fullmatch(pattern, path)) for name, (verb, pattern) in ROUTES.items() if verb == method)
        name, match = next(((name, match) for name, match in matches if match), ("", None))
        if match is None:
            self._body()
            return self._answer(404, {"error": f"no such route: {method} {path}"})
        with self.hub.lock:
            self.hub.requests[name] += 1
        fault = self.hub.fault(name)
        if fault and fault.status is None and not fault.after:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._hang_up()
        body = self._body()
        if fault and fault.status is not None:
            return self._answer(fault.status, {"error": f"ordered {fault.status}"}, **fault.headers)
        if name not in ("put", "resolve") and self._token() is None:
            return self._answer(401, {"error": "Invalid credentials"})
        with self.hub.lock:
            status, answer = getattr(self, f"_{name}")(body=body, **match.groupdict())
        if fault:
            return self._hang_up()
        return self._answer(status, answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, answer: Any, **headers: str) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _token(self) -> dict[str, Any] | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _whoami(self, body: bytes) -> tuple[int, Any]:
        access = {"displayName": "t", **(self._token() or {})}
        return 200, {
            "type": "user",
            "name": USER,
            "orgs": ORGS,
            "auth": {"type": "access_token", "accessToken": access},
        }

    def _create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        url = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}
        self.hub.repos[repo] = Repo(private)
        return 200, {"url": url, "name": repo}

    def _validate(self, body: bytes) -> tuple[int, Any]:
        bad = "license" not in json.loads(body)["content"].split("\n---\n")[0]
        errors = [{"message": '"license" is required'}] if bad else []
        return (400 if bad else 200), {"errors": errors, "warnings": []}

    def _preupload(self, body: bytes, repo: str) -> tuple[int, Any]:
        held = self.hub.repos[repo]
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
            known = {"oid": _oid(held, path)} if path in held.files else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return 200, {"files": files}

    def _batch(self, body: bytes, repo: str) -> tuple[int, Any]:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/blobs/{asked['oid']}", "header": {}}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "digest mismatch"}
        self.hub.puts[oid] += 1
        self.hub.blobs[oid] = body
        return 200, {}

    def _commit(self, body: bytes, repo: str) -> tuple[int, Any]:
        held = self.hub.repos[repo]
        files, large = dict(held.files), set(held.large)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return 400, {"error": f"{value['path']}: the object was never uploaded"}
                files[value["path"]] = self.hub.blobs[value["oid"]]
                large.add(value["path"])
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        held.files, held.large = files, large
        held.commits.append(hashlib.sha1(body + str(len(held.commits)).encode()).hexdigest())
        return 200, {
            "success": True,
            "commitOid": held.commits[-1],
            "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{held.commits[-1]}",
        }

    def _info(self, body: bytes, repo: str) -> tuple[int, Any]:
        if repo not in self.hub.repos:
            return 404, {"error": "Repository not found"}
        held = self.hub.repos[repo]
        files = [{"rfilename": path} for path in sorted(held.files)]
        sha = (held.commits or ["0" * 40])[-1]
        return 200, {"id": repo, "modelId": repo, "sha": sha, "private": held.private, "tags": [], "siblings": files}

    def _tree(self, body: bytes, repo: str) -> tuple[int, Any]:
        held = self.hub.repos[repo]
        entries = []
        for path, data in sorted(held.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(held, path)}
            if path in held.large:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return 200, entries

    def _resolve(self, body: bytes, repo: str, path: str) -> tuple[int, Any]:
        held = self.hub.repos.get(repo)
        if held is None or path not in held.files or (held.private and self._token() is None):
            return 404, {"error": "Entry not found"}
        return 200, held.files[path]


def _oid(repo: Repo, path: str) -> str:
    """SHA-256 of a large file, git's blob SHA-1 of a small one."""
    data = repo.files[path]
    if path in repo.large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
