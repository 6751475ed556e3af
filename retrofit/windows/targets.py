"""The architecture that windows are written in, and the layers that can have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrofit.errors import UserError
from retrofit.model.families import family_of, with_windows
from retrofit.model.families.experts import EXPERTS
from retrofit.model.families.refused import OPTIONAL
from retrofit.model.reexpress import reexpression_of
from retrofit.model.reexpress.granite_swa import REASONS
from retrofit.model.spec import AttentionSpec

WITH_SINKS = "granite_swa"
EXPERTS_WITH_SINKS = "granitemoe_swa"
WITHOUT_SINKS = "ministral"
"""Windows by layer and no sinks: the Mistral of windows in some layers. `mistral` has one window for all layers."""
TARGETS = frozenset((WITH_SINKS, EXPERTS_WITH_SINKS, WITHOUT_SINKS))


@dataclass(frozen=True)
class Target:
    """What is written. family: its model type. reexpressed: whether that is another one than the model's. sinks:
    whether its windowed heads get sinks. candidates: layers that may get a window; the others have one already,
    always: those of them whose window becomes shorter."""

    family: str
    reexpressed: bool
    sinks: bool
    candidates: tuple[int, ...]
    always: tuple[int, ...]
    notes: tuple[str, ...] = ()


def target_of(config: Any, spec: AttentionSpec, size: int, *, target: str, sinks: bool, all_layers: bool) -> Target:
    """The target of a model. target: as in the recipe. sinks: whether they are wanted. all_layers: no layer is left
    full.

    Raises UserError where the architecture holds no such windows and cannot become one that does, and for windows that
    would be longer than those that layers have.
    """
    candidates = _candidates(spec, size)
    always = tuple(layer.index for layer in spec.layers if layer.window is not None and layer.window > size)
    if not candidates and not always:
        raise UserError(
            f"every layer has a window of {size:,} tokens already",
            where=f"window.size: {size}",
            fix="give a smaller size, which makes them shorter, or leave `window` out",
        )
    name, family = str(config.model_type), family_of(config)
    chosen = _family(name, family.window, target, sinks, all_layers)
    if chosen != name:
        if chosen not in OPTIONAL.get(name, ()):
            raise _no_target(name, family.window, chosen, target)
        reexpression_of(config, chosen)  # raises where this model cannot become that
    own_sinks = chosen in (WITH_SINKS, EXPERTS_WITH_SINKS)
    notes = (f"`{chosen}` has no sinks: windowed heads get none",) if sinks and not own_sinks else ()
    return Target(chosen, chosen != name, sinks and own_sinks, candidates, always, notes)


def _family(name: str, window: str, target: str, sinks: bool, all_layers: bool) -> str:
    by_layer = window == "layer_types" or (window == "all" and all_layers)
    with_sinks = EXPERTS_WITH_SINKS if name in EXPERTS else WITH_SINKS
    if target == "granite_swa":
        return with_sinks
    if target == "mistral":
        return name if name == "mistral" and all_layers else WITHOUT_SINKS
    if by_layer:
        return name
    return with_sinks if sinks or name in EXPERTS else WITHOUT_SINKS


def _no_target(name: str, window: str, chosen: str, asked: str) -> UserError:
    """For an architecture that holds no such windows and cannot become `chosen`. window: which it holds."""
    become = (name for name, targets in OPTIONAL.items() if TARGETS & {*targets})
    holds = {
        "none": "has no sliding windows",
        "all": "has windows in all of its layers or in none",
        "layer_types": "has windows by layer without sinks",
    }
    fixes = {
        "none": f"choose a model that can have windows: {', '.join(sorted({*with_windows(), *become}))}",
        "all": "give every layer a window: --full-layers 0, without --target",
        "layer_types": "leave --target out: it keeps its own architecture then",
    }
    reason = None if chosen == WITHOUT_SINKS else REASONS.get(name)
    return UserError(
        f"`{name}` {holds[window]}, and cannot become `{chosen}`" + (f": {reason}" if reason else ""),
        where=f"window.target: {asked}",
        fix=fixes[window],
    )


def _candidates(spec: AttentionSpec, size: int) -> tuple[int, ...]:
    """Layers without a window. Raises UserError where layers have a window that is shorter than the new one: all
    windows of a model have one size."""
    shorter = [layer for layer in spec.layers if layer.window is not None and layer.window < size]
    if shorter:
        raise UserError(
            f"layer {shorter[0].index} already looks back {shorter[0].window:,} tokens only, and all windows of a "
            "model have one size",
            where=f"window.size: {size}",
            fix=f"give a size of at most {min(layer.window or size for layer in shorter)}",
        )
    return tuple(layer.index for layer in spec.layers if layer.window is None)


def require_candidates(asked: Sequence[int], candidates: Sequence[int], layers: int) -> None:
    """UserError for a layer that is to stay full and is not there, or has a window already."""
    for index in asked:
        if index >= layers:
            raise UserError(
                f"there is no layer {index}",
                where="window.full_layers",
                fix=f"the model has {layers} layers, 0 to {layers - 1}",
            )
        if index not in candidates:
            raise UserError(
                f"layer {index} has a window already, and is never made a full one",
                where="window.full_layers",
                fix=f"choose among {', '.join(map(str, candidates)) or 'none: every layer has a window'}",
            )


def require_some(full: int, target: Target) -> None:
    """UserError where no layer is left to get a window, and where more are to stay full than can."""
    able, least = len(target.candidates), 0 if target.always else 1
    if full <= able - least:
        return
    others = "; the others have a window already" if target.always or not able else ""
    raise UserError(
        f"at most {able} of the layers can stay full, not {full}{others}"
        if full > able
        else f"no layer would get a window: {full} of {able} stay full",
        where="window.full_layers",
        fix=f"leave at most {able - least} full" if able >= least else "leave `window` out",
    )
