"""Tokens per second of own samples by batch size, beside training on them and beside transformers' cache.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.sampling

Each round times a few tokens of every case in the middle of a sample, then one step of `recover`: the rounds take turns
in one process, so that whatever else the machine does slows all of them. On a CPU seconds are processor time. Writes
results/sampling.json and sampling.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evals.benchmarks.recovery import RESULTS, machine, our_trainer

BATCHES = (1, 8, 32, 64, 128)
MIDDLE = 256  # position of the tokens that are timed
BEFORE = 40  # sequences of the case that this replaced
TOP_P = 0.9
TRAINED = 1024  # tokens of a training step


def main() -> None:
    """Time every case in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4, help="timed of each case and round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    command = "OMP_NUM_THREADS=1 python -m evals.benchmarks.sampling " + " ".join(sys.argv[1:])
    record = {"command": command.strip(), "machine": machine(), **measure(options)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sampling.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table(record)
    (options.out / "sampling.md").write_text(text, encoding="utf-8")
    print(text)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """{rows: [{case, batch, tokens_per_s}], dtype, training_tokens_per_s}: medians over the rounds."""
    import torch
    from transformers import TrainerCallback

    from retrofit.data.packing import training_rows
    from retrofit.data.samples import Teacher
    from retrofit.model.source import resolve
    from retrofit.recipe.schema import TextSource
    from retrofit.recovery.student_teacher import compute_dtype

    torch.set_num_threads(1)
    teacher = Teacher(resolve(options.model).model)
    model = teacher.model.load(dtype=teacher.dtype)
    cases: list[tuple[str, int, Callable[[], None]]] = [("transformers", BEFORE, stock(model))]
    for top_p in (1.0, TOP_P):
        for batch in BATCHES if top_p == 1 else (64,):
            cases.append(
                (f"top-p {top_p}" if top_p < 1 else "ours", batch, ours(model, teacher.model.spec, batch, top_p))
            )
    found: dict[tuple[str, int], list[float]] = {(name, batch): [] for name, batch, _ in cases}
    training: list[float] = []

    def sampling_round() -> None:
        with torch.inference_mode():
            for name, batch, step in cases:
                step()  # not timed: memory is allocated
                began = time.process_time()
                for _ in range(options.tokens):
                    step()
                found[name, batch].append(batch * options.tokens / (time.process_time() - began))

    class Between(TrainerCallback):
        """A round of sampling before each training step, which is timed."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sampling_round()
            self.began = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            training.append(TRAINED / (time.process_time() - self.began))

    text = [TextSource(source="python-docs")]
    rows = training_rows(text, teacher.model.tokenizer, (options.rounds + 1) * TRAINED, TRAINED, 0).ids_NT
    with tempfile.TemporaryDirectory() as work:
        trainer = our_trainer("distill", teacher.folder, rows, compute_dtype("cpu", "auto"), Path(work), False, [])
        trainer.add_callback(Between())
        trainer.train()
    return {
        "dtype": teacher.dtype,
        "training_tokens_per_s": statistics.median(training[1:]),
        "rows": [
            {"case": name, "batch": batch, "tokens_per_s": statistics.median(speeds[1:])}
            for (name, batch), speeds in found.items()
        ],
    }


def ours(model: Any, spec: Any, batch: int, top_p: float) -> Callable[[], None]:
    """One token of `batch` samples in the middle."""
    import torch

    from retrofit.data.sampling import Sampler
    from retrofit.kernels import decode
    from retrofit.kernels.registry import using
    from retrofit.kernels.stepping import CHOICE

    decode.register()
    sampler = Sampler(model, spec, [[1]] * batch, torch.rand(batch, 2 * MIDDLE), 1.0, top_p)
    sampler.make_room(MIDDLE)

    def step() -> None:
        with using(model, CHOICE):
            sampler.position.fill_(MIDDLE)
            sampler.step()

    return step


def stock(model: Any) -> Callable[[], None]:
    """One token of BEFORE samples in the middle by transformers' growing cache and torch.multinomial."""
    import torch
    from transformers import DynamicCache

    config = model.config
    shape = (BEFORE, config.num_key_value_heads, MIDDLE, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype) for _ in range(2)), layer)
    ids_B1 = torch.ones(BEFORE, 1, dtype=torch.long)

    def step() -> None:
        out = model(input_ids=ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)

    return step


def table(record: dict[str, Any]) -> str:
    """The result as Markdown; ratios are to training on as many tokens."""
    where, trained = record["machine"], record["training_tokens_per_s"]
    lines = [
        "# Sampling beside training",
        "",
        f"`{record['command']}`, one thread of {where['cpu']}, torch {where['torch']}, transformers "
        f"{where['transformers']}. Tokens per second of processor time: other work ran on the machine, which the "
        "ratios feel less than the speeds.",
        "",
        f"SmolLM2-135M in {record['dtype']}; tokens around position {MIDDLE} of 512. Training is `recover` with "
        f"`loss: distill`, LoRA on all projections, rows of {TRAINED:,} tokens: {trained:,.0f} tokens/s.",
        "",
        "| samples written together | how | tokens/s | times as fast as training |",
        "|---:|---|---:|---:|",
    ]
    named = {
        "transformers": "transformers' growing cache, sdpa, `torch.multinomial`",
        "ours": "`sample_batch`",
        f"top-p {TOP_P}": f"`sample_batch`, `top_p: {TOP_P}`",
    }
    lines += [
        f"| {row['batch']} | {named[row['case']]} | {row['tokens_per_s']:,.0f} | {row['tokens_per_s'] / trained:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
