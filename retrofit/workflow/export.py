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
from retrofit.data.documents import documents_digest
from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.model.folder import ModelFolder
from retrofit.publishing.gguf.existing import require_no_files
from retrofit.publishing.gguf.writing import GgufReport, report_of
from retrofit.recipe.schema import Publish, Recipe
from retrofit.system.resume import ResumeKey
from retrofit.workflow.gguf import write_gguf
from retrofit.workflow.journal import CARD
from retrofit.workflow.opening import open_context
from retrofit.workflow.outputs import QUESTION, answer_of, require_new
from retrofit.workflow.public import source_record

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.workflow.context import ModelContext


@dataclass(frozen=True)
class Exported:
    """GGUF files of a checkpoint. source: its folder. folder: where the files are. notes: that they were there."""

    source: Path
    folder: Path
    report: GgufReport
    notes: tuple[str, ...] = ()


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

    The texts of `evaluate` are what the files are compared on. The same call again finds the files done. overwrite:
    `out` may hold an earlier export. Raises UserError, before anything is written, for what the converter does not
    know, what is not installed, and a GGUF file in `out` that another command or another program wrote.
    """
    section = recipe.publish
    assert section is not None
    require_checkpoint(folder)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            "GGUF files get a folder of their own, outside of the checkpoint's",
            where=f"--out {shown(out)}",
            fix=f"give another --out, or write them into the checkpoint: retrofit certify {shell_word(folder)} --gguf "
            f"{','.join(section.gguf)}",
        )
    known = _record(out).get("files")
    require_no_files(out, ModelFolder(folder), ours=tuple(known) if isinstance(known, dict) else ())
    finished = require_new(out, overwrite=overwrite)
    recipe = recipe.model_copy(update={"model": str(folder)})
    with folder_lock(out), writing(out):
        context = open_context(recipe, out=out, alone=True, progress=progress)
        record = _record(folder)
        title = record.get("name")
        name = title if isinstance(title, str) and title else folder.absolute().name
        question = _question(context, section, name)
        if finished:
            report = report_of(answer_of(out, question, everything=True).get("gguf"))
            return Exported(folder, out, report, (f"done before: {shown(out)} is this command's, and is kept",))
        with staged(out, overwrite=overwrite) as place:
            report = write_gguf(context, context.model, place, section, name)
            new = {
                "name": name,
                "source": record.get("source") or source_record(context.source),
                "steps": record.get("steps") or [],
                "gguf": jsonable(report),
                "versions": {**versions(), **report.versions},
                QUESTION: question,
                "files": digest(place, everything=True),
            }
            write_provenance(place, new)
    return Exported(folder, out, report)


def _record(folder: Path) -> dict[str, Any]:
    return read_provenance(folder) if (folder / FILE).is_file() else {}


def _question(context: ModelContext, section: Publish, name: str) -> str:
    """A digest of everything that the files depend on. The card and the record of the folder are not in them."""
    read = {key: value for key, value in digest(context.model.path, everything=True).items() if key not in (CARD, FILE)}
    settings = {"gguf": list(section.gguf), "tokens": section.reload_tokens, "name": name}
    return ResumeKey("export", "1", settings, {"folder": read, "documents": documents_digest(context.documents)}).digest
