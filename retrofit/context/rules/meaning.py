"""Rules about what rotary parameters mean: which base, which original length, which window, and to which engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from retrofit.checkpoint.config import is_number, is_whole
from retrofit.context.engines import differences
from retrofit.context.fields import LAYER_THETAS, is_nested, left_to_the_class, original_length
from retrofit.context.rules.facts import LISTS, Facts, Finding, kind_of, quoted

_NEEDS_ORIGINAL = ("yarn", "longrope", "llama3")


def _theta(facts: Facts) -> Iterator[Finding]:
    """transformers fills a class default in for a missing theta. Of a file older than the field, that is the base it
    was trained with; where theta was lost, perplexity explodes without a message."""
    for view in facts.views:
        if view.parameters.get("rope_theta") is not None:
            continue
        default, fix = facts.thetas.get(view.layer_type), "write rope_theta into rope_parameters"
        if default is not None and left_to_the_class(view):
            what = f"rope_theta is missing: {quoted(default)} is used, the default of the model's class in transformers"
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
            f"rope_theta is {quoted(outside)} here and {quoted(main['rope_theta'])} in {name}: transformers 5 reads "
            "the latter, older readers this one"
        )
        yield Finding("error", "rope_theta", what, "keep one value in both places", "theta-conflict")


def _absent(facts: Facts) -> Iterator[Finding]:
    raw = facts.raw
    silent = not facts.views and not raw.get(LAYER_THETAS)
    if silent and "hidden_size" in raw and raw.get("max_position_embeddings") is not None:
        what = "the file says nothing about RoPE: theta is the class default of whatever reads it"
        fix = 'write "rope_parameters": {"rope_type": "default", "rope_theta": ...}'
        yield Finding("warning", "rope_parameters", what, fix, "theta-implicit")


def _original(facts: Facts) -> Iterator[Finding]:
    """Without the original length transformers takes max_position_embeddings, which is the enlarged one already."""
    for view in facts.views:
        kind, original = kind_of(facts, view), original_length(facts.raw, view.parameters)
        where = f"{view.where}.original_max_position_embeddings"
        inside, outside = (part.get("original_max_position_embeddings") for part in (view.parameters, facts.raw))
        if not view.nested and None not in (inside, outside) and inside != outside:
            what = f"the original length is {quoted(outside)} at the top level, which transformers takes, and "
            what += f"{quoted(inside)} here"
            yield Finding("error", where, what, "keep one value in both places", "original-conflict")
        if original is None and kind in _NEEDS_ORIGINAL:
            what = f"`{kind}` without the original length: max_position_embeddings is taken for it, wrong frequencies"
            yield Finding("error", where, what, "write the context length before the extension", "original-missing")
        elif original is None and kind in ("linear", "dynamic"):
            what = f"`{kind}` without the original length: nobody can tell whether the length is enlarged already"
            yield Finding("warning", where, what, "write it at the top level of config.json", "original-unknown")


def _window(facts: Facts) -> Iterator[Finding]:
    window, where = facts.window, "max_position_embeddings"
    if window is None and not facts.views:
        return
    if not is_whole(window) or window < 1:
        what = f"{quoted(window)} is not a whole number of tokens: engines refuse it or round it differently"
        yield Finding("error", where, what, "write an integer", "window-not-int")
        return
    for view in facts.views:
        kind, factor = kind_of(facts, view), view.parameters.get("factor")
        original = original_length(facts.raw, view.parameters)
        if original is None or not is_number(factor) or kind not in ("yarn", "longrope", "llama3", "linear"):
            continue
        if view.layer_type == "sliding_attention" or abs(factor * original - window) < 1:
            continue
        if kind == "llama3" and original != window:
            continue  # where its ramp lies, not what the window grew from: Llama 3.1 has 8 x 8192 beside 131072
        # vLLM derives yarn's window as original x factor; a claim above that was never scaled for.
        severity: Literal["error", "warning"] = "error" if window > factor * original and kind == "yarn" else "warning"
        what = f"the context length {window} is not factor x original = {factor:g} x {original} = {factor * original:g}"
        if original == window and factor > 1:
            what += "; if that is the enlarged one, the original length is lost and the frequencies are wrong"
        fix = "write the original length" if kind == "llama3" else "make the three agree"
        yield Finding(severity, where, what, fix, "window-mismatch")


def _dependent(facts: Facts) -> Iterator[Finding]:
    for view in facts.views:
        kind, got = kind_of(facts, view), view.parameters
        if kind == "dynamic" or (kind == "longrope" and got.get(LISTS[0]) != got.get(LISTS[1])):
            what = f"`{kind}` changes the encoding of a prefix with the total length: cached keys go stale"
            fix = "measure each length by itself; for a fixed encoding use yarn, llama3 or ntk"
            yield Finding("warning", view.where, what, fix, "length-dependent")


def _engines(facts: Facts) -> Iterator[Finding]:
    """Where an engine computes something else from the same file, and says nothing."""
    for one in differences(facts.raw):
        yield Finding("warning", "config.json", one.text, one.fix, "engine-differs")


RULES: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    _theta,
    _absent,
    _original,
    _window,
    _dependent,
    _engines,
)
