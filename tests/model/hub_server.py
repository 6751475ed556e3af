"""A small server with the hub's read routes: enough for model_info, hf_hub_download and snapshot_download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """files: path -> content. fault: (status, X-Error-Code) for every request; gated: the same for files only."""

    files: dict[str, bytes] = field(default_factory=dict)
    fault: tuple[int, str] | None = None
    gated: bool = False
    card: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, **card: object) -> Repo:
        """The files of a folder."""
        return cls({path.name: path.read_bytes() for path in folder.iterdir()}, card=card)


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[tuple[str, list[str]]]:
    """Yields the endpoint and the list of requests it has answered."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            seen.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if api else parts[:2])
            repo = repos.get(name)
            if repo is None:
                return self.answer(401, X_Error_Code="RepoNotFound")
            if repo.fault:
                return self.answer(repo.fault[0], X_Error_Code=repo.fault[1])
            if api and len(parts) > 5 and parts[4] == "tree":
                rows = [{"type": "file", "path": p, "size": len(b), "oid": _etag(b)} for p, b in repo.files.items()]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            if api:
                if len(parts) > 5 and parts[5] not in ("main", SHA):
                    return self.answer(404, X_Error_Code="RevisionNotFound")
                siblings = [{"rfilename": path} for path in repo.files]
                info = {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "cardData": repo.card}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            if repo.gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            body = repo.files.get("/".join(parts[4:]))
            if body is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(200, body, ETag=f'"{_etag(body)}"')

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
