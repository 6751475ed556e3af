"""Which folder a person means when a run is to be published. Torch-free."""

from __future__ import annotations

from pathlib import Path

from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.workflow.journal import FINAL, is_run


def published_folder(folder: Path) -> Path:
    """The finished checkpoint: `final/` of the folder of a run, any other folder itself.

    Raises UserError, with the folder to give, where there is none, where a run has no `final/`, and for the folder of a
    single step of a run.
    """
    if not folder.is_dir():
        what = "this is a file, not a folder" if folder.exists() else "there is no such folder"
        raise UserError(what, where=shown(folder), fix="give the folder of a run, for example runs/quickstart")
    if is_run(folder):
        if not (folder / FINAL).is_dir():
            quoted = shell_word(folder)
            raise UserError(
                f"this run has no `{FINAL}` folder: it did not end, its recipe does not publish, or a requirement is "
                "not met (report.html there says which)",
                where=shown(folder),
                fix=f"run it to its end: retrofit run {quoted} --out {quoted}",
            )
        return folder / FINAL
    run = folder.absolute().parent
    if folder.absolute().name != FINAL and is_run(run):
        raise UserError(
            f"`{shown(folder.absolute().name)}` is what one step of a run wrote, not what the run publishes",
            where=shown(folder),
            fix=f"give the folder of the run: {shell_word(folder.parent)}",
        )
    return folder
