"""What a short recovery is trained on, and towards what: one table of variants.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.objectives --books FOLDER --work FOLDER

Converts SmolLM2 to one KV head once, then trains it by each variant in a process of its own and measures it on text of
four kinds and on the general-knowledge task. A variant that --work already has a result of is not run again, so more
can be added later; one that was killed resumes. `--variants no-prose` trains on 500,000 tokens, for an hour of a quiet
core; the others read 16,384 each. Writes results/objectives.json and objectives.md. --books: a folder of novels (*.txt)
that nothing here is calibrated or trained on; no text of theirs is written anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from retrofit.data.packing import Packed
    from retrofit.model.folder import ModelFolder
    from retrofit.recipe.schema import Recover

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODEL = "embedded"
CALIBRATION = 12_288
TOKENS = 16_384
PIECES, LENGTH = 4, 1024  # scored of each kind of text
KINDS = ("novels", "documentation", "code", "own samples")
OWN, COOLER, UNREAD, DOCS, CODE = "own.jsonl", "own-cooler.jsonl", "own-unread.jsonl", "python-docs", "python-stdlib"
LONG, OPENED, OPENED_LONG = "own-cooler-long.jsonl", "own-opened.jsonl", "own-opened-long.jsonl"
HALF_OPENED = "own-half-opened.jsonl"
MIXED = {OWN: 2.0, DOCS: 1.0, CODE: 1.0}


@dataclass(frozen=True)
class Samples:
    """What the original writes, to train on or to score: how much of it, how. opened: share begun by `openings`."""

    side: Literal["train", "held_out"]
    tokens: int
    temperature: float = 1.0
    opened: float = 0.0


SAMPLES = {
    OWN: Samples("train", 2 * TOKENS),
    UNREAD: Samples("held_out", 2 * PIECES * LENGTH),
    COOLER: Samples("train", 2 * TOKENS, temperature=0.8),
    OPENED: Samples("train", 2 * TOKENS, opened=1.0),
    HALF_OPENED: Samples("train", 2 * TOKENS, opened=0.5),
    OPENED_LONG: Samples("train", 6 * TOKENS, opened=1.0),
    LONG: Samples("train", 6 * TOKENS, temperature=0.8),
}


@dataclass(frozen=True)
class Variant:
    """A row of the table. recover: what differs from the baseline; text: {source: weight}; start: the conversion."""

    words: str
    recover: dict[str, Any] = field(default_factory=dict)
    text: dict[str, float] = field(default_factory=lambda: dict(MIXED))
    tokens: int = TOKENS
    start: str = "converted"


CONVERSIONS: dict[str, dict[str, Any]] = {
    "converted": {"tokens": CALIBRATION, "calibrate": [DOCS, CODE]},
    "converted-usual": {},
}
"""{name: options of `convert`}: on few tokens, as the demo does, and by its defaults."""

VARIANTS = {
    "forward": Variant("the baseline: forward KL, LoRA rank 64, rows of 1,024 tokens, half own samples"),
    "rows-512": Variant("rows of 512 tokens, twice the steps", {"sequence_length": 512}),
    "rows-256": Variant("rows of 256 tokens, four times the steps", {"sequence_length": 256}),
    "own": Variant("own samples alone", text={OWN: 1.0}),
    "reverse": Variant("reverse KL", {"divergence": "reverse"}),
    "jsd": Variant("Jensen-Shannon divergence", {"divergence": "jsd"}),
    "on-policy": Variant("a quarter of the rows written by the student", {"on_policy": 0.25}),
    "docs-code": Variant("documentation and code alone", text={DOCS: 1.0, CODE: 1.0}),
    "own-256": Variant("own samples alone, rows of 256 tokens", {"sequence_length": 256}, {OWN: 1.0}),
    "cooler-256": Variant(
        "own samples at temperature 0.8 alone, rows of 256 tokens", {"sequence_length": 256}, {COOLER: 1.0}
    ),
    "opened-256": Variant(
        "own samples alone, begun by `openings`, rows of 256 tokens", {"sequence_length": 256}, {OPENED: 1.0}
    ),
    "mixed-opened-256": Variant(
        "half own samples, half of those begun by `openings`, rows of 256 tokens",
        {"sequence_length": 256},
        {HALF_OPENED: 2.0, DOCS: 1.0, CODE: 1.0},
    ),
    "rank-16": Variant(
        "rows of 256 tokens, LoRA rank 16 instead of 64", {"sequence_length": 256, "adapter": {"rank": 16}}
    ),
    "rank-256": Variant("rows of 256 tokens, LoRA rank 256", {"sequence_length": 256, "adapter": {"rank": 256}}),
    "whole": Variant(
        "rows of 256 tokens, norms and embeddings as well, in full",
        {"sequence_length": 256, "adapter": {"norms": True, "embeddings": True}},
    ),
    "no-prose": Variant(
        "own samples at temperature 0.8 (98,304 tokens, read again) and a quarter code, rows of 512 tokens",
        {"sequence_length": 512, "checkpoints": 20, "allow_repeats": True},
        {LONG: 3.0, CODE: 1.0},
        500_000,
    ),
    "no-prose-usual": Variant(
        "the default conversion; half of the own samples at temperature 1 and begun by `openings`, else the same",
        {"sequence_length": 512, "checkpoints": 20, "allow_repeats": True},
        {LONG: 1.5, OPENED_LONG: 1.5, CODE: 1.0},
        500_000,
        start="converted-usual",
    ),
}


def main() -> None:
    """Run the variants that have no result yet and write the table of all that have one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    short = [name for name, variant in VARIANTS.items() if variant.tokens == TOKENS]
    parser.add_argument("--variants", default=",".join(short))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help="one variant, `original` or a conversion, in this process")
    options = parser.parse_args()
    if options.child:
        result = measured(options, options.child)
        result_file(options, options.child).write_text(json.dumps(result) + "\n", encoding="utf-8")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    for name in ("original", *CONVERSIONS, *options.variants.split(",")):
        if not result_file(options, name).exists():
            command = [sys.executable, "-m", "evals.benchmarks.objectives", "--child", name]
            command += ["--books", str(options.books), "--work", str(options.work)]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
            print(result_file(options, name).read_text("utf-8"), flush=True)
    known = [name for name in ("original", *CONVERSIONS, *VARIANTS) if result_file(options, name).exists()]
    rows = {name: json.loads(result_file(options, name).read_text("utf-8")) for name in known}
    (options.out / "objectives.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (options.out / "objectives.md").write_text(table(rows), encoding="utf-8")


def result_file(options: argparse.Namespace, name: str) -> Path:
    """Where the result of a variant is kept."""
    return Path(options.work) / f"{name}.json"


def measured(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train one variant and measure it: {seconds, steps, losses by kind (nats per token), common_knowledge}."""
    import torch

    from retrofit.model.folder import opened
    from retrofit.model.source import resolve

    torch.set_num_threads(1)
    original = opened(resolve(MODEL).folder)
    write_samples(options.work, UNREAD, original)
    trained: dict[str, Any] = {}
    if name == "original":
        folder = original
    elif name in CONVERSIONS:
        folder = opened(converted(options.work, name))
    else:
        folder, trained = train(options, VARIANTS[name], name, original)
    return {**trained, **scores(folder, pieces(options.books, options.work, original))}


def write_samples(work: Path, name: str, original: ModelFolder) -> None:
    """The original's own samples as a file in `work`, unless it is there."""
    from retrofit.data.samples import OwnSamples, Teacher
    from retrofit.recipe.schema import TextSource
    from retrofit.recipe.values import OPENINGS, OWN_SAMPLES

    if (work / name).exists():
        return
    wanted = SAMPLES[name]
    teacher = Teacher(original, tokens=wanted.tokens, held_out=wanted.tokens)
    begun = {"prompts": [OPENINGS], "prompt_share": wanted.opened} if wanted.opened else {}
    source = TextSource.model_validate({"source": OWN_SAMPLES, "temperature": wanted.temperature, **begun})
    samples = OwnSamples(teacher, source, wanted.side)
    samples.write()
    lines = [json.dumps({"text": text}) + "\n" for _, text in samples.documents()]
    (work / name).write_text("".join(lines), encoding="utf-8")


def converted(work: Path, name: str = "converted") -> Path:
    """SmolLM2 with one KV head instead of three, by one of the conversions; made on first use."""
    import retrofit

    out = work / name
    if not out.exists():
        retrofit.convert(MODEL, kv_heads=1, out=out, **CONVERSIONS[name])
    return out


def train(
    options: argparse.Namespace, variant: Variant, name: str, original: ModelFolder
) -> tuple[ModelFolder, dict[str, Any]]:
    """The trained checkpoint, and what the training says of itself."""
    from retrofit.model.folder import opened
    from retrofit.recovery.train import recover

    section, rows, held_out = rows_of(options.work, variant, original)
    student = opened(converted(options.work, variant.start))
    out = options.work / f"{name}-trained"
    out.mkdir(exist_ok=True)
    work = options.work / f"{name}-work"
    before = _checkpoints(work)
    began, cpu = time.monotonic(), time.process_time()
    report = recover(student, original, out, section, rows, held_out, work_dir=work)
    done = max((steps for steps, _ in before & _checkpoints(work)), default=0)  # those that a stopped training left
    told = {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu,
        "steps": report.steps,
        "timed_steps": report.steps - done,  # those of this process
        "tokens": report.tokens,
        "best_step": report.best_step,
        "start_loss": report.start_loss,
        "best_loss": report.best_loss,
        "trained_parameters": report.trained_parameters,
    }
    return opened(out), told


def _checkpoints(work: Path) -> set[tuple[int, int]]:
    """(steps, time of writing) of the states that a training can go on from."""
    return {(int(one.name.rpartition("-")[2]), one.stat().st_mtime_ns) for one in work.glob("checkpoint-*")}


def rows_of(work: Path, variant: Variant, original: ModelFolder) -> tuple[Recover, Packed, Packed | None]:
    """The recipe's section of a variant, and the rows that it trains on and is judged by; samples are made where they
    are missing."""
    from retrofit.data.samples import Teacher
    from retrofit.recipe.schema import Recover, TextSource
    from retrofit.recovery.schedule import recovery_rows

    for source in variant.text.keys() & SAMPLES.keys():
        write_samples(work, source, original)
    places = {name: str(work / name) for name in SAMPLES}
    text = tuple(TextSource(source=places.get(name, name), weight=weight) for name, weight in variant.text.items())
    section = Recover(tokens=variant.tokens, evals=2, eval_tokens=4096, text=text, **variant.recover)
    rows, held_out = recovery_rows(section, original.tokenizer, 0, teacher=Teacher(original))
    return section, rows, held_out


def scores(folder: ModelFolder, read: Iterator[tuple[str, list[int]]]) -> dict[str, Any]:
    """Mean loss by kind of text of what is read, and the share of general-knowledge questions that are answered."""
    model = folder.load(dtype="float32", device="cpu").eval()
    return {"losses": losses_of(model, read), "common_knowledge": answered(model, folder)}


def losses_of(model: Any, read: Iterator[tuple[str, list[int]]]) -> dict[str, float]:
    """Mean loss by kind of text, nats a token."""
    import torch

    losses: dict[str, list[float]] = {}
    with torch.no_grad():
        for kind, ids in read:
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(ids[1:]))
            losses.setdefault(kind, []).append(float(loss))
    return {kind: sum(values) / len(values) for kind, values in losses.items()}


def answered(model: Any, folder: ModelFolder) -> float:
    """The share of general-knowledge questions that are answered rightly."""
    import torch

    from retrofit.evaluation.tasks.common_knowledge import CommonKnowledge, ask

    with torch.no_grad():
        return ask(CommonKnowledge.of(True), model, folder.tokenizer).scores[0].value


def pieces(books: Path, work: Path, original: ModelFolder) -> Iterator[tuple[str, list[int]]]:
    """(kind, LENGTH tokens) of PIECES pieces of each kind: none of them is trained on."""
    from retrofit.data.texts import read_texts
    from retrofit.recipe.schema import TextSource

    novels = sorted(books.glob("*.txt"))
    for index in range(PIECES):
        text = novels[index % len(novels)].read_text("utf-8")
        yield KINDS[0], _piece(original, text, 0.2 + 0.6 * index / PIECES)
    for kind, source in ((KINDS[1], DOCS), (KINDS[2], CODE)):
        text = "\n\n".join(one.text for one in read_texts(TextSource(source=source), split="held_out"))
        for index in range(PIECES):
            yield kind, _piece(original, text[:1_500_000], index / (PIECES + 1))
    own = "\n\n".join(one.text for one in read_texts(TextSource(source=str(work / "own-unread.jsonl")), split="all"))
    for index in range(PIECES):
        yield KINDS[3], _piece(original, own, index / (PIECES + 1))


def _piece(original: ModelFolder, text: str, place: float) -> list[int]:
    """LENGTH tokens of a text from this part of it on, as a context begins: a BOS first, where there is one."""
    start = text.find("\n", int(place * len(text))) + 1
    tokenizer = original.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return (bos + tokenizer(text[start : start + 12 * LENGTH], add_special_tokens=False).input_ids)[:LENGTH]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The result as Markdown; perplexities as ratios to the original's."""
    before = rows["original"]
    lines = [
        "# What a short recovery is trained on, and towards what",
        "",
        "`OMP_NUM_THREADS=1 python -m evals.benchmarks.objectives --books FOLDER --work FOLDER`",
        "",
        f"SmolLM2-135M-Instruct, 3 -> 1 KV heads (calibrated on {CALIBRATION:,} tokens of documentation and code), "
        "then trained by each variant, one thread. Perplexity as a ratio to the original's, on "
        f"{PIECES} pieces of {LENGTH:,} tokens of each kind; the novels are read by nothing before. common_knowledge: "
        "share of 504 questions, chance 0.25; a standard error is 0.02. CPU seconds are the training's, with its "
        "measurements, samples that it reads excluded; other work beside it makes them up to twice as many. Of a "
        "training that went on after a stop they are computed from the steps after it.",
        "",
        f"| variant | tokens | CPU seconds | steps | {' | '.join(KINDS)} | common_knowledge |",
        f"|---|---:|---:|---:|{'---:|' * len(KINDS)}---:|",
    ]
    names = {"original": "the original", "converted": "converted, not trained"}
    names["converted-usual"] = "converted by default (49,152 tokens, a third own samples), not trained"
    names |= {name: variant.words for name, variant in VARIANTS.items()}
    for name, row in rows.items():
        ratios = [math.exp(row["losses"][kind] - before["losses"][kind]) for kind in KINDS]
        cells = [""] * 3
        if "steps" in row:
            seconds = row["cpu_seconds"] * row["steps"] / row["timed_steps"]
            cells = [f"{row['tokens']:,}", f"{seconds:,.0f}", f"{row['steps']}"]
        cells += [f"{ratio:.3f}" for ratio in ratios] + [f"{row['common_knowledge']:.3f}"]
        lines.append(f"| {names[name]} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
