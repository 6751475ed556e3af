"""Which engines compute what transformers computes from a configuration: what was run, by engine and version.

Reads the table that `python -m evals.engines` writes (`evals/results/engines.json`, in the wheel as well): tiny models
of every family with every position method, scored in each engine. Nothing here is concluded from an engine's sources;
what is not in the table was not tried.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retrofit import bundled
from retrofit.checkpoint.config import is_number, is_whole
from retrofit.context import frequencies as spectra
from retrofit.context.fields import RopeView, as_dict, original_length, text_part, views
from retrofit.context.learned import has_table
from retrofit.context.longrope import written_as_longrope

Verdict = Literal["same", "differs", "error", "proves nothing", "not tried"]
HEADS = "heads"
"""The method of a window that nothing has lengthened."""
TWO_LISTS = "longrope, two lists"
WRITTEN = "yarn, written attention factor"
EXPERTS = "heads, norm_topk_prob turned round"
"""The row of experts whose weights are normalised where the family's usually are not, or the other way round."""
NORMALISED = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
"""`norm_topk_prob` of the checkpoints that the other rows are of, as the published ones of a family have it. All their
classes take false where a file does not say."""
ALWAYS_WINDOWED = ("gemma2", "gemma3_text", "granite_swa", "granitemoe_swa", "ministral")
_WORSE: tuple[Verdict, ...] = ("same", "not tried", "proves nothing", "differs", "error")
SERVED = ("vllm", "llama.cpp")
"""Engines that a search for portable encodings asks."""


@dataclass(frozen=True)
class Subject:
    """What the table knows a configuration by. family: model_type; window: sliding layers that the family may lack;
    experts: their weights are normalised otherwise than the family's usually are."""

    family: str
    method: str
    window: bool
    experts: bool = False


@dataclass(frozen=True)
class Tried:
    """What one release of an engine gave for a subject.

    difference: the largest of a log-probability from transformers', in nats; control: the same of a model whose scaling
    (or base, or window) is ignored; None where nothing was computed. message: the engine's own words, which control it
    computes instead, or how it has to be started.
    """

    engine: str
    version: str
    verdict: Verdict
    difference: float | None = None
    control: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Difference:
    """An engine computes something else than transformers, without an error. fix: what it does compute."""

    engine: str
    text: str
    fix: str


def tried(config: object) -> tuple[Tried, ...]:
    """What each engine of the table gave for models like this one, in the table's order; () where it has no subject."""
    subject = subject_of(config)
    return () if subject is None else tuple(_look_up(*release, subject) for release in releases())


def differences(config: object) -> tuple[Difference, ...]:
    """Every engine that computes something else from such an encoding of a longer window, or from such experts, without
    saying so."""
    subject = subject_of(config)
    if subject is None:
        return ()
    asked = [method for method in _methods(subject) if method != HEADS]
    found = [(_row(*release, subject, method), method) for release in releases() for method in asked]
    return tuple(
        Difference(one.engine, _text(one, subject, method), _fix(one, subject, method))
        for one, method in found
        if one.verdict == "differs"
    )


def unread(config: object) -> set[str]:
    """Those of `SERVED` that do not compute such a configuration, or refuse it."""
    return {one.engine for one in tried(config) if one.engine in SERVED and one.verdict in ("differs", "error")}


def of_environment(config: object, environment: str) -> Tried | None:
    """What the engine in an environment of this name gave for models like this one; None for names and models that the
    table does not have."""
    subject, release = subject_of(config), _release(environment)
    return None if subject is None or release is None else _look_up(*release, subject)


def does_not_know(config: object, environment: str) -> str | None:
    """The words with which the engine of an environment refused every model of this family, by the family's name; None
    where it loaded one, or refused something else about it."""
    subject, release = subject_of(config), _release(environment)
    if subject is None or release is None:
        return None
    found = [row for key, row in _rows().items() if key[:3] == (*release, subject.family)]
    name = _letters(subject.family)
    if not found or not all(row["verdict"] == "error" and name in _letters(row["message"]) for row in found):
        return None
    return str(found[0]["message"])


def _letters(text: str) -> str:
    """For names that are written `granite_swa` in one place and `GraniteSWA` in another."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _release(environment: str) -> tuple[str, str] | None:
    rows = table()["rows"]
    return next(((row["engine"], row["version"]) for row in rows if row["environment"] == environment), None)


def releases() -> tuple[tuple[str, str], ...]:
    """(engine, version) of everything that was tried."""
    return tuple(dict.fromkeys((row["engine"], row["version"]) for row in table()["rows"]))


@functools.cache
def table() -> dict[str, Any]:
    """The table as it was written."""
    return dict(json.loads((bundled.folder("results") / "engines.json").read_text(encoding="utf-8")))


def subject_of(config: object) -> Subject | None:
    """What the table knows a configuration by; None where it has no positions that this program knows."""
    _, text = text_part(as_dict(config))
    family = text.get("model_type")
    if not isinstance(family, str) or not (views(text) or has_table(text)):
        return None
    slides = bool(text.get("sliding_window")) and text.get("use_sliding_window", True) is not False
    normalises = text.get("norm_topk_prob") is True
    experts = NORMALISED.get(family, normalises) != normalises
    return Subject(family, _method(text), slides and family not in ALWAYS_WINDOWED, experts)


def _method(text: Mapping[str, Any]) -> str:
    """The method whose row says how a configuration is read."""
    full = next((view for view in views(text) if view.layer_type in (None, "full_attention")), None)
    if full is None:
        return HEADS
    got, known, window = full.parameters, original_length(text, full.parameters), text.get("max_position_embeddings")
    if full.rope_type == "default":
        return "ntk" if is_whole(known) and is_whole(window) and known < window else HEADS
    if full.rope_type == "yarn":
        return WRITTEN if _writes_factor(text, full) else "yarn"
    if full.rope_type != "longrope":
        return full.rope_type
    # What the queries hold changes no reader's encoding: the lists alone say which method was run.
    folded = written_as_longrope(text, full, known, held=math.nan) if known is not None else None
    if folded is not None:
        return folded[0]
    return "longrope" if got.get("short_factor") == got.get("long_factor") else TWO_LISTS


def _writes_factor(text: Mapping[str, Any], view: RopeView) -> bool:
    """Whether yarn's attention factor stands there and is another than the formula's own."""
    got, factor = view.parameters, view.parameters.get("factor")
    if got.get("mscale") is not None or got.get("mscale_all_dim") is not None:
        return True
    written = got.get("attention_factor")
    if not is_number(written) or not is_number(factor) or factor <= 0:
        return written is not None
    return not math.isclose(written, spectra.yarn_attention_factor(float(factor)), rel_tol=1e-3)


@functools.cache
def _rows() -> dict[tuple[str, str, str, str, bool], dict[str, Any]]:
    return {
        (row["engine"], row["version"], row["family"], row["method"], row["window"]): row
        for row in table()["rows"]
        if row["source"] is None
    }


def _look_up(engine: str, version: str, subject: Subject) -> Tried:
    """The worst of the rows that are about a subject; not tried where one of them is missing."""
    found = [_row(engine, version, subject, method) for method in _methods(subject)]
    return max(found, key=lambda one: _WORSE.index(one.verdict))


def _methods(subject: Subject) -> tuple[str, ...]:
    """Of the rows that are about a subject."""
    return (subject.method, *([EXPERTS] if subject.experts else []))


def _row(engine: str, version: str, subject: Subject, method: str) -> Tried:
    row = _rows().get((engine, version, subject.family, method, subject.window and method != EXPERTS))
    if row is None:
        return Tried(engine, version, "not tried")
    return Tried(engine, version, row["verdict"], row["difference"], row["control"], row["message"])


def _text(one: Tried, subject: Subject, method: str) -> str:
    message = f" ({one.message})" if one.message else ""
    what = f"norm_topk_prob {str(not NORMALISED[subject.family]).lower()}" if method == EXPERTS else method
    return (
        f"{one.engine} {one.version} computes something else{message}: on a tiny {subject.family} with {what} a "
        f"log-probability is {one.difference:.2g} nats away from transformers'"
    )


def _fix(one: Tried, subject: Subject, method: str) -> str:
    methods = dict.fromkeys(row[3] for row in _rows() if row[2] == subject.family and row[4] == subject.window)
    longer = [
        other
        for other in methods
        if other not in (HEADS, EXPERTS) and _row(one.engine, one.version, subject, other).verdict == "same"
    ]
    if method == EXPERTS or not longer:
        return "serve it with another engine"
    return f"for {one.engine} use {', '.join(longer)}"
