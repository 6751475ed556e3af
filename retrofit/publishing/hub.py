"""Push a finished checkpoint folder to the Hugging Face hub.

Everything that can be refused is refused before the first byte: the repository's name, the license, the token, then the
folder (`verify.py`), whose weights are read for it. The upload is one commit; what a broken upload already sent is not
sent again, because the hub answers for every large file whether it holds that digest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retrofit.checkpoint.files import require_no_adapter
from retrofit.checkpoint.full import machine_error
from retrofit.checkpoint.provenance import read_provenance, sha256
from retrofit.errors import UserError
from retrofit.publishing.snippet import with_model_id
from retrofit.publishing.verify import CARD, PARTIAL, Finished, require_finished, require_stated

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from retrofit.console import Progress

T = TypeVar("T")
ATTEMPTS = 6
LONGEST_WAIT = 60.0
LONGEST_ASKED = 600.0
_LOGIN = "run `hf auth login` with a token that may write, from https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Published:
    """Where the checkpoint now is. commit: the revision on the hub; nbytes: size of the files."""

    repo_id: str
    url: str
    commit: str
    private: bool
    license: str
    files: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Retry:
    """How often a call is repeated: after 1, 2, 4 ... seconds (at most 60), or what the hub asks (at most 600)."""

    attempts: int = ATTEMPTS
    sleep: Callable[[float], None] = time.sleep


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    stated: Mapping[str, str] | None = None,
    endpoint: str | None = None,
    retry: Retry | None = None,
    progress: Progress | None = None,
) -> Published:
    """Upload `folder` to the model repository `repo_id` (made when it does not exist, private unless asked).

    token: by default the one `hf auth login` stored or HF_TOKEN. stated: license and base model (`identity.KEYS`) for a
    card that has none. endpoint: another hub. The card's `model_id` line is set to `repo_id` so that its lines can be
    pasted anywhere.

    Raises UserError for everything in `require_finished`, a name the hub does not allow, a token that is missing, not
    accepted (401) or may not write there (403), a repository that exists and is public when private was asked or the
    other way round, and a hub that does not answer after the retries. GateError when the gate was not met.
    """
    from huggingface_hub import HfApi

    _require_all_given(Path(folder), repo_id, token, stated or {})
    api = HfApi(endpoint=endpoint, token=token)
    call = _Caller(retry or Retry(), repo_id, progress)
    repo_id = _require_token(call(api.whoami), repo_id)
    call.repo_id = repo_id
    finished = _write_card(require_finished(folder, stated=stated), repo_id)
    if progress:
        progress.start(f"upload to {repo_id}", finished.nbytes, "B")
    call(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    found = bool(call(lambda: api.repo_info(repo_id)).private)
    if found != private:
        other = (
            "leave out --public, or make it public on the hub" if found else "add --public, or make it private first"
        )
        raise UserError(
            f"{repo_id} exists and is {'private' if found else 'public'}",
            where=f"{api.endpoint}/{repo_id}",
            fix=f"choose another --repo, {other}",
        )
    commit = call(lambda: _commit(api, finished, repo_id))
    call(lambda: _verify(api, finished, repo_id))
    if progress:
        progress.advance(finished.nbytes)
        progress.finish()
    return Published(
        repo_id=repo_id,
        url=f"{api.endpoint}/{repo_id}",
        commit=commit,
        private=private,
        license=finished.license,
        files=finished.files,
        nbytes=finished.nbytes,
    )


def _require_all_given(folder: Path, repo_id: str, token: str | None, stated: Mapping[str, str]) -> None:
    """One UserError for all that a person has to give and has not: a name the hub allows, a token, license and base
    model. Neither the network nor the weights are asked."""
    from huggingface_hub import get_token

    errors: list[UserError] = []
    try:
        _require_name(repo_id)
    except UserError as error:
        errors.append(error)
    if not (token or get_token()):
        errors.append(UserError("no token for the hub was found", where="HF_TOKEN", fix=_LOGIN))
    try:
        require_stated(folder, stated)
    except UserError as error:
        errors.append(error)
    if errors:
        what, where, fix = ([getattr(error, part) for error in errors] for part in ("what", "where", "fix"))
        kind = UserError if len(errors) > 1 else type(errors[0])
        raise kind("; ".join(what), where=", ".join(where), fix="; ".join(fix))


def _require_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"`{repo_id}` is not a name the hub allows: {str(error).partition(' Use `repo_type`')[0]}",
            where="--repo",
            fix="write --repo YOUR-NAME/MODEL-NAME",
        ) from error


def _require_token(identity: dict[str, Any], repo_id: str) -> str:
    """The repository's full name, if this token may write there."""
    access = identity.get("auth", {}).get("accessToken", {})
    user, orgs = identity["name"], {org["name"]: org.get("roleInOrg") for org in identity.get("orgs", ())}
    scoped = access.get("fineGrained", {}).get("scoped", ())
    granted = {permission for scope in scoped for permission in scope.get("permissions", ())}
    if access.get("role") == "read" or (access.get("role") == "fineGrained" and "repo.write" not in granted):
        raise UserError(f"the token of {user} may only read", where="the hub's token", fix=_LOGIN)
    namespace, _, name = repo_id.rpartition("/")
    if namespace not in ("", user, *orgs):
        known = ", ".join([user, *orgs])
        raise UserError(
            f"{user} does not belong to {namespace}",
            where="--repo",
            fix=f"write --repo NAME/{name}, NAME one of: {known}",
        )
    if orgs.get(namespace) == "read":
        raise UserError(f"{user} may only read in {namespace}", where="--repo", fix=f"ask an admin of {namespace}")
    return repo_id if namespace else f"{user}/{name}"


def _write_card(finished: Finished, repo_id: str) -> Finished:
    """Set the card's `model_id`, with what was stated of it; the file is replaced, never half-written."""
    card = with_model_id(finished.card, repo_id)
    partial = finished.folder / PARTIAL
    partial.write_text(card, encoding="utf-8")
    partial.replace(finished.folder / CARD)
    nbytes = sum((finished.folder / name).stat().st_size for name in finished.files)
    return replace(finished, card=card, nbytes=nbytes)


def _commit(api: HfApi, finished: Finished, repo_id: str) -> str:
    """One commit with every file, and without weights of an earlier version. Returns the revision."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repo_id)
    require_no_adapter(there, f"{api.endpoint}/{repo_id}")  # it would be applied to what is published
    earlier = f"{read_provenance(finished.folder).get('name') or 'model'}-"
    present = [
        path
        for path in there
        if (path.startswith("model") and ".safetensors" in path)
        or (path.startswith(earlier) and path.endswith(".gguf"))
    ]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path) for path in present if path not in finished.files
    ]
    operations += [CommitOperationAdd(name, str(finished.folder / name)) for name in finished.files]
    return str(api.create_commit(repo_id, operations, commit_message="Publish the checkpoint").oid)


def _verify(api: HfApi, finished: Finished, repo_id: str) -> None:
    """The hub's own digests (SHA-256 of large files, git's SHA-1 of small ones) equal those of the folder."""
    from huggingface_hub.hf_api import RepoFile

    remote = {entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile)}
    for name in finished.files:
        entry, path = remote.get(name), finished.folder / name
        if entry is None:
            same = False
        elif entry.lfs:
            same = entry.lfs.sha256 == sha256(path)
        else:
            data = path.read_bytes()
            same = entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if not same:
            raise UserError(
                f"{name} on the hub differs from the folder",
                where=f"{api.endpoint}/{repo_id}",
                fix="run the same command again",
            )


class _Caller:
    """Calls the hub: repeats what may pass, and turns what will not into a UserError."""

    def __init__(self, retry: Retry, repo_id: str, progress: Progress | None) -> None:
        self.retry, self.repo_id, self.progress = retry, repo_id, progress

    def __call__(self, action: Callable[[], T]) -> T:
        """The result of `action`, which may be called up to `attempts` times."""
        from huggingface_hub.constants import HF_HOME
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        # The base of every error of the HTTP library that huggingface_hub uses, whichever that is.
        http_error: Any = HfHubHTTPError.__bases__[0]
        for attempt in range(1, self.retry.attempts + 1):
            try:
                return action()
            except OfflineModeIsEnabled as error:
                raise UserError(
                    "the hub is switched off here", where="HF_HUB_OFFLINE", fix="unset HF_HUB_OFFLINE and try again"
                ) from error
            except (http_error, OSError, RuntimeError, ValueError) as error:
                if (found := machine_error(error, HF_HOME)) is not None:
                    raise found from error
                # A broken answer is no JSON and may pass; other ValueErrors tell what is wrong with the upload, and
                # these two come from a file here or from the hub's storage, which will not change its mind.
                if isinstance(error, (ValueError, PermissionError, FileNotFoundError)) and not isinstance(
                    error, json.JSONDecodeError
                ):
                    raise UserError(f"the hub refuses this upload: {error}", where=self.repo_id) from error
                status, wait, message = _read(error)
                if status is not None and status not in (408, 429) and status < 500:
                    raise _refused(status, message, self.repo_id) from error
                if attempt == self.retry.attempts:
                    raise UserError(
                        f"the hub did not take the upload in {attempt} attempts; the last answer: {message}",
                        where=self.repo_id,
                        fix="run the same command again later; files that arrived are not sent again",
                    ) from error
                delay = max(min(2.0 ** (attempt - 1), LONGEST_WAIT), min(wait, LONGEST_ASKED))
                if self.progress:
                    self.progress.note(f"the hub answered {message}; attempt {attempt + 1} in {delay:.0f} s")
                self.retry.sleep(delay)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _read(error: BaseException) -> tuple[int | None, float, str]:
    """(HTTP status or None, seconds the server asks to wait, one line) of an error or of what caused it."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):
            response = cause.response
            after = response.headers.get("Retry-After", "")
            reason = cause.server_message or response.reason_phrase
            return response.status_code, float(after) if after.isdigit() else 0.0, f"{response.status_code} {reason}"
    *_, last = _chain(error)
    return None, 0.0, f"{type(last).__name__}: {str(last).splitlines()[0] if str(last) else 'connection lost'}"


def _refused(status: int, message: str, repo_id: str) -> UserError:
    if status == 401:
        return UserError("the hub does not accept this token (401)", where="the hub's token", fix=_LOGIN)
    if status == 403:
        return UserError(
            f"the token may not write to {repo_id} (403)",
            where=repo_id,
            fix="give the token write access to that repository, or choose another --repo",
        )
    return UserError(f"the hub refuses this upload: {message}", where=repo_id)
