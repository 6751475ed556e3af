"""How fast a model with windows prefills and decodes beside the model that it was made of, in turn, in one run.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.windows_speed ORIGINAL WINDOWED [--lengths 2048,8192]

Both are checkpoint folders, or `embedded`. Random tokens, one sequence, the model's own dtype where this machine
multiplies it, the kernel that `auto` takes. Nothing else should run. Writes results/windows-speed.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evals.benchmarks.recovery import machine

if TYPE_CHECKING:
    from retrofit.evaluation.running import RunCost

RESULTS = Path(__file__).resolve().parents[1] / "results"
DECODED = 16


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("windowed")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    from retrofit.evaluation.folders import run_costs
    from retrofit.model.folder import opened
    from retrofit.model.source import resolve
    from retrofit.recipe.schema import Evaluate

    lengths = [int(length) for length in options.lengths.split(",")]
    section = Evaluate(lengths=lengths, cost_lengths=lengths, decode_tokens=DECODED)
    folders = {name: opened(resolve(getattr(options, name)).folder) for name in ("original", "windowed")}
    costs = run_costs(folders, section, kernel="auto", device="cpu", seed=0)
    layers = folders["windowed"].spec.layers
    windows = [layer.window for layer in layers if layer.window is not None]
    what = f"{len(windows)} of {len(layers)} layers with windows of {max(windows):,} tokens"
    found = {name: cost for name, cost in costs.items() if cost is not None}
    (options.out / "windows-speed.md").write_text(table(found, what), encoding="utf-8")


def table(costs: Mapping[str, RunCost], what: str) -> str:
    """Rows by length: medians, and all rounds in brackets."""
    where = machine()
    lines = [
        "# Speed with sliding windows",
        "",
        "`OMP_NUM_THREADS=1 python -m evals.benchmarks.windows_speed ORIGINAL WINDOWED`, one thread of "
        f"{where['cpu']}, torch {where['torch']}, transformers {where['transformers']}.",
        "",
        f"SmolLM2-135M-Instruct, and the same with {what}. One sequence of random tokens; the two models in turn, "
        f"medians with all rounds in brackets. Decoding: {DECODED} tokens after so many.",
        "",
        "| tokens | prefill, s: original | windowed | ratio | decoding, tokens/s: original | windowed | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for before, after in zip(costs["original"].lengths, costs["windowed"].lengths, strict=True):
        prefill = [_with_rounds(cost.prefill_seconds, cost.prefill_rounds) for cost in (before, after)]
        decoded = [_with_rounds(cost.decode_per_s or 0.0, cost.decode_rounds) for cost in (before, after)]
        faster = (after.decode_per_s or 0.0) / (before.decode_per_s or 1.0)
        cells = [f"{before.length:,}", *prefill, f"{after.prefill_seconds / before.prefill_seconds:.2f}"]
        lines.append(f"| {' | '.join([*cells, *decoded, f'{faster:.2f}'])} |")
    return "\n".join([*lines, ""])


def _with_rounds(value: float, rounds: tuple[float, ...]) -> str:
    return f"{value:.3g} ({', '.join(f'{one:.3g}' for one in rounds)})"


if __name__ == "__main__":
    main()
