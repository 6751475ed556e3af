"""A recipe with a budget, made one with numbers: the list decides when the run starts, and its decision is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retrofit.budget import VERSION
from retrofit.checkpoint.lock import folder_lock
from retrofit.console import jsonable
from retrofit.errors import UserError
from retrofit.escape import shell_word
from retrofit.files import read_json
from retrofit.format import nbytes
from retrofit.model.cache_dtype import AUTO, CACHE_DTYPES
from retrofit.recipe.schema import Convert, Recipe, Window
from retrofit.recipe.values import Section
from retrofit.system.work_folder import led_by_main
from retrofit.system.world import ALONE, World
from retrofit.workflow.journal import Journal
from retrofit.workflow.rows import default_rows

if TYPE_CHECKING:
    from retrofit.console import Progress

S = TypeVar("S", bound=Section)
FILE = "budget.json"
UNDECIDED = "the budget decides when the run starts which conversions are done; this is the rest of the recipe"


def with_budget(
    recipe: Recipe, out: Path, *, revision: str | None, world: World = ALONE, progress: Progress | None
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the row that the list recommends, and notes on it. out: the run's folder, which keeps the list in
    `budget.json`: a run that is resumed is decided once. world: the processes that make this call and share the run.

    A row without surgery leaves nothing to train or to publish: the run measures the model with its cache type.
    Raises UserError as the list does.
    """
    section = recipe.budget
    assert section is not None
    asked = [VERSION, recipe.model, revision or recipe.revision, section.model_dump(mode="json"), recipe.seed]
    question = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    with led_by_main(world, lambda: folder_lock(out)):
        kept = world.only(lambda: _kept(out / FILE, question))
        kept = kept or _decide(recipe, out, question, revision, world, progress)
    try:
        row = kept["list"]["recommended"]
        return _made(recipe, row), _notes(row, section.kv_cache)
    except (ValueError, KeyError, TypeError) as error:  # somebody changed it
        raise UserError(
            f"it is not what this program wrote there: {error!r}", where=FILE, fix="remove it to decide again"
        ) from error


def _kept(file: Path, question: str) -> Mapping[str, Any] | None:
    """What an earlier call with the same question decided."""
    stored = read_json(file) if file.is_file() else {}
    return stored if stored.get("question") == question else None


def _decide(
    recipe: Recipe, out: Path, question: str, revision: str | None, world: World, progress: Progress | None
) -> Mapping[str, Any]:
    from retrofit.workflow.budgeting import budget_list

    assert recipe.budget
    assert recipe.model
    world.only(lambda: _require_rest(recipe, out, revision))
    parts = {"convert": recipe.convert or Convert(kv_heads=1), "window": recipe.window or Window()}
    found = budget_list(
        recipe.model_copy(update={**parts, "require": {}}),
        recipe.budget.budget,
        name=shell_word(recipe.model),
        tokens=recipe.budget.tokens,
        revision=revision,
        world=world,
        progress=progress,
    )
    stored: Any = jsonable({"question": question, "list": found})

    def keep() -> None:
        out.mkdir(parents=True, exist_ok=True)
        journal = Journal(out)
        journal.mark(default_rows(recipe, world.size))
        journal.write_own(FILE, f"{json.dumps(stored, indent=2, ensure_ascii=False)}\n".encode())

    world.only(keep)
    decided: Mapping[str, Any] = stored
    return decided


def _require_rest(recipe: Recipe, out: Path, revision: str | None) -> None:
    """UserError where what follows the decision would be refused, as far as that is known before it: the other steps,
    and the text of both conversions."""
    from retrofit.workflow.checks import check_headers
    from retrofit.workflow.opening import open_context, open_model
    from retrofit.workflow.steps import steps_of

    rest = recipe.model_copy(update=dict.fromkeys(("budget", "convert", "window")))
    if steps_of(rest):
        open_context(rest, revision=revision, out=out, dry=True)
    alone = dict.fromkeys(("budget", "convert", "window", "context", "recover", "evaluate", "publish"))
    for name in ("convert", "window"):
        one = recipe.model_copy(update={**alone, name: getattr(recipe, name), "require": {}})
        for step in steps_of(one):
            step.check_options()
            context = open_model(one, revision=revision)
            here = check_headers(context.model, by_name=False)
            context.steps[0].check_data(context, weights=here, sample=False)


def _made(recipe: Recipe, row: Mapping[str, Any]) -> Recipe:
    """The recipe that makes a row, from its JSON values."""
    heads, windows, stored = row["heads"], row["windows"], str(row["stored"]["cache_dtype"])
    changed: dict[str, Any] = {"convert": None, "window": None}
    if heads["how"] != "original":
        changed["convert"] = _changed(recipe.convert or Convert(kv_heads=1), kv_heads=heads["kv_heads"])
    if windows["how"] != "original":
        full = list(windows["full_layers"]) or 0
        changed["window"] = _changed(recipe.window or Window(), size=windows["size"], full_layers=full)
    if changed["convert"] is None and changed["window"] is None:
        changed |= {"recover": None, "publish": None, "require": {}}
        if recipe.evaluate is not None:
            changed["evaluate"] = _changed(recipe.evaluate, kv_cache_dtype=stored)
    return recipe.model_copy(update=changed)


def _changed(section: S, **values: object) -> S:
    """The section with these values; what it leaves to its defaults stays left to them, as they follow the model."""
    return type(section).model_validate({**section.model_dump(exclude_unset=True), **values})


def _notes(row: Mapping[str, Any], asked: str) -> tuple[str, ...]:
    heads, windows, stored = row["heads"], row["windows"], row["stored"]["cache_dtype"]
    what = [f"{heads['kv_heads']} KV heads"] if heads["how"] != "original" else []
    what += [f"windows of {windows['size']:,} tokens"] if windows["how"] != "original" else []
    lost = row["measured"]
    notes = [
        f"budget {asked}: {', '.join(what) or 'no surgery'}, cache {stored}, {nbytes(row['nbytes'])}; measured by a "
        f"pilot before any training: text {lost['text']:+.3f}, answers out of sight {lost['answers']:+.3f} nats per "
        f"token ({FILE} has the whole list)"
    ]
    if stored != AUTO:
        notes.append(
            f"the budget counts on a KV cache of {stored}, which the engine makes: serve it by "
            f"{CACHE_DTYPES[stored].engine}; `retrofit evaluate FOLDER --kv-cache-dtype {stored}` measures it"
        )
    return tuple(notes)
