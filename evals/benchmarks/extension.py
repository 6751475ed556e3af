"""A window four times as long: the original, YaRN's defaults, the searched encoding, and that after a short training.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.extension --text BOOK.txt

Runs the bundled recipe `extend-4x` (or --recipe) on SmolLM2-135M and beside it the same recipe with plain YaRN, then
writes results/extension.json, .md and .svg: perplexity by length with 95% intervals, the needle grid, effective length,
every trial of the search, and seconds. --text adds documents to the recipe's own. What --work holds is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import retrofit
from evals.benchmarks.heads import model_name
from evals.benchmarks.recovery import machine
from retrofit.console import PlainProgress, to_json
from retrofit.errors import GateError, UserError
from retrofit.evaluation.files import losses_file
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.recipe.load import load_recipe
from retrofit.recipe.schema import Context, Recipe, TextSource
from retrofit.workflow.steps.evaluate import METRICS

RESULTS = Path(__file__).resolve().parents[1] / "results"
LABELS = {"original": "original", "yarn": "YaRN", "extended": "search", "recovered": "search + training"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--recipe", default="extend-4x", help="one that extends the window and trains")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="a document to measure on as well; repeatable"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/extension"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def main() -> None:
    """Run what is missing and write the results."""
    import sys

    parser = _parser()
    options = parser.parse_args()
    progress = PlainProgress(sys.stderr)
    options.work.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(options.recipe, options.overrides, model=options.model)
    assert recipe.model and recipe.evaluate
    text = (*recipe.evaluate.text, *(TextSource(source=file) for file in options.text))
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"text": text})})
    try:
        retrofit.run(recipe, out=options.work / "run", progress=progress)
    except GateError as error:  # what was measured is shown all the same
        print(error, flush=True)
    metrics = _metrics(options.work / "run")
    journal = (options.work / "run" / "journal.jsonl").read_text("utf-8").splitlines()
    lines = [line for line in map(json.loads, journal) if "step" in line]
    steps = {line["step"]: {"seconds": line["seconds"], "result": line["result"]} for line in lines}
    chosen = (steps["extend"]["result"].get("search") or {}).get("winner", {}).get("label")
    # What the search found may be YaRN's defaults themselves.
    yarn = metrics["models"]["extended"] if chosen == "yarn" else _yarn(recipe, options.work, progress)
    record = {
        "command": _command(options, parser),
        "machine": machine(),
        "model": model_name(recipe.model),
        "models": {"original": metrics["models"]["original"], "yarn": yarn, **metrics["models"]},
        "steps": steps,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "extension.json").write_text(to_json(record) + "\n", encoding="utf-8")
    (options.out / "extension.md").write_text(report(record), encoding="utf-8")
    (options.out / "extension.svg").write_text(chart(record), encoding="utf-8")
    print(report(record))


def _command(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What was typed, without places on this machine."""
    parts = [f"OMP_NUM_THREADS={torch.get_num_threads()} python -m evals.benchmarks.extension"]
    for name in ("model", "recipe"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            parts.append(f"--{name} {shlex.quote(value)}")
    parts += [f"--set {shlex.quote(one)}" for one in options.overrides]
    parts += [f"--text {shlex.quote(Path(file).name)}" for file in options.text]
    return " ".join(parts)


def _metrics(run: Path) -> dict[str, Any]:
    """What the evaluation of a run found."""
    found = json.loads(next(run.glob(f"*-evaluate/{METRICS}")).read_text(encoding="utf-8"))
    return {**found, "models": {model["label"]: model for model in found["models"]}}


def _yarn(recipe: Recipe, work: Path, progress: PlainProgress) -> dict[str, Any]:
    """What the recipe's evaluation finds of YaRN's defaults.

    Raises UserError when the recipe without its training and search measures other documents.
    """
    assert recipe.context
    context = Context(length=recipe.context.length, factor=recipe.context.factor, method="yarn")
    plain = recipe.model_copy(update={"context": context, "recover": None, "publish": None, "require": {}})
    out = work / "yarn-run"
    retrofit.run(plain, out=out, progress=progress)
    read = [TokenLosses.load(losses_file(run, "original")).meta["documents_sha256"] for run in (work / "run", out)]
    if read[0] != read[1]:  # of text that is trained on a part is held out, without a training all of it is measured
        raise UserError(
            "plain YaRN was measured on other documents than the recipe",
            where="evaluate.text",
            fix="measure on text that neither the search nor the training reads",
        )
    return dict(_metrics(out)["models"]["extended"])


def report(record: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    models = record["models"]
    names = [name for name in LABELS if name in models]
    rows = {name: {(row["kind"], row["length"]): row for row in models[name]["rows"]} for name in names}
    kinds = list(dict.fromkeys(kind for kind, _ in rows["original"]))
    lengths = sorted({tokens for _, tokens in rows["original"]})
    where, (native, length) = record["machine"], _windows(record)
    lines = [
        f"# A window {length / native:g} times as long",
        "",
        f"`{record['command']}`, threads as in the command, {where['cpu']}, torch {where['torch']}, "
        f"transformers {where['transformers']}.",
        "",
        f"{record['model']}, {native:,} to {length:,} positions. Perplexity of the first tokens of documents which "
        "neither the search nor the training has read, with 95% intervals; in brackets the ratio to the original at "
        "that length.",
        "",
    ]
    for kind in [kind for kind in kinds if kind != ALL or len(kinds) > 2]:  # one kind is all of them
        lines += [
            f"## {'All texts together' if kind == ALL else kind}",
            "",
            f"| tokens | {' | '.join(LABELS[name] for name in names)} |",
            f"|---:|{'---:|' * len(names)}",
        ]
        for tokens in lengths:
            cells = []
            for name in names:
                row, base = rows[name].get((kind, tokens)), rows["original"][kind, tokens]
                ratio = f" ({row['ppl'] / base['ppl']:.3f})" if row and name != "original" else ""
                cells.append(f"{row['ppl']:.2f} [{row['low']:.2f}, {row['high']:.2f}]{ratio}" if row else "")
            lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *_use(models, names), *_search(record), *_time(record)])


def _windows(record: Mapping[str, Any]) -> tuple[int, int]:
    """Positions before and after the extension."""
    found = record["steps"]["extend"]["result"]
    return found["before"], found["length"]


def _use(models: Mapping[str, Any], names: list[str]) -> list[str]:
    """Needle grid and effective length."""
    lines = ["## Whether the context is used"]
    certified = {name: models[name]["long_context"].get("effective") for name in names}
    if any(certified.values()):
        lines += ["", "| | effective length | stopped by |", "|---|---:|---|"]
    for name, one in certified.items():
        if one:
            lines.append(f"| {LABELS[name]} | {one['length']:,} | {one['stopped_by'] or ''} |")
    cells = {name: (models[name]["long_context"].get("needle") or {}).get("cells", []) for name in names}
    places = sorted({(cell["length"], cell["depth"]) for found in cells.values() for cell in found})
    if places:
        lines += [
            "",
            "Needle in a haystack, the facts of all depths in one text: whether the generated answer is the right one, "
            "and the right answer's loss in nats per token.",
            "",
            f"| tokens | depth | {' | '.join(LABELS[name] for name in names)} |",
            f"|---:|---:|{'---:|' * len(names)}",
        ]
    for length, depth in places:
        shown = []
        for name in names:
            found = [cell["answer"] for cell in cells[name] if (cell["length"], cell["depth"]) == (length, depth)]
            exact = sum(answer["starts"] for answer in found) / max(len(found), 1)
            loss = sum(answer["loss"] for answer in found) / max(len(found), 1)
            shown.append(f"{exact:.0%}, {loss:.2f}" if found else "")
        lines.append(f"| {length:,} | {depth:.2f} | {' | '.join(shown)} |")
    return [*lines, ""]


def _search(record: Mapping[str, Any]) -> list[str]:
    found = record["steps"]["extend"]["result"].get("search")
    if not found:
        return []
    lines = [
        "## The search",
        "",
        f"{len(found['trials'])} passes, a budget of {found['read']:,} tokens. Losses in nats a token: of those up to "
        f"the original window (before the extension {found['native']:.3f}), of the last ones, of the answers about "
        "hidden facts. The best eight of each rung, and YaRN's defaults:",
        "",
        "| rung | tokens | encoding | original window | last tokens | answers | objective |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for rung in sorted({trial["rung"] for trial in found["trials"]}):
        trials = sorted((t for t in found["trials"] if t["rung"] == rung), key=lambda trial: trial["objective"])
        for trial in [*trials[:8], *(t for t in trials[8:] if t["label"] == found["reference"]["label"])]:
            numbers = " | ".join(f"{trial[name]:.3f}" for name in ("native", "tail", "needle", "objective"))
            lines.append(f"| {rung} | {trial['tokens']:,} | {trial['label']} | {numbers} |")
    return [*lines, ""]


def _time(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Time",
        "",
        "Seconds since each step was last begun: what a stopped run had kept (trials of a search, training) is not in "
        "them.",
        "",
        "| step | seconds |",
        "|---|---:|",
    ]
    return [*lines, *(f"| {name} | {step['seconds']:,.0f} |" for name, step in record["steps"].items()), ""]


def chart(record: Mapping[str, Any]) -> str:
    """Perplexity against context length over all texts."""
    from retrofit.report.charts.plots import Line, perplexity_by_length

    lines = []
    for name, label in LABELS.items():
        found = [row for row in record["models"].get(name, {"rows": []})["rows"] if row["kind"] == ALL]
        found = found or [row for row in record["models"].get(name, {"rows": []})["rows"]]
        found = [row for row in found if math.isfinite(row["ppl"])]
        if found:
            spans = [(row["low"], row["high"]) for row in found]
            lines.append(Line(label, [row["length"] for row in found], [row["ppl"] for row in found], spans))
    native, length = _windows(record)
    return perplexity_by_length("extension", lines, native=native, claimed=length, alone=True).svg


if __name__ == "__main__":
    main()
