"""Requirements of a recipe: that each is about something it measures, and whether what was measured meets them."""

from __future__ import annotations

from collections.abc import Mapping

from retrofit.data.sources import CHAT, HUB, holds_dialogues, kind_of
from retrofit.errors import UserError
from retrofit.evaluation.result import EvaluationResult
from retrofit.publishing.gate import GateResult, check
from retrofit.recipe.schema import Recipe, TextSource


def gate_of(recipe: Recipe, found: EvaluationResult | None) -> tuple[GateResult, ...]:
    """What the recipe requires against what was measured; a kernel that was not proven never passes. Raises nothing."""
    if found is None:
        return tuple(check({key: bound for key, bound in recipe.require.items() if not of_engine(key)}, {}))
    require = {key: bound for key, bound in recipe.require.items() if not of_engine(key)}
    if not found.proof.passed:
        require.setdefault("kernel_max_diff", f"<= {found.proof.tolerance}")
    return tuple(check(require, found.metrics))


def engine_gate(recipe: Recipe, metrics: Mapping[str, float]) -> tuple[GateResult, ...]:
    """What the recipe requires of engines against what they gave, which is known last."""
    return tuple(check({key: bound for key, bound in recipe.require.items() if of_engine(key)}, metrics))


def of_engine(key: str) -> bool:
    """Whether a requirement is about an engine."""
    return key.startswith("engine@")


def check_require(recipe: Recipe) -> None:
    """Every requirement is about something that this recipe measures; UserError otherwise."""
    if recipe.evaluate is None:
        return
    kinds = set().union(*map(_kinds, recipe.evaluate.text)) if any("/" in key for key in recipe.require) else set()
    for key, bound in recipe.require.items():
        if of_engine(key):
            continue
        metric, _, kind = key.partition("/")
        name, _, length = metric.partition("@")
        if name in ("task", "task_drop"):
            if recipe.evaluate.tasks is None and not recipe.evaluate.common_knowledge:
                raise UserError(
                    "no task is asked",
                    where=f"require.{key}",
                    fix="add evaluate.common_knowledge: true, or evaluate.tasks.names",
                )
            continue  # which tasks there are is known when they are opened
        lengths = ", ".join(str(value) for value in recipe.evaluate.lengths)
        if name == "effective_length" and not (recipe.evaluate.context_gain or recipe.evaluate.needle):
            raise UserError(
                "nothing certifies an effective length",
                where=f"require.{key}",
                fix="add evaluate.context_gain: true, or a needle test",
            )
        if name in ("kv_ratio", "kernel_max_diff", "effective_length"):
            if length or kind:
                raise UserError(
                    f"`{name}` has no length and no kind of text", where=f"require.{key}", fix=f"write {name}"
                )
        elif not length:
            raise UserError(
                f"`{name}` needs a length", where=f"require.{key}", fix=f"write {name}@L, L one of {lengths}"
            )
        elif int(length) not in recipe.evaluate.lengths:
            raise UserError(
                f"nothing is measured at {length} tokens",
                where=f"require.{key}",
                fix=f"add {length} to evaluate.lengths, or require something of {lengths} alone: "
                f"--set 'require={{{name}@{recipe.evaluate.lengths[-1]}{'/' * bool(kind)}{kind}: \"{bound}\"}}'",
            )
        if kind and kind not in kinds:
            raise UserError(
                f"no text `{kind}` is evaluated", where=f"require.{key}", fix=f"use one of {', '.join(sorted(kinds))}"
            )


def _kinds(source: TextSource) -> set[str]:
    """What a source may be called in results; whether it holds dialogues is not known of what is not here."""
    either = {kind_of(source.source), CHAT}
    if source.source.startswith(HUB):
        return either
    try:
        return {CHAT if holds_dialogues(source) else kind_of(source.source)}
    except UserError:  # reported where texts are checked
        return either
