"""Write GGUF files of a checkpoint folder: converted, quantised, and each compared with the folder in llama.cpp."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from retrofit.checkpoint.config import read_config
from retrofit.checkpoint.files import checkpoint_files
from retrofit.checkpoint.side_files import JSON, copy_side_files
from retrofit.checkpoint.staging import require_free_space
from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.model.side_files import side_file
from retrofit.publishing.engines import environments
from retrofit.publishing.engines.converter import Conversion, convert_all, refused
from retrofit.publishing.engines.environments import CONVERTER, QUANTISER, Environment
from retrofit.publishing.gguf.checking import (
    TEXTS,
    Distance,
    GgufFile,
    Reference,
    compared,
    distance_of,
    reference_of,
    require_same_model,
)
from retrofit.publishing.gguf.kinds import CONVERTED, converted, file_name, most_bytes, stored_as
from retrofit.publishing.gguf.quantiser import quantise
from retrofit.publishing.gguf.reading import GgufReading, read
from retrofit.recipe.values import GgufType

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.model.folder import ModelFolder

LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Tools:
    """Where llama.cpp's programs are: the converter, the library that reads files, the quantiser where it is needed."""

    converter: Environment
    reader: Environment
    quantiser: Environment | None = None


@dataclass(frozen=True)
class GgufReport:
    """GGUF files and how they were compared: so many tokens of so many documents, whose perplexity under the folder
    itself is `ppl`. beyond: of the file with the folder's own weights, past the original window; None where nothing was
    scored there. versions: of the packages that wrote and read them."""

    files: tuple[GgufFile, ...]
    ppl: float
    tokens: int
    documents: int
    beyond: Distance | None
    versions: Mapping[str, str]


def report_of(stored: Any) -> GgufReport:
    """The report that a record keeps. Raises UserError for one that nothing of ours wrote."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(GgufReport).validate_python(stored)
    except ValidationError as error:
        raise UserError(
            "`gguf` in retrofit.json is no record of this program", where="retrofit.json", fix="remove it there"
        ) from error


def tools_for(kinds: Sequence[GgufType], *, make: bool, command: str, progress: Progress | None = None) -> Tools:
    """The environments that writing such files needs. make: those that are not there are made.

    command: what to type so that they are, for the message. Raises UserError where one is not there or cannot be made.
    """
    wanted = [CONVERTER, LLAMA_CPP, *([QUANTISER] if set(kinds) - set(CONVERTED) else [])]
    return Tools(*(environments.require(name, make=make, command=command, progress=progress) for name in wanted))


def require_convertible(
    model: ModelFolder, tools: Tools, *, config: Mapping[str, Any] | None = None, dtype: str = "bfloat16"
) -> None:
    """UserError, with the name that it does not know, where the converter cannot write this folder. Nothing is written.

    config: config.json that the folder will have.
    """
    with readable(model.path, config=config) as folder, tempfile.TemporaryDirectory() as place:
        out = Path(place) / "model.gguf"
        [error] = convert_all(
            [Conversion(folder, out, stored_as(dtype), "model", check=True)], environment=tools.converter
        )
    if error is not None:
        raise refused(error, model.path)


def write(
    model: ModelFolder,
    out: Path,
    kinds: Sequence[GgufType],
    *,
    name: str,
    documents: Sequence[Document],
    tokens: int,
    tools: Tools,
    identity: Mapping[str, str] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> GgufReport:
    """Write the folder of `model` into the folder `out`, which exists, as GGUF files of all `kinds`, and compare them.

    name: of the model. documents: `tokens` tokens of each are scored. identity: license and base model, which the
    header names.

    Raises UserError for what the converter, the quantiser or llama.cpp refuses, and where llama.cpp computes another
    function from the folder's own weights. What was written stays in `out` then; it is a folder to be thrown away.
    """
    from retrofit.model.load import stored_dtype

    dtype = stored_dtype(model.path)
    first, *rest = converted(kinds, dtype)
    files = {kind: out / file_name(name, kind) for kind in (first, *rest, *kinds)}
    require_free_space(out, most_bytes(_parameters(model), kinds, dtype))
    if progress:
        progress.start(f"convert to {', '.join((first, *rest))}", None, "")
    with readable(model.path, identity=identity) as folder:
        asked = [Conversion(folder, files[kind], kind, name) for kind in (first, *rest)]
        for error in filter(None, convert_all(asked, environment=tools.converter)):
            raise refused(error, model.path)
    versions = {CONVERTER: _release(tools.converter)}
    reference = reference_of(model, documents, tokens, device=device, progress=progress)
    reading = _read(files[first], reference, tools, beyond=True, progress=progress)
    require_same_model(reading, reference, files[first].name)
    base = compared(files[first], first, reading, reference, stored=True)
    quantised = [kind for kind in kinds if kind not in CONVERTED]
    if quantised:
        assert tools.quantiser is not None
        if progress:
            progress.start(f"quantise to {', '.join(quantised)}", None, "")
        pairs = [(kind, files[kind]) for kind in quantised]
        versions[QUANTISER] = quantise(files[first], pairs, environment=tools.quantiser, threads=_threads())
    found: dict[GgufType, GgufFile] = {first: base}
    for kind in (kind for kind in kinds if kind != first):
        other = _read(files[kind], reference, tools, progress=progress)
        found[kind] = compared(files[kind], kind, other, reference, stored=False)
    if first not in kinds:
        files[first].unlink()
    if progress:
        progress.finish()
    return GgufReport(
        files=tuple(found[kind] for kind in kinds),
        ppl=reference.ppl,
        tokens=sum(len(one.ids) for one in reference.passages),
        documents=len(reference.passages),
        beyond=distance_of(reading.scored[-1:], [reference.beyond_scored]) if reference.beyond_scored else None,
        versions={**versions, LLAMA_CPP: reading.version},
    )


def _read(
    path: Path, reference: Reference, tools: Tools, *, beyond: bool = False, progress: Progress | None
) -> GgufReading:
    if progress:
        progress.start(f"read {path.name} in llama.cpp", None, "")
    more = [reference.beyond] if beyond and reference.beyond else []
    return read(path, [*reference.passages, *more], TEXTS, environment=tools.reader, threads=_threads())


@contextmanager
def readable(
    folder: Path, *, config: Mapping[str, Any] | None = None, identity: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """A folder of the same name with what the converter may read: configuration, weights (as links), tokenizer.

    It runs what code a folder brings, and these files name none. config: config.json that stands there instead.
    identity: license and base model, as a card says them.
    """
    with tempfile.TemporaryDirectory() as place:
        view = Path(place) / (folder.absolute().name or "model")
        view.mkdir()
        copy_side_files(folder, view)
        for name in JSON:
            if settings := side_file(view, name):
                settings.pop("auto_map", None)
                (view / name).write_text(json.dumps(settings), encoding="utf-8")
        fields = {key: value for key, value in (config or read_config(folder)).items() if key != "auto_map"}
        (view / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        for name in checkpoint_files(folder):
            if name != "config.json":
                (view / name).symlink_to((folder / name).absolute())
        if identity:
            (view / "README.md").write_text(f"---\n{yaml.safe_dump(dict(identity))}---\n", encoding="utf-8")
        yield view


def _parameters(model: ModelFolder) -> int:
    from retrofit.model.inspect import count_parameters

    return count_parameters(model.path, model.config)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _release(environment: Environment) -> str:
    """The converter's release: what is pinned, or installed here."""
    pinned = dict(line.partition("==")[::2] for line in environments.pins(CONVERTER))
    return pinned[CONVERTER] if environment.pinned else metadata.version(CONVERTER)
