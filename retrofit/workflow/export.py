"""`retrofit export`: a checkpoint folder as GGUF files in a new folder, compared with it in llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.provenance import FILE, digest, read_provenance, versions, write_provenance
from retrofit.checkpoint.staging import staged
from retrofit.console import jsonable
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.publishing.gguf.writing import GgufReport
from retrofit.recipe.schema import Recipe
from retrofit.workflow.gguf import write_gguf
from retrofit.workflow.opening import open_context
from retrofit.workflow.outputs import require_new
from retrofit.workflow.public import source_record

if TYPE_CHECKING:
    from retrofit.console import Progress


@dataclass(frozen=True)
class Exported:
    """GGUF files of a checkpoint. source: its folder. folder: where the files are."""

    source: Path
    folder: Path
    report: GgufReport


def require_checkpoint(folder: Path) -> None:
    """UserError unless this is a folder with safetensors weights. Torch-free."""
    if not folder.is_dir():
        raise UserError("there is no such folder", where=shown(folder), fix="give the folder of a checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            "the folder holds no safetensors weights",
            where=shown(folder),
            fix="give a checkpoint folder, for example `final` of a run",
        )


def export(
    recipe: Recipe, folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Exported:
    """Write the GGUF files that `publish.gguf` of the recipe names to the new folder `out`.

    The texts of `evaluate` are what the files are compared on. overwrite: `out` may hold an earlier export.
    Raises UserError, before anything is written, for what the converter does not know and what is not installed.
    """
    section = recipe.publish
    assert section is not None
    require_checkpoint(folder)
    if require_new(out, overwrite=overwrite):
        raise UserError("the output folder holds a checkpoint", where=shown(out), fix="give another --out")
    recipe = recipe.model_copy(update={"model": str(folder)})
    with folder_lock(out), writing(out):
        context = open_context(recipe, out=out, alone=True, progress=progress)
        record: dict[str, Any] = read_provenance(folder) if (folder / FILE).is_file() else {}
        title = record.get("name")
        name = title if isinstance(title, str) and title else folder.absolute().name
        with staged(out, overwrite=overwrite) as place:
            report = write_gguf(context, context.model, place, section, name)
            new = {
                "name": name,
                "source": record.get("source") or source_record(context.source),
                "steps": record.get("steps") or [],
                "gguf": jsonable(report),
                "versions": {**versions(), **report.versions},
                "files": digest(place, everything=True),
            }
            write_provenance(place, new)
    return Exported(folder, out, report)
