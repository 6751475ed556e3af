"""The list of a budget: KV heads, windows and cache types priced side by side, and the best rows measured.

The heads are those of `plan --kv-heads`, the windows those of `plan --windows`; both, and every cache type, with the
loss of the same rows of text in which a passage comes again from out of sight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.budget import VERSION
from retrofit.budget.measure import answers_on, losses_on
from retrofit.budget.rows import (
    MEASURED,
    NOTHING,
    ORIGINAL,
    PILOTS,
    PREDICTED,
    BudgetList,
    BudgetRow,
    Heads,
    Loss,
    Stored,
    Windows,
    best,
    combinations,
    original_row,
    pareto,
)
from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.console import jsonable
from retrofit.data.calibration import CalibrationText
from retrofit.kv_heads.sweep.costs import Measured, fit_curve
from retrofit.kv_heads.sweep.pilot import Also
from retrofit.model.cache import cache_dir
from retrofit.model.cache_dtype import AUTO
from retrofit.model.source import with_weights
from retrofit.recipe.kv_budget import Budget
from retrofit.recipe.schema import Recipe, Window
from retrofit.system.resume import Kept
from retrofit.system.work_folder import held, kept, led_by_main, require_own
from retrofit.system.world import ALONE, World
from retrofit.workflow import pilots
from retrofit.workflow.budget_choices import Choices, choices, commands, meeting, require_possible
from retrofit.workflow.estimate.cost import DTYPE_BYTES
from retrofit.workflow.opening import open_model
from retrofit.workflow.opening_in_world import shared_context
from retrofit.workflow.sweep import TOKENS, prices
from retrofit.workflow.window_list import window_list
from retrofit.workflow.windowing import length_of, require_sequences, require_size, texts_of

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.windows.rows import Repeats
    from retrofit.workflow.context import ModelContext

COMMAND = "plan"
MEASURED_SHARE = 8
"""Of the tokens that are asked for, losses are measured on that part at most."""


def budget_list(
    recipe: Recipe,
    budget: Budget,
    *,
    name: str,
    options: str = "",
    measure: bool = True,
    tokens: int | None = None,
    moments: Path | None = None,
    revision: str | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> BudgetList:
    """The list for the recipe's model. recipe: its sections `convert` and `window` say how heads and windows are made.

    name, options: of the model, and of both conversions, in the commands. measure: the best rows, by pilot conversions,
    so that one is recommended. tokens: of the calibration text. moments: a folder that keeps what was measured; a call
    that was killed is resumed there, or in the cache. world: the processes that make this call and share what is read.
    Raises UserError, before any long work, for a budget that nothing can meet.
    """
    context = shared_context(world, lambda: _opened(recipe, budget, tokens, revision, progress))
    window, found, value_bytes = _asked(recipe, context, tokens)
    spec, recipe = context.spec, recipe.model_copy(update={"window": window})
    asked = [VERSION, context.source.digests, recipe.model_dump(mode="json"), tokens]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    work, weight = moments or cache_dir() / f"budget-{key[:24]}.work", window.text_loss / window.answer_loss
    work, keeping = world.share(work), held if moments else kept
    world.only(lambda: require_own(work, COMMAND, option="--moments"))
    with led_by_main(world, lambda: folder_lock(work), lambda: keeping(work, COMMAND)), writing(work):
        text = texts_of(window, context, context.model, recipe.seed).rows
        pricing = _Pricing(recipe, context, found, text, tokens, work, revision, progress)
        every = [
            replace(row, commands=commands(row, name, options))
            for row in combinations(
                spec,
                pricing.heads(),
                pricing.windows(),
                pricing.stored(),
                found.windowed(()),
                budget.length,
                value_bytes,
            )
        ]
        chosen, recommended = meeting(budget, every, weight)[:PILOTS], None
        original = original_row(every)
        if original.nbytes <= budget.nbytes:
            chosen, recommended = [original], original
        elif measure:
            chosen = pricing.piloted(chosen)
            recommended = best(chosen, budget, weight)[0]
    notes = [*found.notes, *pricing.notes, *_beyond(budget, spec.max_position_embeddings)]
    return BudgetList(
        model=context.source.requested,
        budget=budget,
        rows=_shown(every, chosen, original),
        recommended=recommended,
        answer_weight=weight,
        tokens=text.input_ids_NR.numel(),
        kinds=tuple(dict.fromkeys(text.kinds)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _opened(
    recipe: Recipe, budget: Budget, tokens: int | None, revision: str | None, progress: Progress | None
) -> ModelContext:
    """The model with its weights, which are fetched once the budget can be met."""
    alone = recipe.model_copy(update=dict.fromkeys(("convert", "window", "context", "recover", "evaluate", "publish")))
    context = open_model(alone, revision=revision, progress=progress)
    window, found, value_bytes = _asked(recipe, context, tokens)
    require_size(window.size, context.native)
    require_sequences(window, length_of(window, context.native))
    require_possible(budget, window, context.native, context.spec, found, value_bytes)
    context.source = with_weights(context.source, revision=revision or recipe.revision, progress=progress)
    return context


def _asked(recipe: Recipe, context: ModelContext, tokens: int | None) -> tuple[Window, Choices, int]:
    """How windows are made, what there is to choose from, and the bytes of a value of the cache."""
    assert recipe.window
    window = _fitting(recipe.window, context.native, tokens)
    dtype = context.source.dtype if recipe.dtype == "auto" else recipe.dtype
    return window, choices(window, context.config, context.spec), DTYPE_BYTES[dtype]


def _fitting(window: Window, native: int, tokens: int | None) -> Window:
    """The section with windows of which four fit the model's context, and as many tokens as were asked for. Layers that
    it names are left open: the list says which see everything."""
    size = window.size if "size" in window.model_fields_set else min(window.size, max(1, native // 4))
    calibration = window.calibration
    if tokens is not None:
        measured = min(calibration.measured_tokens, tokens // MEASURED_SHARE)
        calibration = calibration.model_copy(update={"tokens": tokens, "measured_tokens": measured})
    named = isinstance(window.full_layers, tuple) or window.full_layers == 0
    full = "auto" if named else window.full_layers
    return window.model_copy(update={"size": size, "full_layers": full, "calibration": calibration})


def _shown(every: Sequence[BudgetRow], chosen: Sequence[BudgetRow], original: BudgetRow) -> tuple[BudgetRow, ...]:
    """The rows that none beats, the original, and those that were measured; the most bytes first."""
    by_parts = {(row.heads, row.windows, row.stored): row for row in (*every, *chosen)}
    shown = dict.fromkeys((original, *pareto(by_parts.values()), *chosen))
    return tuple(sorted(shown, key=lambda row: -row.nbytes))


def _beyond(budget: Budget, positions: int) -> list[str]:
    if budget.length <= positions:
        return []
    return [
        f"{budget.length:,} tokens lie beyond the model's {positions:,} positions: it needs `retrofit extend` too, and "
        "losses are of its own positions"
    ]


@dataclass
class _Pricing:
    """What each way loses alone, measured and kept in `work`. text: rows that all of it is measured on."""

    recipe: Recipe
    context: ModelContext
    found: Choices
    text: Repeats
    tokens: int | None
    work: Path
    revision: str | None
    progress: Progress | None

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self._digest = CalibrationText(self.text.input_ids_NR, self.text.kinds).digest()
        question = {"digests": dict(self.context.source.digests), "text": self._digest}
        question["device"] = self.context.device_kind
        self._store = Kept(self.work / "measured", question, self.context.world)

    @property
    def _usual(self) -> dict[str, Any]:
        return {
            "command": "",
            "revision": self.revision,
            "world": self.context.world,
            "progress": self.progress,
        }

    def stored(self) -> list[Stored]:
        """What every cache type loses."""
        names, found = self.found.dtypes, {}
        if self.progress:
            self.progress.start("measure cache types", len(names), "types")
        for name in names:
            found[name] = self._losses(name)
            if self.progress:
                self.progress.advance(1)
        if self.progress:
            self.progress.finish()
        return [Stored(name, one - found[AUTO], ORIGINAL if name == AUTO else MEASURED) for name, one in found.items()]

    def _losses(self, name: str) -> Loss:
        """Of the original under a cache type."""
        known: Any = self._store.values([name]).get(name)
        if known is None:
            device, world = self.context.device, self.context.world
            known = jsonable(losses_on(self.context.model, self.text, name, device=device, world=world))
            if world.main:
                self._store.put_values(name, known)
        return Loss(**known)

    def heads(self) -> list[Heads]:
        """What every number of KV heads loses: of text as `plan --kv-heads` has it, and of answers on a curve through
        those of the same probes."""
        own = max(self.found.counts)
        heads = [Heads(own, NOTHING, ORIGINAL)]
        if len(self.found.counts) < 2:
            return heads
        also = Also(self._digest, partial(answers_on, self.text))
        recipe = self.recipe.model_copy(update={"window": None})
        listed = prices(recipe, tokens=self.tokens, moments=self.work / "heads", also=also, **self._usual)
        self.notes += listed.notes
        probes = listed.calibrated.probes if listed.calibrated else ()
        answers = {probe.kv_heads: probe.also for probe in probes if probe.also is not None}
        if not answers:
            self.notes.append(
                f"no fewer KV heads in the list: what is kept in {self.work / 'heads'} was measured by another list, "
                "without the loss of answers; name another folder"
            )
        costs = {price.kv_heads: price.cost for price in listed.prices}
        curve = fit_curve(costs, [Measured(count, rise, 0.0) for count, rise in answers.items()])
        for price in listed.prices:
            count = price.kv_heads
            if count != own and price.increase is not None and answers:
                lost = answers.get(count, curve(costs[count]) if curve else 0.0)
                how = MEASURED if count in answers else PREDICTED
                heads.append(Heads(count, Loss(price.increase, lost), how))
        return heads

    def windows(self) -> list[Windows]:
        """What every size and number of full layers loses, as `plan --windows` has it."""
        none = [Windows(None, (), NOTHING, ORIGINAL)]
        if self.found.target is None:
            return none
        recipe = self.recipe.model_copy(update={"convert": None})
        listed = window_list(recipe, moments=self.work / "windows", **self._usual)
        self.notes += listed.notes
        return none + [
            Windows(price.size, price.full_layers, Loss(price.text, price.answers), price.how)
            for price in listed.prices
            if price.size is not None
        ]

    def piloted(self, rows: Sequence[BudgetRow]) -> list[BudgetRow]:
        """The rows, measured by pilot conversions."""
        assert self.recipe.convert
        return pilots.measured(
            rows,
            self.recipe,
            self.context,
            self.text,
            self._losses(AUTO),
            self._store,
            self.work / "pilots",
            tokens=self.tokens or min(TOKENS, self.recipe.convert.calibration.tokens),
            revision=self.revision,
            progress=self.progress,
        )
