"""The matrix as Markdown: a row a checkpoint, a column an engine, and every engine's own words below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evals.engines.cases import LENGTH, ORIGINAL
from retrofit.escape import code_span, markdown

COMMAND = "OMP_NUM_THREADS=1 python -m evals.engines"
ABOUT = """\
Tiny random models of every family ({original} positions, lengthened to {length}; half of the KV heads; a base of
50,000), each scored by each engine in a process of its own. The largest difference of a log-probability from
transformers {reference}, in nats, over positions in all of the window, its first and last among them (of the 20 most
probable tokens for vLLM and llama.cpp, of the whole vocabulary elsewhere). In brackets the control: how far a model is
whose scaling is ignored, or its base where there is no scaling, or its sliding windows. **Bold** differs; `?` is no
twentieth of its control, and proves nothing; `*` has a note below; what says `not tried` was not run.
CTranslate2 is given an unknown token where a tokenizer has none, without which some of its loaders fail."""


def render(table: Mapping[str, Any]) -> str:
    """The page."""
    rows: Sequence[Mapping[str, Any]] = table["rows"]
    releases = list(dict.fromkeys((row["engine"], row["version"]) for row in rows))
    by_case: dict[tuple[Any, ...], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        place = (row["family"], row["method"], row["window"], row["source"])
        by_case.setdefault(place, {})[row["engine"], row["version"]] = row
    lines = [
        "# Engines",
        "",
        f"`{COMMAND}` (`make engines`)",
        "",
        *ABOUT.format(original=ORIGINAL, length=LENGTH, reference=table["reference"]).splitlines(),
        "",
        f"| checkpoint | {' | '.join(f'{engine} {version}' for engine, version in releases)} |",
        f"| --- |{' --- |' * len(releases)}",
    ]
    for case, found in by_case.items():
        cells = [_cell(found.get(release)) for release in releases]
        lines.append(f"| {_name(*case)} | {' | '.join(cells)} |")
    lines += ["", *_counts(rows, releases), "", "## In the engines' own words", "", *_messages(rows), ""]
    return "\n".join(lines)


def _name(family: str, method: str, window: bool, source: str | None) -> str:
    more = [*(["sliding windows"] if window else []), *([f"from {source}"] if source else [])]
    return f"{family} ({', '.join(more)}), {method}" if more else f"{family}, {method}"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not tried"
    if row["verdict"] == "error":
        return "**error**"
    far = f"{number(row['difference'])} ({number(row['control'])})"
    if row["verdict"] == "same":
        return f"{far} *" if row["message"] else far
    if row["verdict"] == "differs":
        return f"**{' '.join([far, row['message']]).strip()}**"
    return f"{far} ?"


def number(value: float) -> str:
    """A difference to one digit, or two where it is large."""
    return f"{value:.2g}" if value >= 0.095 else f"{value:.0e}".replace("e-0", "e-") if value else "0"


def _counts(rows: Sequence[Mapping[str, Any]], releases: Sequence[tuple[str, str]]) -> list[str]:
    lines = ["| engine | same | differs | error | proves nothing |", "| --- | ---: | ---: | ---: | ---: |"]
    for engine, version in releases:
        mine = [row["verdict"] for row in rows if (row["engine"], row["version"]) == (engine, version)]
        counts = [str(mine.count(verdict)) for verdict in ("same", "differs", "error", "proves nothing")]
        lines.append(f"| {engine} {version} | {' | '.join(counts)} |")
    return lines


def _messages(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each message once, with the checkpoints it was given for; `*` in the table where the result is the same."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["message"]:
            name = _name(row["family"], row["method"], row["window"], row["source"])
            found.setdefault((row["engine"], row["version"], row["message"]), []).append(name)
    return [
        f"- {engine} {version}: {code_span(message)} ({markdown('; '.join(names))})"
        for (engine, version, message), names in found.items()
    ]
