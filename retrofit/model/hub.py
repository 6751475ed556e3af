"""A model on the Hugging Face hub becomes a local snapshot; everything that can be refused is refused before weights.

Order: does it exist and may we read it, does it hold safetensors, does its configuration name a stock architecture;
only then are weights downloaded.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.files import (
    INDEX,
    SINGLE,
    holds_weights,
    listed,
    read_index,
    require_no_adapter,
)
from retrofit.checkpoint.full import writing
from retrofit.errors import UserError
from retrofit.escape import shell_word
from retrofit.model.families import require_known
from retrofit.model.load import load_config

if TYPE_CHECKING:
    from retrofit.console import Progress

_LIGHT = ("*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*", "NOTICE*")
_PICKLES = re.compile(r"[^/]*\.(bin|pt|pth|ckpt|pkl|msgpack|h5)")


@dataclass(frozen=True)
class Snapshot:
    """A downloaded revision. folder: in the hub's own cache. revision: the commit."""

    folder: Path
    repo_id: str
    revision: str
    license: str | None


def download(repo_id: str, *, revision: str | None, weights: bool, progress: Progress | None = None) -> Snapshot:
    """Fetch a model; without `weights` only configuration, tokenizer and card.

    When the hub cannot be reached (or HF_HUB_OFFLINE is set), a snapshot that an earlier run left in the cache is used.
    Raises UserError, each with its own text: not a hub id, missing, gated, no such revision, not logged in, no
    network and nothing cached, no safetensors (pickles are never read), no config.json, remote code, unknown
    architecture.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

    if is_offline_mode():
        return _cached(repo_id, revision, weights, "HF_HUB_OFFLINE is set", progress)
    try:
        with hub_errors(repo_id, revision), writing(HF_HUB_CACHE):
            info = HfApi().model_info(repo_id, revision=revision)
            files = {sibling.rfilename for sibling in info.siblings or ()}
            require_files(repo_id, files)
            single = SINGLE in files  # transformers then takes it alone, whatever else there is
            # By its name, not its commit: the cache then remembers which commit the name stood for.
            config_file = Path(hf_hub_download(repo_id, "config.json", revision=revision))
            require_known(load_config(config_file.parent))
            commit = config_file.parent.name
            shards = {SINGLE} if single else _shards(repo_id, commit, files)
            if progress:
                progress.start(f"Downloading {repo_id}", None, "files")
            folder = snapshot_download(
                repo_id,
                revision=commit,
                allow_patterns=[*_LIGHT, *(map(glob.escape, sorted(shards)) if weights else ())],
                ignore_patterns=["*/*", *((INDEX,) if single else ())],
            )
            if progress:
                progress.finish()
    except _UnreachableError as error:
        return _cached(repo_id, revision, weights, str(error), progress)
    return Snapshot(Path(folder), repo_id, commit, _license(info.card_data))


def require_files(repo_id: str, files: set[str]) -> None:
    """Raises UserError unless a repository's file list holds a model that can be read."""
    where = f"https://huggingface.co/{repo_id}"
    require_no_adapter(files, where)
    if SINGLE in files or INDEX in files:
        if "config.json" not in files:
            raise UserError("the repository holds no config.json", where=where, fix="choose a transformers checkpoint")
        return
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    if ggufs:
        raise UserError(
            "the repository holds GGUF files only",
            where=where,
            fix=f"download one and give its path: hf download {repo_id} {shell_word(ggufs[0])} --local-dir .",
        )
    if any(_PICKLES.fullmatch(name) for name in files):
        raise UserError(
            "the weights are pickled files only, which can run code when they are read; only safetensors are read",
            where=where,
            fix="look for a revision with safetensors (the hub's conversion bot offers one: --revision refs/pr/N)",
        )
    raise UserError("the repository holds no safetensors weights", where=where, fix="choose another model")


class _UnreachableError(Exception):
    """The hub did not answer; the text says why."""


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors into what a person can do about them."""
    from huggingface_hub import errors, get_token

    where = f"https://huggingface.co/{repo_id}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            "the model is gated: its owner wants you to accept conditions first",
            where=where,
            fix=f"accept them at {where}, then log in: hf auth login"
            if get_token() is None
            else f"accept them at {where} with the account of your token (`hf auth whoami` names it)",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            "there is no such model on the hub, or it is private, and there is no folder of that name here",
            where=where,
            fix="check the spelling; for a private model log in first: hf auth login"
            if get_token() is None
            else "check the spelling, and that your token may read it (`hf auth whoami`)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"the model has no revision `{revision}`",
            where=where,
            fix=f"choose a branch, tag or commit listed at {where}/commits/main, or leave --revision out",
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"`{repo_id}` is no hub id", where="model", fix="write OWNER/NAME") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError("the hub refuses your token", where=where, fix="log in again: hf auth login") from error
        if status == 403:
            raise UserError("your token may not read this model", where=where, fix="use a token that may") from error
        raise _UnreachableError(f"the hub answered with status {status}") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _UnreachableError(f"the hub could not be reached ({type(error.__cause__ or error).__name__})") from error


def require_there(repo_id: str, revision: str | None) -> None:
    """UserError where the hub has no such model, or cannot be reached and the local cache has none either."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        _cached_folder(repo_id, revision, "HF_HUB_OFFLINE is set")
        return
    try:
        with hub_errors(repo_id, revision):
            HfApi().model_info(repo_id, revision=revision)
    except _UnreachableError as error:
        _cached_folder(repo_id, revision, str(error))


def _cached(repo_id: str, revision: str | None, weights: bool, reason: str, progress: Progress | None) -> Snapshot:
    folder = _cached_folder(repo_id, revision, reason)
    if weights and not holds_weights(folder):
        raise _not_cached(repo_id, reason)
    require_known(load_config(folder))
    if progress:
        progress.note(f"{reason}: using revision {folder.name} of {repo_id} from the local cache")
    return Snapshot(folder, repo_id, folder.name, None)


def _cached_folder(repo_id: str, revision: str | None, reason: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(_LIGHT),
                ignore_patterns=["*/*", INDEX],
            )
        )
    except HFValidationError as error:
        raise UserError(f"`{repo_id}` is no hub id", where="model", fix="write OWNER/NAME") from error
    except LocalEntryNotFoundError as error:
        raise _not_cached(repo_id, reason) from error
    if not (folder / "config.json").is_file():
        raise _not_cached(repo_id, reason)
    return folder


def _not_cached(repo_id: str, reason: str) -> UserError:
    return UserError(
        f"{reason}, and the model is not in the local cache; there is no folder of that name here",
        where=f"https://huggingface.co/{repo_id}",
        fix="connect (or unset HF_HUB_OFFLINE) and try again, or give a local folder, a .gguf file or `embedded`",
    )


def _shards(repo_id: str, commit: str, files: set[str]) -> set[str]:
    """The shards that the repository's index names. Raises UserError where it does not hold them all."""
    from huggingface_hub import hf_hub_download

    shards = set(read_index(Path(hf_hub_download(repo_id, INDEX, revision=commit))).values())
    if missing := sorted(shards - files):
        raise UserError(
            f"the index names files that the repository does not hold: {listed(missing)}",
            where=f"https://huggingface.co/{repo_id}",
            fix="choose another revision, or another model",
        )
    return shards


def _license(card: Any) -> str | None:
    license = getattr(card, "license", None)
    return license if isinstance(license, str) else None
