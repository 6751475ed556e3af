"""Every value at the edge of what the recipe language accepts, found in its own JSON schema, and what becomes of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.errors import GateError, UserError
from retrofit.recipe.load import validate
from retrofit.recipe.schema import Recipe
from retrofit.workflow.opening import open_context
from retrofit.workflow.run import run

SCHEMA: Mapping[str, Any] = Recipe.model_json_schema()

LONG = (
    "evaluate.continuation_tokens",
    "evaluate.decode_tokens",
    "evaluate.needle.depths",
    "evaluate.needle.samples",
    "evaluate.ruler.samples",
    "recover.evals",
)
"""Whose largest value is honest work of many minutes: it is checked, and not done."""

MEASURED = ("is not a finite number", "not finite", "requirements are not met", "does not reproduce")
"""What a run may end with after work: a number that only the work could show."""


@dataclass(frozen=True)
class Extreme:
    """One value of one key."""

    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def extremes(node: Mapping[str, Any] = SCHEMA, key: str = "") -> Iterator[Extreme]:
    """The edges of every number, and every choice, of the recipe language."""
    node = _resolved(node)
    for name, inner in node.get("properties", {}).items():
        yield from extremes(inner, f"{key}.{name}" if key else name)
    if "anyOf" in node:
        bounds = {name: bound for name, bound in node.items() if name.endswith(("inimum", "aximum"))}
        for one in node["anyOf"]:
            yield from extremes({**bounds, **one}, key)
    elif "enum" in node:
        yield from (Extreme(key, value) for value in node["enum"])
    elif node.get("type") == "boolean":
        yield from (Extreme(key, value) for value in (False, True))
    elif node.get("type") in ("integer", "number"):
        yield from (Extreme(key, value) for value in _edges(node))
    elif node.get("type") == "array" and not key.endswith("text"):
        items = _resolved(node["items"])
        if "properties" not in items:
            yield from (Extreme(key, [one.value]) for one in extremes(items, key))


def _edges(node: Mapping[str, Any]) -> Iterator[float]:
    whole = node["type"] == "integer"
    least = node["minimum"] if "minimum" in node else node["exclusiveMinimum"]
    most = node["maximum"] if "maximum" in node else math.nextafter(node["exclusiveMaximum"], 0)
    yield int(least) if whole else float(least)
    yield int(most) if whole else float(most)


def _resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def base(key: str, model: Path, texts: Path) -> dict[str, Any]:
    """The smallest recipe that reads `key`."""
    train, held = [str(texts / "train")], [str(texts / "held.txt")]
    adapter = {"rank": 2, "alpha": 4}
    sections: dict[str, Any] = {
        "convert": {
            "kv_heads": 1,
            "calibration": {"text": train, "tokens": 256, "sequence_length": 64, "averaged_tokens": 64},
        },
        "context": {"length": 1024},
        "recover": {
            "tokens": 128,
            "sequence_length": 64,
            "text": train,
            "evals": 1,
            "eval_tokens": 64,
            "checkpoints": 1,
            "adapter": adapter,
        },
        "evaluate": {
            "lengths": [64],
            "text": held,
            "documents": 1,
            "tail": 32,
            "chunk": 64,
            "cost_lengths": [],
            "resamples": 100,
        },
        "publish": {"license": "mit", "base_model": "a/b"},
    }
    needed = {"publish": ("evaluate", "publish")}.get(section := key.partition(".")[0], (section,))
    if section not in sections:
        needed = ("convert", "recover", "evaluate")
    values = {name: sections[name] if name in needed else None for name in sections}
    values = {"name": "x", "model": str(model), **copy.deepcopy(values)}
    if key == "recover.pose_chunks" or key == "recover.short_share":
        values["recover"]["positions"] = "pose"
    if key.startswith("evaluate.needle"):
        values["evaluate"]["needle"] = {"lengths": [128], "depths": 1}
    if key.startswith("evaluate.ruler"):
        values["evaluate"]["ruler"] = {"lengths": [512], "tasks": ["niah_single"]}
    if key in ("evaluate.decode_tokens", "evaluate.cost_lengths"):
        values["evaluate"] |= {"cost_lengths": [32], "decode_tokens": 2}
    if key.startswith("context."):
        _encode(values["context"], key.partition(".")[2], train)
    return values


def _encode(context: dict[str, Any], key: str, train: list[str]) -> None:
    """The method that reads `key`."""
    if key == "factor":
        del context["length"]
    if key in ("low_freq_factor", "high_freq_factor"):
        context["method"] = "llama3"
    if key in ("short_factor", "long_factor"):
        context |= {"method": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    if key.startswith("search"):
        context |= {"method": "search", "search": {"text": train}}


def put(values: dict[str, Any], one: Extreme) -> dict[str, Any]:
    """The values with one of them at its edge."""
    *above, name = one.key.split(".")
    target = values
    for part in above:
        target = target.setdefault(part, {})
    target[name] = one.value * 8 if name.endswith("_factor") and isinstance(one.value, list) else one.value
    return values


def outcome(one: Extreme, model: Path, texts: Path, out: Path, *, work: bool = True) -> str:
    """ "refused" at the start, "done", "measured" or, without `work`, "accepted"; anything else is raised."""
    try:
        recipe = validate(put(base(one.key, model, texts), one), Recipe, "extreme")
        open_context(recipe, out=out, dry=True)
    except UserError as error:
        assert str(error).count("fix:") == 1, str(error)
        assert not out.exists()
        return "refused"
    if not work or (one.key in LONG and one.value != min(e.value for e in extremes() if e.key == one.key)):
        return "accepted"
    try:
        run(open_context(recipe, out=out), out)
    except UserError as error:
        measured = isinstance(error, GateError) or any(text in error.what for text in MEASURED)
        assert measured, f"accepted by the dry run, refused by the run: {error}"
        return "measured"
    return "done"
