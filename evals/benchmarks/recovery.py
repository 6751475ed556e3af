"""One recovery step beside transformers' own loss in Trainer, with the same LoRA: speed, memory and loss.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.recovery

Every cell runs in a process of its own, so that no peak is another's. Writes results/recovery.json and recovery.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
LENGTHS = (2048, 4096)
STEPS = 3  # timed, after one that is not
CASES = {
    "trainer": "transformers' Trainer, peft's LoRA, the model's own loss",
    "lm": "ours, the same loss (`loss: lm`)",
    "distill": "ours, distillation (`loss: distill`: also runs the original model)",
}
LORA = {"rank": 16, "alpha": 32}


def main() -> None:
    """Run every case at every length in turn and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", choices=CASES, help="measure this one in this process and print JSON")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    if options.case:
        print(json.dumps(measure(options.case, lengths[0], options)))
        return
    rows = [
        child(options, case, length, "auto", checkpointing)
        for length in lengths
        for checkpointing in (False, True)
        for case in CASES
    ]
    exact = [child(options, case, lengths[0], "float32", False, steps=1) for case in ("trainer", "lm")]
    command = "OMP_NUM_THREADS=1 python -m evals.benchmarks.recovery" + (
        "" if sys.argv[1:] == [] else " " + " ".join(sys.argv[1:])
    )
    record = {"command": command, "machine": machine(), "lora": LORA, "rows": rows, "float32": exact}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "recovery.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table(record)
    (options.out / "recovery.md").write_text(text, encoding="utf-8")
    print(text)


def child(
    options: argparse.Namespace, case: str, length: int, dtype: str, checkpointing: bool, steps: int | None = None
) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "evals.benchmarks.recovery", "--case", case, "--lengths", str(length)]
    command += ["--model", options.model, "--dtype", dtype, "--steps", str(steps or options.steps)]
    command += ["--checkpointing"] if checkpointing else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One case: {tokens_per_s, step_s, peak_bytes, extra_bytes, loss of the first step, ...}."""
    import torch
    from transformers import TrainerCallback

    from retrofit.data.packing import training_rows
    from retrofit.model.load import load_tokenizer
    from retrofit.model.source import resolve
    from retrofit.recipe.schema import TextSource
    from retrofit.recovery.student_teacher import compute_dtype

    torch.set_num_threads(1)
    folder = resolve(options.model).folder
    tokens = training_rows(
        [TextSource(source="python-docs")], load_tokenizer(folder), (options.steps + 1) * length, length, 0
    ).ids_NT
    compute = compute_dtype("cpu", options.dtype)
    losses: list[float] = []
    times: list[float] = []

    class Clock(TrainerCallback):
        """Wall time of every optimizer step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as work:
        build = stock_trainer if case == "trainer" else our_trainer
        trainer = build(case, folder, tokens, compute, Path(work), options.checkpointing, losses)
        trainer.add_callback(Clock())
        loaded = reset_peak()
        trainer.train()
    peak = peak_bytes()
    step = statistics.median(times[1:])
    return {
        "case": case,
        "length": length,
        "dtype": str(compute).removeprefix("torch."),
        "checkpointing": options.checkpointing,
        "step_s": step,
        "tokens_per_s": length / step,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "extra_bytes": peak - loaded,
        "loss": losses[0],
    }


def stock_trainer(
    case: str, folder: Path, tokens: Any, compute: Any, work: Path, checkpointing: bool, losses: list[float]
) -> Any:
    """What a user of transformers and peft writes: same weights, same adapters, same dtype, the model's own loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute, attn_implementation="sdpa")
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=projections, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)

    class Recorded(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Recorded(
        model=model, args=arguments(work, len(rows), checkpointing, compute == torch.bfloat16), train_dataset=rows
    )


def our_trainer(
    case: str, folder: Path, tokens: Any, compute: Any, work: Path, checkpointing: bool, losses: list[float]
) -> Any:
    """The trainer of `retrofit.recover`; for distillation the teacher is a model with attention of its own."""
    from retrofit.recipe.schema import Adapter, Recover
    from retrofit.recovery.batches import MicroBatches
    from retrofit.recovery.schedule import TrainRows
    from retrofit.recovery.student_teacher import load_student_teacher
    from retrofit.recovery.train import student_with_adapters
    from retrofit.recovery.trainer import Objective, RecoveryTrainer

    teacher = folder if case == "distill" else None
    pair = load_student_teacher(folder, teacher, device="cpu", dtype=compute, kernel="auto")
    recipe = Recover(loss=case, adapter=Adapter(**LORA))
    model = student_with_adapters(pair, recipe, seed=0)

    class Recorded(RecoveryTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss))
            return loss

    return Recorded(
        objective=Objective(pair, recipe),
        compute=compute,
        model=model,
        args=arguments(work, len(tokens), checkpointing, False),
        train_dataset=MicroBatches(
            TrainRows(tokens, None, (tokens.shape[1],) * len(tokens)), 1, every_token=case == "distill"
        ),
    )


def arguments(work: Path, steps: int, checkpointing: bool, bf16: bool) -> Any:
    """The same for both sides; ours opens its own autocast."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,
        max_steps=steps,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        train_sampling_strategy="sequential",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=0,
    )


def reset_peak() -> int:
    """Forget the peak of loading where the system can (Linux); the resident bytes now."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """The largest resident memory since `reset_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def machine() -> dict[str, str]:
    """Where it ran."""
    import torch
    import transformers

    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return {"cpu": str(cpu), "threads": "1", "torch": torch.__version__, "transformers": transformers.__version__}


def table(record: dict[str, Any]) -> str:
    """The result as Markdown; ratios are to transformers' Trainer in the row's own group."""
    where = record["machine"]
    lines = [
        "# One recovery step beside transformers' own loss",
        "",
        f"`{record['command']}`, one thread of {where['cpu']}, torch {where['torch']}, "
        f"transformers {where['transformers']}.",
        "",
        f"SmolLM2-135M, LoRA r {LORA['rank']} on q/k/v/o and MLP, batch of one sequence of Python documentation, the "
        f"same optimizer, schedule and dtype on both sides ({record['rows'][0]['dtype']}). Every row is a process of "
        "its own; times are medians of the steps after the first. Extra memory is what training adds to the loaded "
        "models.",
        "",
        "| tokens | checkpointing | loss and loop | tokens/s | | extra memory (MiB) | | peak (MiB) | first loss |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        base = next(
            other
            for other in record["rows"]
            if other["case"] == "trainer" and all(other[key] == row[key] for key in ("length", "checkpointing"))
        )
        kl = " (KL)" if row["case"] == "distill" else ""
        lines.append(
            f"| {row['length']} | {'yes' if row['checkpointing'] else 'no'} | {CASES[row['case']]} "
            f"| {row['tokens_per_s']:.0f} | {row['tokens_per_s'] / base['tokens_per_s']:.2f}x "
            f"| {row['extra_bytes'] / 2**20:.0f} | {row['extra_bytes'] / base['extra_bytes']:.2f}x "
            f"| {row['peak_bytes'] / 2**20:.0f} | {row['loss']:.4f}{kl} |"
        )
    stock, ours = record["float32"]
    lines += [
        "",
        f"The same loss: in float32 at {stock['length']} tokens, transformers' {stock['loss']:.7f}, ours "
        f"{ours['loss']:.7f} (difference {abs(stock['loss'] - ours['loss']):.1e}). In bfloat16 the two differ by how "
        "attention rounds. The KL of the distillation rows is near zero because student and original are the same "
        "model there; its cost does not depend on that.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
