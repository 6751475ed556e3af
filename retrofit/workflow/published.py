"""Which folder a person means when a run is to be published. Torch-free."""

from __future__ import annotations

from pathlib import Path

from retrofit.checkpoint.provenance import FILE
from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.workflow.journal import FINAL, is_run


def published_folder(folder: Path) -> Path:
    """The finished checkpoint: `final/` of the folder of a run, any other folder itself.

    Raises UserError, with the folder to give, where there is none, where a run has no `final/`, for the folder of a
    single step of a run, and for one that this program did not write.
    """
    if not folder.is_dir():
        what = "this is a file, not a folder" if folder.exists() else "there is no such folder"
        raise UserError(what, where=shown(folder), fix="give the folder of a run, for example runs/quickstart")
    if is_run(folder):
        if not (folder / FINAL).is_dir():
            raise UserError(
                f"this run has no `{FINAL}` folder: it did not end, its recipe does not publish, or a requirement is "
                "not met (report.html there says which)",
                where=shown(folder),
                fix=f"run it to its end: retrofit run {shell_word(folder)}",
            )
        return folder / FINAL
    run = folder.absolute().parent
    if folder.absolute().name != FINAL and is_run(run):
        raise UserError(
            f"`{shown(folder.absolute().name)}` is what one step of a run wrote, not what the run publishes",
            where=shown(folder),
            fix=f"give the folder of the run: {shell_word(folder.parent)}",
        )
    if not (folder / FILE).is_file():
        raise UserError(
            f"the folder holds no {FILE}: this program did not write it",
            where=shown(folder),
            fix="give the folder of a run, or what convert, extend or recover wrote and `retrofit certify` completed; "
            "anything else: hf upload OWNER/NAME FOLDER",
        )
    return folder
