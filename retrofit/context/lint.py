"""The linter of position encodings: what loads without a word and computes something else.

Works on a `config.json` dict, where gaps still show, and on a transformers configuration, where class defaults have
already filled them in. Each rule is one function from the facts of a configuration to findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retrofit.checkpoint.config import is_number, is_whole, read_config
from retrofit.checkpoint.extensions import first_original
from retrofit.context.engines import differences
from retrofit.context.fields import (
    LAYER_TYPES,
    RopeView,
    as_dict,
    class_thetas,
    completed,
    is_nested,
    left_to_the_class,
    original_length,
    rotary_dim,
    text_part,
    views,
)
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.families import KNOWN
from retrofit.model.side_files import GENERATION, TOKENIZER, side_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
_LISTS = ("short_factor", "long_factor")
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": _LISTS,
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "dynamic": ("alpha",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_mscale", "long_mscale"),
    "proportional": ("factor",),
}
# Older names that transformers maps itself.
_ALIASES = {"su": "longrope", "mrope": "default"}
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
_NEEDS_ORIGINAL = ("yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Finding:
    """severity: an error computes something else than meant; a warning does so in some engine or situation.

    where: the field. rule: a stable name for machines.
    """

    severity: Literal["error", "warning"]
    where: str
    what: str
    fix: str
    rule: str = ""


@dataclass(frozen=True)
class _Facts:
    raw: Mapping[str, Any]
    views: tuple[RopeView, ...]
    window: object
    prefix: str = ""
    thetas: Mapping[str | None, float] = field(default_factory=dict)


def lint(config: object, loaded: PretrainedConfig | None = None) -> list[Finding]:
    """Findings about the position encoding of a `config.json` dict or a transformers configuration, errors first.

    loaded: what the model's class makes of the same dict, where it fills in other fields than the rotary ones.
    """
    prefix, raw = text_part(completed(as_dict(config), loaded) if loaded is not None else as_dict(config))
    thetas = class_thetas(loaded) if loaded is not None else {}
    facts = _Facts(raw, views(raw), raw.get("max_position_embeddings"), prefix, thetas)
    found = [
        Finding(one.severity, prefix + one.where, one.what, one.fix, one.rule) for rule in _RULES for one in rule(facts)
    ]
    return sorted(found, key=lambda one: one.severity != "error")


def lint_folder(path: str | Path, loaded: PretrainedConfig | None = None) -> list[Finding]:
    """`lint` on the folder's config.json as stored, and other files' limits against the window it claims."""
    raw = read_config(path)
    whole = raw if loaded is None else completed(raw, loaded)
    tokenizer, generation = (side_file(path, name) for name in (TOKENIZER, GENERATION))
    return [
        *recorded(path, loaded),
        *lint(raw, loaded),
        *_tokenizer(whole, tokenizer),
        *_generation(whole, generation),
    ]


def recorded(path: str | Path, loaded: PretrainedConfig | None) -> list[Finding]:
    """An error where retrofit.json records an extension, which wrote a base, and config.json has none any more.

    loaded: the configuration as the model's class, where that has rotary encodings.
    """
    if loaded is None or not class_thetas(loaded) or first_original(Path(path)) is None:
        return []
    prefix, raw = text_part(read_config(path))
    if all(view.parameters.get("rope_theta") is not None for view in views(raw)) and views(raw):
        return []
    what = "rope_theta is missing, and retrofit.json records an extension, which had written it"
    return [Finding("error", f"{prefix}rope_parameters", what, "take config.json from that extension", "theta-lost")]


def require_clean(findings: Sequence[Finding], where: str) -> None:
    """UserError that lists every finding of severity error; warnings pass."""
    errors = [one for one in findings if one.severity == "error"]
    if errors:
        listed = "\n".join(f"    {one.where}: {one.what}" for one in errors)
        raise UserError(
            f"The position encoding would compute something else than written:\n{listed}",
            where=where,
            fix="; ".join(dict.fromkeys(one.fix for one in errors)),
        )


def _shape(facts: _Facts) -> Iterator[Finding]:
    """Rotary parameters are an object, for each kind of layer one, and hold numbers where numbers belong."""
    for name in ("rope_scaling", "rope_parameters"):
        value = facts.raw.get(name)
        inner = {f"{name}.{key}": value[key] for key in LAYER_TYPES if key in value} if is_nested(value) else None
        for where, one in (inner or {name: value}).items():
            if one and not isinstance(one, Mapping):
                what = f"{_shown(one)} is no object of rotary parameters"
                yield Finding("error", where, what, 'write {"rope_type": ..., "rope_theta": ...}', "not-an-object")
    for view in facts.views:
        for key in _NUMBERS:
            value = view.parameters.get(key)
            if value is not None and not (is_number(value) and value > 0):
                what = f"{_shown(value)} is not a number above 0"
                yield Finding("error", f"{view.where}.{key}", what, "correct it", "bad-number")


def _theta(facts: _Facts) -> Iterator[Finding]:
    """transformers fills a class default in for a missing theta. Of a file older than the field, that is the base it
    was trained with; where theta was lost, perplexity explodes and nothing is said."""
    for view in facts.views:
        if view.parameters.get("rope_theta") is not None:
            continue
        default, fix = facts.thetas.get(view.layer_type), "write rope_theta into rope_parameters"
        if default is not None and left_to_the_class(view):
            what = f"rope_theta is missing: {_shown(default)} is used, the default of the model's class in transformers"
            yield Finding("warning", view.where, what, fix, "theta-implicit")
        else:
            what = "rope_theta is missing: the class default is used, whatever the model was trained with"
            yield Finding("error", view.where, what, fix, "theta-lost")
    outside = facts.raw.get("rope_theta")
    for name in ("rope_parameters", "rope_scaling") if outside is not None else ():
        inside = facts.raw.get(name)
        if not isinstance(inside, Mapping):
            continue
        main = inside.get("full_attention") if is_nested(inside) else inside
        if not isinstance(main, Mapping) or main.get("rope_theta") in (None, outside):
            continue
        what = (
            f"rope_theta is {_shown(outside)} here and {_shown(main['rope_theta'])} in {name}: transformers 5 reads "
            "the latter, older readers this one"
        )
        yield Finding("error", "rope_theta", what, "keep one value in both places", "theta-conflict")


def _partial(facts: _Facts) -> Iterator[Finding]:
    """A rotated share in two places: transformers 5 takes the one inside, older readers the one at the top."""
    outside = facts.raw.get("partial_rotary_factor")
    for view in facts.views:
        if outside is not None and view.parameters.get("partial_rotary_factor") != outside:
            inside = view.parameters["partial_rotary_factor"]
            what = f"partial_rotary_factor is {_shown(outside)} at the top and {_shown(inside)} here: readers differ"
            yield Finding("error", view.where, what, "keep one value in both places", "partial-conflict")


def _absent(facts: _Facts) -> Iterator[Finding]:
    raw = facts.raw
    if not facts.views and "hidden_size" in raw and raw.get("max_position_embeddings") is not None:
        what = "the file says nothing about RoPE: theta is the class default of whatever reads it"
        fix = 'write "rope_parameters": {"rope_type": "default", "rope_theta": ...}'
        yield Finding("warning", "rope_parameters", what, fix, "theta-implicit")


def _names_agree(facts: _Facts) -> Iterator[Finding]:
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


def _types(facts: _Facts) -> Iterator[Finding]:
    for view in facts.views:
        kind, older = view.rope_type, view.parameters.get("type")
        if older is not None and view.parameters.get("rope_type") not in (None, older):
            what = f"the rope type is `{kind}` for transformers 5, and `{shown(older, 60)}` under the old key `type`"
            yield Finding("error", view.where, what, 'keep one of them, as "rope_type"', "type-conflict")
        elif older is not None:
            what = f"the rope type stands under the old key `type` ({kind}): some readers look for `rope_type` only"
            yield Finding("warning", view.where, what, f'write "rope_type": "{kind}"', "legacy-type")
        if facts.raw.get("model_type") == "phi3" and kind not in ("default", "longrope", "su"):
            what = f"phi3 knows only default and longrope; `{kind}` is refused or read as longrope"
            yield Finding("error", view.where, what, "use longrope or a larger rope_theta (ntk)", "phi3-type")
        if _kind(facts, view) not in REQUIRED:
            what = f"unknown rope_type `{shown(kind, 60)}`: transformers fails or ignores it"
            yield Finding("error", view.where, what, f"use one of {', '.join(REQUIRED)}", "unknown-type")


def _keys(facts: _Facts) -> Iterator[Finding]:
    for view in facts.views:
        kind = _kind(facts, view)
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
            what = f"factor is {_shown(factor)}, not a number of at least 1"
            yield Finding("error", view.where, what, "write how many times longer the window is", "bad-factor")
        low, high = view.parameters.get("low_freq_factor"), view.parameters.get("high_freq_factor")
        if kind == "llama3" and is_number(low) and is_number(high) and high <= low:
            what = f"high_freq_factor {high:g} is not above low_freq_factor {low:g}: the ramp runs backwards"
            yield Finding("error", view.where, what, "Llama 3.1 uses 1 and 4", "bad-ramp")
        fast, slow = (view.parameters.get(key, default) for key, default in (("beta_fast", 32), ("beta_slow", 1)))
        if kind == "yarn" and is_number(fast) and is_number(slow) and fast <= slow:
            what = f"beta_fast {fast:g} is not above beta_slow {slow:g}: the ramp runs backwards"
            yield Finding("error", view.where, what, "YaRN uses 32 and 1", "bad-ramp")


def _original(facts: _Facts) -> Iterator[Finding]:
    """Without the original length transformers takes max_position_embeddings, which is the enlarged one already."""
    for view in facts.views:
        kind, original = _kind(facts, view), original_length(facts.raw, view.parameters)
        where = f"{view.where}.original_max_position_embeddings"
        inside, outside = (part.get("original_max_position_embeddings") for part in (view.parameters, facts.raw))
        if view.layer_type is None and None not in (inside, outside) and inside != outside:
            what = f"the original length is {_shown(outside)} at the top level, which transformers takes, and "
            what += f"{_shown(inside)} here"
            yield Finding("error", where, what, "keep one value in both places", "original-conflict")
        if original is None and kind in _NEEDS_ORIGINAL:
            what = f"`{kind}` without the original length: max_position_embeddings is taken for it, wrong frequencies"
            yield Finding("error", where, what, "write the window before the extension", "original-missing")
        elif original is None and kind in ("linear", "dynamic"):
            what = f"`{kind}` without the original length: nobody can tell whether the window is enlarged already"
            yield Finding("warning", where, what, "write it at the top level of config.json", "original-unknown")


def _window(facts: _Facts) -> Iterator[Finding]:
    window, where = facts.window, "max_position_embeddings"
    if window is None and not facts.views:
        return
    if not is_whole(window) or window < 1:
        what = f"{_shown(window)} is not a whole number of tokens: engines refuse it or round it differently"
        yield Finding("error", where, what, "write an integer", "window-not-int")
        return
    for view in facts.views:
        kind, factor = _kind(facts, view), view.parameters.get("factor")
        original = original_length(facts.raw, view.parameters)
        if original is None or not is_number(factor) or kind not in ("yarn", "longrope", "llama3", "linear"):
            continue
        if view.layer_type == "sliding_attention" or abs(factor * original - window) < 1:
            continue
        if kind == "llama3" and original != window:
            continue  # where its ramp lies, not what the window grew from: Llama 3.1 has 8 x 8192 beside 131072
        # vLLM derives yarn's window as original x factor; a claim above that was never scaled for.
        severity: Literal["error", "warning"] = "error" if window > factor * original and kind == "yarn" else "warning"
        what = f"the window {window} is not factor x original = {factor:g} x {original} = {factor * original:g}"
        if original == window and factor > 1:
            what += "; if the window is the enlarged one, the original length is lost and the frequencies are wrong"
        fix = "write the original length" if kind == "llama3" else "make the three agree"
        yield Finding(severity, where, what, fix, "window-mismatch")


def _dependent(facts: _Facts) -> Iterator[Finding]:
    for view in facts.views:
        kind, got = _kind(facts, view), view.parameters
        if kind == "dynamic" or (kind == "longrope" and got.get(_LISTS[0]) != got.get(_LISTS[1])):
            what = f"`{kind}` changes the encoding of a prefix with the total length: cached keys go stale"
            fix = "measure each length by itself; for a fixed encoding use yarn, llama3 or ntk"
            yield Finding("warning", view.where, what, fix, "length-dependent")


def _engines(facts: _Facts) -> Iterator[Finding]:
    """Where vLLM or llama.cpp would compute something else from the same file."""
    for one in differences(facts.raw):
        yield Finding("warning", one.where, one.text, one.fix, f"engine-{one.what}")


def _layers(facts: _Facts) -> Iterator[Finding]:
    nested = [view for view in facts.views if view.layer_type is not None]
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


def _lists(facts: _Facts) -> Iterator[Finding]:
    for view in facts.views:
        pairs = rotary_dim(facts.raw, view.parameters) // 2
        if _kind(facts, view) != "longrope" or not pairs:
            continue
        for key in _LISTS:
            values, where = view.parameters.get(key), f"{view.where}.{key}"
            if values is None:
                continue
            if not isinstance(values, list) or not all(is_number(value) and value > 0 for value in values):
                yield Finding("error", where, "not a list of positive numbers", f"write {pairs} numbers", "bad-list")
            elif len(values) != pairs:
                what = f"{len(values)} values for {pairs} rotary pairs"
                yield Finding("error", where, what, f"write {pairs} numbers", "list-length")


def _tokenizer(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Finding]:
    _, text = text_part(raw)
    window, limit = text.get("max_position_embeddings"), settings.get("model_max_length")
    if is_whole(window) and is_number(limit) and limit < window:
        what = f"the tokenizer cuts or warns at {limit} tokens; the model claims {window}"
        fix = f'write "model_max_length": {window}'
        yield Finding("warning", "tokenizer_config.json: model_max_length", what, fix, "tokenizer-limit")


def _generation(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Finding]:
    """A limit equal to the original window was left behind by an extension; any other may be meant."""
    _, text = text_part(raw)
    window, limit = text.get("max_position_embeddings"), settings.get("max_length")
    originals = [original_length(text, view.parameters) for view in views(text)]
    if is_whole(window) and is_number(limit) and limit < window and limit in originals:
        what = f"generation stops at the {limit} tokens of the original window; the model claims {window}"
        fix = f'write "max_length": {window}'
        yield Finding("warning", "generation_config.json: max_length", what, fix, "generation-limit")


def _shown(value: object) -> str:
    """A number as people write it; whatever else stands there as it is."""
    return f"{value:g}" if is_number(value) else shown(repr(value), 60)


def _kind(facts: _Facts, view: RopeView) -> str:
    """The rope type as transformers maps it: an older name, and that of vision models in their text part."""
    kind = view.rope_type
    if kind == "mrope" and facts.raw.get("model_type") in KNOWN:
        return kind
    return _ALIASES.get(kind, kind)


_RULES: tuple[Callable[[_Facts], Iterable[Finding]], ...] = (
    _shape,
    _theta,
    _partial,
    _absent,
    _names_agree,
    _types,
    _keys,
    _original,
    _window,
    _dependent,
    _engines,
    _layers,
    _lists,
)
