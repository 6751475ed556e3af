"""The scoring pass beside the two usual ways to a perplexity. Writes results/scoring.json and results/scoring.md.

    python -m evals.benchmarks.scoring

whole: `model(input_ids)`, then the loss of its logits. strided: the loop of transformers' perplexity guide
(`model(input_ids, labels)` on windows that move by 512 tokens), its window as long as the context length. retrofit:
`evaluation.scoring.score`. Each measurement is a process of its own: the model is loaded and used once on a few tokens,
then the peak resident memory is reset, so "extra memory" is the peak of the measured pass minus the loaded model.
With both dtypes and all lengths this takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parents[1] / "results"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
VARIANTS = ("retrofit", "whole", "strided")
STRIDE = 512
MIB = 1 << 20


# ------------------------------------------------------------------------------------------- in the child process


def document(length: int) -> Any:
    """Python's own documentation as one text, cut to `length` tokens."""
    from pydoc_data.topics import topics

    from retrofit.data.documents import make_documents
    from retrofit.model.load import load_tokenizer
    from retrofit.model.source import resolve

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = load_tokenizer(resolve("embedded").folder)
    return make_documents([("python-docs", "python-docs", text)], tokenizer, length=length, count=1)[0]


def score_retrofit(model: Any, doc: Any, window: int) -> np.ndarray:
    """Token losses by the scoring pass; the window is the document."""
    from retrofit.evaluation.scoring.score import score

    return score(model, [doc]).losses[0]


def score_whole(model: Any, doc: Any, window: int) -> np.ndarray:
    """Token losses from the logits of the whole document."""
    import torch

    ids = torch.from_numpy(doc.input_ids)[None]
    with torch.no_grad():
        logits = model(ids).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none").numpy()


def score_strided(model: Any, doc: Any, window: int) -> np.ndarray:
    """The mean loss [1] by the guide's loop: windows of `window` tokens, of each only the tokens not yet seen count."""
    import torch

    ids = torch.from_numpy(doc.input_ids)[None]
    total, count, seen = 0.0, 0, 0
    for begin in range(0, ids.shape[1], min(STRIDE, window // 2)):
        end = min(begin + window, ids.shape[1])
        part = ids[:, begin:end]
        labels = part.clone()
        labels[:, : -(end - seen)] = -100
        with torch.no_grad():
            loss = model(part, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        total, count, seen = total + float(loss) * scored, count + scored, end
        if end == ids.shape[1]:
            break
    return np.array([total / count], np.float32)


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Forget the peak so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the peak since `reset_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(variant: str, length: int, window: int, dtype: str, threads: int, out: Path) -> None:
    """One measurement, printed as JSON; its losses go to `out`."""
    import torch

    from retrofit.data.documents import Document
    from retrofit.model.load import load_model
    from retrofit.model.source import resolve

    torch.set_num_threads(threads)
    run = {"retrofit": score_retrofit, "whole": score_whole, "strided": score_strided}[variant]
    doc = document(length)
    model = load_model(resolve("embedded").folder, dtype=dtype)
    run(model, Document("warm-up", "", doc.input_ids[:64], 0), 64)
    loaded = resident()
    reset_peak()
    start = time.perf_counter()
    losses = run(model, doc, window)
    seconds = time.perf_counter() - start
    np.save(out, losses)
    print(json.dumps({"seconds": seconds, "extra_bytes": peak() - loaded, "model_bytes": loaded}))


# ------------------------------------------------------------------------------------------- in the parent


def measure(variant: str, length: int, window: int, dtype: str, threads: int) -> dict[str, Any]:
    """Run `child` in a process of its own -> its figures with `losses`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "losses.npy"
        options = ["--child", variant, str(length), str(window), dtype, str(out), "--threads", str(threads)]
        done = subprocess.run(
            [sys.executable, "-m", "evals.benchmarks.scoring", *options], check=True, stdout=subprocess.PIPE, text=True
        )
        figures = json.loads(done.stdout.splitlines()[-1])
        figures |= {"variant": variant, "length": length, "window": window, "dtype": dtype, "losses": np.load(out)}
    shown = f"{figures['seconds']:.1f} s, {figures['extra_bytes'] / MIB:.0f} MiB, {figures['losses'].mean():.5f}"
    print(f"{dtype} {variant} {length} (window {window}): {shown}", file=sys.stderr, flush=True)
    return figures


def run_all(lengths: Sequence[int], dtypes: Sequence[str], strided_document: int, threads: int) -> dict[str, Any]:
    """All measurements, with the differences between the variants."""
    tables = {}
    for dtype in dtypes:
        found = {(v, n): measure(v, n, n, dtype, threads) for n in lengths for v in VARIANTS}
        rows = [_row(n, {v: found[v, n] for v in VARIANTS}) for n in lengths]
        tables[dtype] = {"rows": rows, "one_pass": _one_pass(rows)}
    dtype = dtypes[-1]
    windows = [strided_document // 2**i for i in reversed(range(5))]
    loops = [measure("strided", strided_document, n, dtype, threads)["seconds"] for n in windows]
    ours = measure("retrofit", strided_document, strided_document, dtype, threads)["seconds"]
    strided = {"dtype": dtype, "document": strided_document, "windows": windows, "loops": loops, "retrofit": ours}
    return {"machine": machine(threads), "stride": STRIDE, "tables": tables, "strided_over_document": strided}


def _row(length: int, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ours, whole, strided = (found[v]["losses"].astype(np.float64) for v in VARIANTS)
    return {
        "length": length,
        "seconds": {v: found[v]["seconds"] for v in VARIANTS},
        "extra_bytes": {v: found[v]["extra_bytes"] for v in VARIANTS},
        "mean_loss": {v: float(found[v]["losses"].astype(np.float64).mean()) for v in VARIANTS},
        "largest_token_difference_to_whole": float(np.abs(ours - whole).max()),
        "mean_difference_to_whole": float(abs(ours.mean() - whole.mean())),
        "mean_difference_to_strided": float(abs(ours.mean() - strided.mean())),
        "memory_share_of_whole": found["retrofit"]["extra_bytes"] / found["whole"]["extra_bytes"],
    }


def _one_pass(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All lengths from the longest pass, against one pass for each length."""
    ours = rows[-1]["seconds"]["retrofit"]
    separate = {v: sum(row["seconds"][v] for row in rows) for v in VARIANTS}
    return {"retrofit": ours, "separate": separate, "times_faster": {v: separate[v] / ours for v in VARIANTS}}


def machine(threads: int) -> dict[str, Any]:
    """What this ran on."""
    import psutil
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    return {
        "processor": processor,
        "cores": psutil.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def markdown(result: dict[str, Any], command: str) -> str:
    """The result as tables."""
    m = result["machine"]
    lines = [
        "# Scoring",
        "",
        f"`{command}`, SmolLM2-135M-Instruct on {m['processor']}, {m['threads']} thread of {m['cores']} cores, "
        f"{m['memory_gib']} GiB, Python {m['python']}, torch {m['torch']}, "
        f"transformers {m['transformers']}.",
        "",
        "One document, Python's documentation. `whole`: `model(input_ids)` and the loss of its logits. `strided`: the "
        f"loop of transformers' perplexity guide, window = length, stride {result['stride']}. `retrofit`: "
        "`evaluation.scoring.score`. Extra memory is the peak resident memory of the pass minus the loaded model; "
        "every figure is a process of its own.",
    ]
    for dtype, table in result["tables"].items():
        lines += [
            "",
            f"## {dtype}",
            "",
            "| tokens | seconds: retrofit | whole | strided | extra MiB: retrofit | whole | strided | share of whole | "
            "mean loss: retrofit | whole | strided | largest token difference |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in table["rows"]:
            cells = [f"{row['length']:,}", *(f"{row['seconds'][v]:.1f}" for v in VARIANTS)]
            cells += [f"{row['extra_bytes'][v] / MIB:.0f}" for v in VARIANTS]
            cells += [f"{row['memory_share_of_whole']:.2f}", *(f"{row['mean_loss'][v]:.5f}" for v in VARIANTS)]
            lines.append(f"| {' | '.join([*cells, format(row['largest_token_difference_to_whole'], '.1e')])} |")
        one, count = table["one_pass"], len(table["rows"])
        lines += [
            "",
            f"All {count} lengths from the one longest pass: {one['retrofit']:.1f} s. A pass for each length: "
            + ", ".join(f"{v} {one['separate'][v]:.1f} s ({one['times_faster'][v]:.1f} times)" for v in VARIANTS)
            + ".",
        ]
    loop = result["strided_over_document"]
    total = sum(loop["loops"])
    lines += [
        "",
        f"## Context lengths by moving windows ({loop['dtype']})",
        "",
        f"The guide's loop over one document of {loop['document']:,} tokens, once for each window (stride "
        f"{result['stride']}, at most half the window):",
        "",
        "| window | seconds |",
        "|---:|---:|",
        *(f"| {window:,} | {seconds:.1f} |" for window, seconds in zip(loop["windows"], loop["loops"], strict=True)),
        f"| all {len(loop['windows'])} | {total:.1f} |",
        f"| retrofit, one pass | {loop['retrofit']:.1f} |",
        "",
        f"One pass is {total / loop['retrofit']:.1f} times faster. The losses are not the same ones: a moving window "
        "gives every token at least `window - stride` tokens of context, a prefix gives it all tokens before.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--strided-document", type=int, default=4096, help="tokens of the moving-window comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        variant, length, window, dtype, out = options.child
        child(variant, int(length), int(window), dtype, options.threads, Path(out))
        return
    result = run_all(sorted(options.lengths), options.dtypes, options.strided_document, options.threads)
    command = " ".join(["python -m evals.benchmarks.scoring", *sys.argv[1:]])
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(result, command)
    (options.out / "scoring.json").write_text(
        json.dumps({"command": command, **result}, indent=1) + "\n", encoding="utf-8"
    )
    (options.out / "scoring.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
