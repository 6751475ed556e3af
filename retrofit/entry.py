"""What every public function does first: raise the errors that need no torch, then print one line on what happens.

Importing torch and transformers takes seconds; a wrong option, a model that is not there and an output folder in use
are refused before.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.provenance import FILE
from retrofit.checkpoint.staging import require_writable
from retrofit.console import Console, Progress
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.cache import cache_dir
from retrofit.model.source import require_there
from retrofit.recipe.options import OPTIONS, in_options
from retrofit.recipe.schema import Recipe
from retrofit.recovery.layout import sizes_of
from retrofit.surroundings import require_usable
from retrofit.system.failure import meet, watched
from retrofit.system.sequence_groups import require_groups
from retrofit.system.world import ALONE, World, from_environment, started
from retrofit.workflow.journal import is_run


def display(progress: Progress | bool) -> Progress | None:
    """Where progress is shown: True is stderr, as on the command line, and False is nowhere.

    Of several processes rank 0 shows it.
    """
    if not from_environment().main:
        return None
    if isinstance(progress, bool):
        return Console().progress if progress else None
    return progress


@contextmanager
def begun(
    what: str,
    progress: Progress | None,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    out: Path | None = None,
    writes: tuple[Path | None, ...] = (),
    options: str | None = None,
    torch: bool = True,
    recipe: Recipe | None = None,
) -> Iterator[World]:
    """The block that does a command's work, when its surroundings are right.

    what: the line that says what happens. model: has to be there. out: a new folder, or one that this program wrote.
    writes: other places that it writes. options: of which command errors are told in, by default the first word of
    `what`. torch: whether the work needs it. recipe: of work that the processes of a
    launcher share; the block gets their world, else that of one process. In the block failures of the machine become a
    UserError, other libraries print neither progress bars nor warnings, and torch leaves busy cores to other work.
    """
    require_usable()
    launched = ALONE if recipe is None else from_environment()
    command = options or what.partition(" ")[0]
    with _worded(command):
        if recipe is not None and recipe.evaluate is not None:
            require_groups(launched, recipe.evaluate.sequence_parallel, command)
        if recipe is not None and recipe.recover is not None:
            sizes_of(recipe.recover, launched)

    def check() -> None:
        if out is not None:
            _require_free(out)
        if model is not None:
            require_there(model, revision)

    with writing(out, *writes, cache_dir()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        if launched.size == 1:
            check()
        if progress:
            progress.note(f"{what} (loading PyTorch)" if torch and "torch" not in sys.modules else what)
        if not torch:
            yield ALONE
            return
        from retrofit.model.load import quiet
        from retrofit.system.threads import sharing_cores

        with quiet(), sharing_cores(progress, launched.node_size), watched(launched):
            places = [place for place in (out, *writes) if place is not None]
            world = launched if recipe is None else _met(launched, recipe, places)
            if world.size > 1:
                world.only(check)
            with _worded(command):
                yield world


@contextmanager
def _worded(command: str) -> Iterator[None]:
    """Errors of the block in the words of a command's options; those of a recipe are in the words of the file."""
    try:
        yield
    except UserError as error:
        if command in OPTIONS and command not in ("run", "plan"):
            error.where = error.where and in_options(command, error.where)
            error.fix = error.fix and in_options(command, error.fix)
        raise


def _met(world: World, recipe: Recipe, places: Sequence[Path]) -> World:
    """The world of a launcher when its processes have met, and work for the same recipe with the same versions, and
    with the same folders. places: that are written."""
    if world.size == 1:
        return world
    from retrofit.model.load import resolve_device
    from retrofit.system.agreement import digest_of, require_same, require_same_versions, require_shared

    meet(world)
    world = started(world, resolve_device(recipe.device))
    require_same_versions(world)
    seen = {"the recipe": digest_of(recipe.model_dump(mode="json"))}
    require_same(world, seen, fix="give every process the same recipe file and the same options")
    for place in places:
        require_same(world, {"the output": str(place.absolute())}, fix="start every node in the same folder")
        require_shared(world, place)
    return world


def require_run_folder(out: Path) -> None:
    """UserError unless `out` can be made, is empty, or is the folder of a run."""
    require_writable(out)
    if out.is_file():
        raise UserError("the run folder is a file", where=shown(out), fix="give another --out")
    if out.is_dir() and not is_run(out) and any(out.iterdir()):
        raise UserError("the folder holds something that is not a run", where=shown(out), fix="give another --out")


def _require_free(out: Path) -> None:
    """UserError where the output holds what this program did not write; what it did is looked at by the command."""
    require_writable(out)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())) and not (out / FILE).is_file():
        raise UserError(
            "the output folder exists and is not empty", where=shown(out), fix="remove it, or give another --out"
        )
