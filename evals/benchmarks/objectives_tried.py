"""Objectives and schedules that recovery does not have, tried on the rows of the variant `rows-256` of `objectives`.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.objectives_tried --books FOLDER --work FOLDER

A small loop of its own trains SmolLM2 with one KV head, on the same rows with the same adapters and rate; the first row
is that loop with the library's objective, and every other row is judged by it. Needs what `objectives` needs, and a
trial that --work has a result of is not run again. Writes results/objectives_tried.json and objectives_tried.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.benchmarks import objectives
from evals.benchmarks.objectives import CALIBRATION, KINDS, LENGTH, PIECES, RESULTS, result_file
from evals.benchmarks.objectives_loop import LAST, Trial

if TYPE_CHECKING:
    from retrofit.model.folder import ModelFolder

MODULE = "evals.benchmarks.objectives_tried"
QUESTIONS = "common_knowledge"
PARTS = (KINDS[0], "texts", "questions")  # novels judge a trial, so they come first
BETTER, AS_LONG = 0.97, 1.1
"""What pays: this times the perplexity on novels, with at most this times the seconds."""

TRIALS = {
    "control": Trial("the library's objective: forward KL, LoRA rank 64, rows of 256 tokens", averaged=True),
    "chance": Trial("the same with other adapters at the start", seed=1),
    "attention-third": Trial("attention outputs of all layers at once for a third of the steps, then logits", 1 / 3),
    "attention-half": Trial("the same for half of the steps", 1 / 2),
    "hidden-third": Trial("outputs of all layers for a third of the steps, then logits", 1 / 3, "hidden"),
    "top-64": Trial("the teacher's 64 highest logits, kept; all others as one", top=64),
    "top-64-alone": Trial("the same, the others ignored", top=64, rest=False),
    "constant": Trial("a rate that does not fall", falls=False, averaged=True),
    "full-attention": Trial("all weights of attention at a fifth of the rate, LoRA on the MLP alone", full=0.2),
}


def main() -> None:
    """Run the trials that have no result yet and write the table of all that have one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trials", default=",".join(TRIALS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help="one trial, `original` or `converted`, in this process")
    parser.add_argument("--part", choices=PARTS, default=PARTS[-1], help="with --child: what is measured")
    options = parser.parse_args()
    if options.child:
        measure(options, options.child)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = ["original", "converted", *options.trials.split(",")]
    for part, name in itertools.product(PARTS, wanted):
        found = results(options, name)
        if found and not any(lacks(row, part) for row in found.values()):
            continue
        command = [sys.executable, "-m", MODULE, "--child", name, "--part", part]
        command += ["--books", str(options.books), "--work", str(options.work)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    every = {name: results(options, name) for name in ("original", "converted", *TRIALS)}
    rows = {
        name: found for name, found in every.items() if found and not any(lacks(r, PARTS[0]) for r in found.values())
    }
    (options.out / "objectives_tried.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (options.out / "objectives_tried.md").write_text(table(rows), encoding="utf-8")


def results(options: argparse.Namespace, name: str) -> dict[str, dict[str, Any]]:
    """{ending: what is measured of it} of a trial; {} before its training."""
    file = result_file(options, name)
    return dict(json.loads(file.read_text("utf-8"))) if file.exists() else {}


def lacks(row: dict[str, Any], part: str) -> bool:
    """Whether a part of a result is not measured yet."""
    novels, texts, questions = PARTS
    losses = row.get("losses", {})
    return {novels: KINDS[0], texts: KINDS[1]}[part] not in losses if part != questions else QUESTIONS not in row


def measure(options: argparse.Namespace, name: str) -> None:
    """One part of a trial's result, after its training, where they are missing; written after each ending."""
    import torch

    from retrofit.model.folder import opened
    from retrofit.model.source import resolve

    torch.set_num_threads(1)
    file = result_file(options, name)
    original = opened(resolve(objectives.MODEL).folder)
    rows = results(options, name)
    if not rows:
        rows = trained(options.work, name, original) if name in TRIALS else {LAST: {}}
        file.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    for ending, row in rows.items():
        if not lacks(row, options.part):
            continue
        folder = original if name == "original" else opened(checkpoint_of(options.work, name, ending))
        model = folder.load(dtype="float32", device="cpu").eval()
        if options.part == "questions":
            row[QUESTIONS] = objectives.answered(model, folder)
        else:
            pieces = objectives.pieces(options.books, options.work, original)
            read = (piece for piece in pieces if (piece[0] == KINDS[0]) == (options.part == KINDS[0]))
            row["losses"] = {**row.get("losses", {}), **objectives.losses_of(model, read)}
        file.write_text(json.dumps(rows) + "\n", encoding="utf-8")
        print(name, ending, row, flush=True)


def trained(work: Path, name: str, original: ModelFolder) -> dict[str, dict[str, Any]]:
    """Run a trial and write the checkpoints of its endings: {ending: {steps, seconds, ...}}."""
    from evals.benchmarks.objectives_loop import Loop
    from retrofit.recovery.adapters import merge_and_save

    loop = Loop(work, TRIALS[name], original)
    began = time.process_time()
    endings = loop.train()
    told: dict[str, float] = {"cpu_seconds": time.process_time() - began, "teacher_seconds": loop.teacher_seconds}
    told |= {"steps": len(loop.batches), "mass": loop.mass}
    for ending, weights in endings.items():
        out = checkpoint_of(work, name, ending)
        out.mkdir(exist_ok=True)
        merge_and_save(loop.model, loop.folder, out, weights)
    return {ending: dict(told) for ending in endings}


def checkpoint_of(work: Path, name: str, ending: str) -> Path:
    """Where the checkpoint of an ending stands; of `converted` the student before training."""
    return work / "-".join([name, *ending.split(), "trained"]) if name in TRIALS else objectives.converted(work)


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The result as Markdown; perplexities as ratios to the original's."""
    before, control = rows["original"][LAST], rows["control"][LAST]
    lines = [
        "# Objectives and schedules that were tried",
        "",
        f"`OMP_NUM_THREADS=1 python -m {MODULE} --books FOLDER --work FOLDER`",
        "",
        f"SmolLM2-135M-Instruct, 3 -> 1 KV heads (calibrated on {CALIBRATION:,} tokens of documentation and code), "
        f"then {objectives.TOKENS:,} tokens in rows of 256, {control['steps']} steps of AdamW at 1e-3 on one thread, "
        "by a plain loop of its own; half of the text is what the original writes. Perplexity as a ratio to the "
        f"original's, on {PIECES} pieces of {LENGTH:,} tokens of each kind; the novels are read by nothing before. "
        "common_knowledge: share of 504 questions, chance 0.25; a standard error is 0.02. CPU seconds are the "
        "training's; other work beside it makes them up to twice as many. Again: without what the teacher computes "
        "for the logits, as in another pass over the same rows when that is kept. An empty cell was not measured.",
        "",
        f"A trial pays where novels are at {BETTER} times the control's perplexity or less, no other kind of text is "
        f"worse by as much, and it takes at most {AS_LONG} times the seconds.",
        "",
        f"| trial | weights | CPU seconds | again | {' | '.join(KINDS)} | common_knowledge | judgement |",
        f"|---|---|---:|---:|{'---:|' * len(KINDS)}---:|---|",
    ]
    words = {"original": "the original", "converted": "converted, not trained"}
    words |= {name: trial.words for name, trial in TRIALS.items()}
    for name, endings in rows.items():
        for ending, row in endings.items():
            cells = [words[name], "", "", "", *_scores(row, before), ""]
            if "steps" in row:
                seconds, again = row["cpu_seconds"], row["cpu_seconds"] - row["teacher_seconds"]
                cells[1:4] = [ending if ending == LAST else f"mean of the {ending}", f"{seconds:,.0f}", f"{again:,.0f}"]
                cells[-1] = "" if row is control else judgement(row, control)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _scores(row: dict[str, Any], before: dict[str, Any]) -> list[str]:
    losses, others = row["losses"], before["losses"]
    ratios = [math.exp(losses[kind] - others[kind]) if kind in losses else None for kind in KINDS]
    asked = row.get(QUESTIONS)
    return ["" if value is None else f"{value:.3f}" for value in (*ratios, asked)]


def judgement(row: dict[str, Any], control: dict[str, Any]) -> str:
    """Whether a trial pays, and by what: its novels and its seconds beside the control's."""
    ratios = {kind: math.exp(row["losses"][kind] - control["losses"][kind]) for kind in row["losses"]}
    seconds = row["cpu_seconds"] / control["cpu_seconds"]
    better, worse = ratios[KINDS[0]] <= BETTER, max(ratios.values()) >= 1 / BETTER
    pays = better and not worse and seconds <= AS_LONG
    return f"{'pays' if pays else 'does not pay'}: novels {ratios[KINDS[0]] - 1:+.1%}, seconds {seconds - 1:+.0%}"


if __name__ == "__main__":
    main()
