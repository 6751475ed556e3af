"""The head benchmark's result for people: table, chart, and who pays, by token and by layer."""

from __future__ import annotations

import math
from typing import Any

from evals.benchmarks.heads_text import UNREAD
from retrofit.console import to_json


def chart(record: dict[str, Any]) -> str:
    """Perplexity on the table's text against seconds of compute."""
    from retrofit.report.charts.drawing import Line
    from retrofit.report.charts.plots import perplexity_by_seconds

    kind = next(iter(record["original"]))
    points = {
        name: (max(row["seconds"], 1.0), row["by_kind"][kind]["perplexity"]) for name, row in record["rows"].items()
    }
    families = {
        "merge alone": ["first", "mean", "procrustes", "real-pca", "calibrated"],
        "calibrated": [n for n in points if n.startswith(("calibrated", "+")) and "other" not in n],
        "on other text": [n for n in points if "other" in n],
        "mean + LoRA": [n for n in points if n.startswith("mean")],
    }
    lines = []
    for label, names in families.items():
        found = sorted((points[name] for name in names if name in points), key=lambda point: point[0])
        if found:
            lines.append(Line(label, [x for x, _ in found], [y for _, y in found]))
    level = record["original"][kind]["perplexity"]
    apart = ("merge alone", "on other text")
    return perplexity_by_seconds("kv-heads", lines, original=level, apart=apart, alone=True).svg


def table(record: dict[str, Any], model: str, pieces: str) -> str:
    """The result as Markdown. model: its name; pieces: of each text, what is scored."""
    kinds = list(record["original"])
    machines = {
        to_json(where): where for where in (row.get("machine", record["machine"]) for row in record["rows"].values())
    }
    where = " and of ".join(
        f"{one['cpu']}, torch {one['torch']}, transformers {one['transformers']}" for one in machines.values()
    )
    lines = [
        "# Converting KV heads: every method, each repair, and a short distillation",
        "",
        f"`{record['command']}`, one thread of {where}.",
        "",
        f"{model}, converted to 1 KV head in every layer; perplexity on {pieces} of each text, and in brackets its "
        "ratio to the original's. No fit has seen any of it but the last column, which all rows but those of other "
        f"text are calibrated on: {record['tokens']:,} tokens. "
        + _unread(kinds)
        + "Seconds are of one core's time, and of all steps that lead to the row.",
        "",
        f"| conversion | seconds | {' | '.join(kinds)} |",
        f"|---|---:|{'---:|' * len(kinds)}",
        "| original | | " + " | ".join(f"{record['original'][kind]['perplexity']:.1f}" for kind in kinds) + " |",
    ]
    for name, row in _ranked(record, kinds[0]):
        cells = [_cell(row["by_kind"].get(kind)) for kind in kinds]
        mark = "\\*" if row.get("bfloat16") else ""
        lines.append(f"| {name}{mark} | {row['seconds']:,.0f} | {' | '.join(cells)} |")
    if any(row.get("bfloat16") for row in record["rows"].values()):
        lines += [
            "",
            "\\* on a processor with bfloat16 products, in which the calibration and the training then multiply.",
        ]
    lines += ["", "![Perplexity against seconds of compute](kv_heads.svg)", "", *_per_token(record, kinds[0])]
    return "\n".join([*lines, *_per_layer(record), ""])


def _ranked(record: dict[str, Any], kind: str) -> list[tuple[str, Any]]:
    """(name, row), the worst first."""
    return sorted(record["rows"].items(), key=lambda item: -item[1]["by_kind"][kind]["ratio"])


def _unread(kinds: list[str]) -> str:
    if UNREAD not in kinds:
        return ""
    return (
        f"`{UNREAD}` are of books that calibration and training have read other pages of (scored for the rows whose "
        "checkpoint is at hand). "
    )


def _cell(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{_short(found['perplexity'])} ({_short(found['ratio'])})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _per_token(record: dict[str, Any], kind: str) -> list[str]:
    """Who pays: how the added loss is spread over tokens."""
    lines = [
        f"Loss added to each token of {kind} (nats): the median, the share of tokens that got worse, and the share of "
        "all added loss that the dearest tenth of the tokens carries.",
        "",
        "| conversion | mean | median | worse | dearest tenth |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in _ranked(record, kind):
        f = row["by_kind"][kind]
        lines.append(
            f"| {name} | {math.log(f['ratio']):.2f} | {f['median_added']:.2f} | {f['worse']:.0%} "
            f"| {f['share_of_dearest_tenth']:.0%} |"
        )
    return [*lines, ""]


def _per_layer(record: dict[str, Any]) -> list[str]:
    """Where it is lost: each layer of the row with the most repairs."""
    repaired = [row for row in record["rows"].values() if any(layer["repairs"] for layer in row.get("layers", ()))]
    if not repaired:
        return []
    row = max(repaired, key=lambda row: len(row["layers"][0]["repairs"]))
    names = [repair["name"] for repair in row["layers"][0]["repairs"]]
    lines = [
        "Layer by layer: share of the keys' and of the values' energy that the merge gives up, and the error of the "
        "attention output on text left out, as a share of its target's energy, before and after each repair (the "
        "target includes what the layers before got wrong, most of which no attention can undo).",
        "",
        f"| layer | keys | values | {' | '.join(names)} |",
        f"|---:|---:|---:|{'---:|' * len(names)}",
    ]
    for index, layer in enumerate(row["layers"]):
        cells = [
            f"{r['held_out_before']:.3f} -> {r['held_out_after']:.3f}" if r["accepted"] else "kept out"
            for r in layer["repairs"]
        ]
        lines.append(f"| {index} | {layer['keys']:.1%} | {layer['values']:.1%} | {' | '.join(cells)} |")
    return lines
