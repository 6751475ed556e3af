"""The windows benchmark's result for people: table and chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from evals.benchmarks.windows_parts import FAR
from retrofit import format as fmt

LEAST = 1e-3
"""Nats: what the chart shows of a loss that is smaller."""


def chart(record: Mapping[str, Any]) -> str:
    """Loss beyond the original's on novels against bytes of the KV cache at 32,768 tokens."""
    from retrofit.report.charts.drawing import Line
    from retrofit.report.charts.plots import loss_by_kv_cache

    lines: dict[str, list[tuple[float, float]]] = {}
    for _, row in _near(record):
        point = (_far(row), math.log(row["novels"]["ratio"]))
        lines.setdefault(row["kind"], []).append(point)
    drawn = [Line(kind, *zip(*points, strict=True)) for kind, points in lines.items()]
    return loss_by_kv_cache("windows", drawn, least=LEAST, alone=True).svg


def table(record: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    where, rows = record["machine"], dict(_near(record))
    original = rows["original"]
    novels, copies, asked = original["novels"], original["passages"], original["common_knowledge"]
    lines = [
        "# Sliding windows beside fewer heads and smaller caches",
        "",
        f"`{record['command']}`, one thread of {where['cpu']}, torch {where['torch']}, "
        f"transformers {where['transformers']}.",
        "",
        "SmolLM2-135M-Instruct (30 layers, 3 KV heads, 8,192 positions). KV cache: bytes of one sequence, and how many "
        "times smaller than the original's 16-bit cache. Novels: perplexity over the original's on "
        f"{novels['tokens']:,} tokens of novels that nothing here has read, 8,192 of each in one piece, and its paired "
        f"95% interval. Passages: what the loss of a passage rises by when it comes again out of every window's sight, "
        f"nats per token, {copies['tokens']:,} tokens (the original: {copies['loss']:.2f}). Needles: those found of "
        f"{original['needles']['of']} in one text of 4,096 tokens, and the loss of their answers. Short prompts: share "
        f"of {asked['questions']} questions of common knowledge, the questions lost and gained against the original, "
        "and McNemar's exact p. Windows, sinks, heads and trainings read documentation, code, the model's own samples "
        "and synthetic text.",
        "",
        "| | KV at 8k | KV at 32k | novels | passages | needles | short prompts |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for _, row in rows.items():
        cache = [f"{fmt.nbytes(found)}{_smaller(found, original, n)}" for n, found in row["kv_cache_bytes"].items()]
        needles = f"{row['needles']['found']}, {row['needles']['loss']:.2f}"
        cells = [*cache, _ratio(row["novels"]), f"{row['passages']['rise']:+.3f}", needles, _short(row)]
        lines.append(f"| {row['words']} | {' | '.join(cells)} |")
    lines += ["", "![Loss against bytes of the KV cache](windows.svg)", "", *_extended(record)]
    return "\n".join([*lines, *_seconds(record), ""])


def _near(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rows at the model's own positions, the largest cache first."""
    rows = [(name, row) for name, row in record["rows"].items() if not name.endswith(FAR)]
    return iter(sorted(rows, key=lambda item: -_far(item[1])))


def _far(row: Mapping[str, Any]) -> int:
    """Bytes of the KV cache at the longer length."""
    return list(row["kv_cache_bytes"].values())[-1]


def _smaller(found: int, original: Mapping[str, Any], tokens: str) -> str:
    times = original["kv_cache_bytes"][tokens] / found
    return f" (÷{times:.3g})" if times != 1 else ""


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _short(row: Mapping[str, Any]) -> str:
    asked = row["common_knowledge"]
    same = asked["lost"] == asked["gained"] == 0
    changed = "" if same else f" (-{asked['lost']} +{asked['gained']}, p {asked['p']:.2g})"
    return f"{asked['after']:.3f}{changed}"


def _extended(record: Mapping[str, Any]) -> list[str]:
    rows = {name: row for name, row in record["rows"].items() if name.endswith(FAR)}
    if not rows:
        return []
    lines = [
        "## At 32,768 positions",
        "",
        "Each extended by a larger base of the position encoding (`ntk`), which with windows is that of full layers "
        "alone; no training. Perplexity over that of the extended original, on the beginnings of "
        f"{next(iter(rows.values()))['novels']['32768']['tokens']:,} tokens of novels.",
        "",
        "| | first 8,192 tokens | 32,768 tokens |",
        "|---|---:|---:|",
    ]
    for row in rows.values():
        lines.append(f"| {row['words']} | {' | '.join(_ratio(one) for one in row['novels'].values())} |")
    return [*lines, ""]


def _seconds(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Time",
        "",
        "Processor seconds of one core: of what a row's checkpoint needs beyond those of the rows above that were made "
        "before, and of measuring it.",
        "",
        "| | made | measured |",
        "|---|---:|---:|",
    ]
    for name, row in record["rows"].items():
        where = " at 32,768 positions" if name.endswith(FAR) else ""
        spent = row["cpu_seconds"]
        lines.append(f"| {row['words']}{where} | {spent['made']:,.0f} | {spent['measured']:,.0f} |")
    return lines
