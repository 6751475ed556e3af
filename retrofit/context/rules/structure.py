"""Rules about the structure of rotary parameters: names, types, shapes, and one value in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from retrofit.checkpoint.config import is_number
from retrofit.context.fields import LAYER_TYPES, is_nested, rotary_dim
from retrofit.context.names import EXACT
from retrofit.context.rules.facts import LISTS, Facts, Finding, kind_of, quoted
from retrofit.escape import shown

_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": LISTS,
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "dynamic": ("alpha",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_mscale", "long_mscale"),
    "proportional": ("factor",),
}
_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _shape(facts: Facts) -> Iterator[Finding]:
    """Rotary parameters are an object, for each kind of layer one, and hold numbers where numbers belong."""
    for name in ("rope_scaling", "rope_parameters"):
        value = facts.raw.get(name)
        inner = {f"{name}.{key}": value[key] for key in LAYER_TYPES if key in value} if is_nested(value) else None
        for where, one in (inner or {name: value}).items():
            if one and not isinstance(one, Mapping):
                what = f"{quoted(one)} is no object of rotary parameters"
                yield Finding("error", where, what, 'write {"rope_type": ..., "rope_theta": ...}', "not-an-object")
    for view in facts.views:
        for key in _NUMBERS:
            value = view.parameters.get(key)
            if value is not None and not (is_number(value) and value > 0):
                what = f"{quoted(value)} is not a number above 0"
                yield Finding("error", f"{view.where}.{key}", what, "correct it", "bad-number")


def _partial(facts: Facts) -> Iterator[Finding]:
    """A rotated share in two places: transformers 5 takes the one inside, older readers the one at the top."""
    outside = facts.raw.get("partial_rotary_factor")
    for view in facts.views:
        if outside is not None and view.parameters.get("partial_rotary_factor") != outside:
            inside = view.parameters["partial_rotary_factor"]
            what = f"partial_rotary_factor is {quoted(outside)} at the top and {quoted(inside)} here: readers differ"
            yield Finding("error", view.where, what, "keep one value in both places", "partial-conflict")


def _names_agree(facts: Facts) -> Iterator[Finding]:
    """Two sets of parameters in one file: transformers 5 takes rope_scaling, other engines rope_parameters."""
    old, new = facts.raw.get("rope_scaling"), facts.raw.get("rope_parameters")
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return
    main = new.get("full_attention") if is_nested(new) and not is_nested(old) else new
    if not isinstance(main, Mapping):
        return

    def value(source: Mapping[str, Any], key: str) -> Any:
        if key == "rope_type":
            return source.get("rope_type") or source.get("type") or "default"
        found = source.get(key)
        return facts.raw.get(key) if found is None else found

    keys = (set(old) | set(main)) - {"type"} | {"rope_type"}
    differ = sorted(key for key in keys if value(old, key) != value(main, key))
    if differ:
        what = f"rope_scaling and rope_parameters disagree about {', '.join(differ)}; readers differ in which they take"
        yield Finding("error", "rope_scaling", what, "remove one, or give both the same values", "names-conflict")


def _types(facts: Facts) -> Iterator[Finding]:
    for view in facts.views:
        kind, older = view.rope_type, view.parameters.get("type")
        if older is not None and view.parameters.get("rope_type") not in (None, older):
            what = f"the rope type is `{kind}` for transformers 5, and `{shown(older, 60)}` under the old key `type`"
            yield Finding("error", view.where, what, 'keep one of them, as "rope_type"', "type-conflict")
        elif older is not None and not _said_anew(facts, kind):
            what = f"the rope type stands under the old key `type` ({kind}): some readers look for `rope_type` only"
            yield Finding("warning", view.where, what, f'write "rope_type": "{kind}"', "legacy-type")
        if facts.raw.get("model_type") == "phi3" and kind not in ("default", "longrope", "su"):
            what = f"phi3 knows only default and longrope; `{kind}` is refused or read as longrope"
            yield Finding("error", view.where, what, "use longrope or a larger rope_theta (ntk)", "phi3-type")
        if kind_of(facts, view) not in REQUIRED:
            what = f"unknown rope_type `{shown(kind, 60)}`: transformers fails or ignores it"
            yield Finding("error", view.where, what, f"use one of {', '.join(REQUIRED)}", "unknown-type")


def _said_anew(facts: Facts, kind: str) -> bool:
    """Whether `rope_parameters` names the type as well, for readers that look for `rope_type` only."""
    parameters = facts.raw.get("rope_parameters")
    return isinstance(parameters, Mapping) and parameters.get("rope_type") == kind


def _exact(facts: Facts) -> Iterator[Finding]:
    """Some classes of transformers 4 refuse a `rope_scaling` with any other key, or without the old `type`."""
    family, scaling = str(facts.raw.get("model_type")), facts.raw.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return
    kind = str(scaling.get("rope_type") or scaling.get("type"))
    wanted = {"type", *EXACT.get((family, kind), ())}
    if len(wanted) > 1 and wanted != set(scaling):
        what = f"transformers 4 refuses any other keys than {', '.join(sorted(wanted))} for {kind} on {family}"
        yield Finding("warning", "rope_scaling", what, "leave the others out: rope_parameters hold them", "other-keys")


def _keys(facts: Facts) -> Iterator[Finding]:
    for view in facts.views:
        kind = kind_of(facts, view)
        if kind not in REQUIRED:
            continue
        for key in REQUIRED[kind]:
            if view.parameters.get(key) is None:
                yield Finding("error", view.where, f"`{kind}` needs `{key}`", f"write `{key}`", "missing-key")
        allowed = _COMMON | set(REQUIRED[kind]) | set(OPTIONAL.get(kind, ())) | {"mrope_section", "mrope_interleaved"}
        for key in sorted(set(view.parameters) - allowed):
            what = f"`{shown(key, 60)}` means nothing to rope_type `{kind}` and is ignored"
            yield Finding("warning", view.where, what, "remove it, or correct its name or the rope_type", "unknown-key")
        factor = view.parameters.get("factor")
        if factor is not None and not (is_number(factor) and factor >= 1):
            what = f"factor is {quoted(factor)}, not a number of at least 1"
            yield Finding("error", view.where, what, "write how many times longer the context is", "bad-factor")
        low, high = view.parameters.get("low_freq_factor"), view.parameters.get("high_freq_factor")
        if kind == "llama3" and is_number(low) and is_number(high) and high <= low:
            what = f"high_freq_factor {high:g} is not above low_freq_factor {low:g}: the ramp runs backwards"
            yield Finding("error", view.where, what, "Llama 3.1 uses 1 and 4", "bad-ramp")
        fast, slow = (view.parameters.get(key, default) for key, default in (("beta_fast", 32), ("beta_slow", 1)))
        if kind == "yarn" and is_number(fast) and is_number(slow) and fast <= slow:
            what = f"beta_fast {fast:g} is not above beta_slow {slow:g}: the ramp runs backwards"
            yield Finding("error", view.where, what, "YaRN uses 32 and 1", "bad-ramp")


def _layers(facts: Facts) -> Iterator[Finding]:
    nested = [view for view in facts.views if view.nested]
    if not nested:
        return
    for view in nested:
        if "truncate" in view.parameters:
            severity: Literal["error", "warning"] = "warning" if view.parameters["truncate"] else "error"
            what = "`truncate` inside a layer type is ignored: transformers looks for it beside the layer types"
            yield Finding(severity, f"{view.where}.truncate", what, "remove it", "truncate-ignored")
    stored = facts.raw.get("rope_parameters")
    if is_nested(stored):
        kinds = facts.raw.get("layer_types")
        used = {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()
        for missing in map(shown, sorted(used - set(stored))):
            what = f"no rotary parameters for layers of type {missing}: a class default is used, or loading fails"
            yield Finding("error", f"rope_parameters.{missing}", what, "write them", "layer-type-missing")


def _lists(facts: Facts) -> Iterator[Finding]:
    for view in facts.views:
        pairs = rotary_dim(facts.raw, view.parameters) // 2
        if kind_of(facts, view) != "longrope" or not pairs:
            continue
        for key in LISTS:
            values, where = view.parameters.get(key), f"{view.where}.{key}"
            if values is None:
                continue
            if not isinstance(values, list) or not all(is_number(value) and value > 0 for value in values):
                yield Finding("error", where, "not a list of positive numbers", f"write {pairs} numbers", "bad-list")
            elif len(values) != pairs:
                what = f"{len(values)} values for {pairs} rotary pairs"
                yield Finding("error", where, what, f"write {pairs} numbers", "list-length")


RULES: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    _shape,
    _partial,
    _names_agree,
    _types,
    _exact,
    _keys,
    _layers,
    _lists,
)
