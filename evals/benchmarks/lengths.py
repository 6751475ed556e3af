"""Perplexity at several lengths: one pass, a pass for each, and lm-evaluation-harness.

    python -m evals.benchmarks.lengths

Two definitions, each in two ways on the same tokens, the beginning of the held-out part of Python's documentation.
Prefix: the tokens within the first L; from one pass over the longest L, and from a pass for each L (`separate`, whose
longest is that one pass). Rolling: the whole document in windows of L, by `--definition lm-eval` (`rolling`) and by
lm-evaluation-harness itself, which loads the model and makes the windows (`lm-eval`, extra `eval`). A row is a process
of its own: the model is loaded and used once on a few tokens, then the peak resident memory is reset. About eight
minutes on one core. Writes results/lengths.json and lengths.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from evals.benchmarks.scoring import MIB, RESULTS, machine, peak, reset_peak, resident, score_retrofit
from retrofit.install import install_command

LENGTHS = (1024, 2048, 4096, 8192)
PREFIX = ("one pass", "separate")
ROLLING = ("lm-eval", "rolling")
WARM_UP = 64  # tokens


# ------------------------------------------------------------------------------------------- in the child process


def held_out(length: int) -> tuple[Any, str]:
    """(first `length` tokens of the held-out documentation, exactly their text)."""
    from retrofit.data.corpora import built_in_texts
    from retrofit.data.documents import make_documents
    from retrofit.model.load import load_tokenizer
    from retrofit.model.source import resolve

    (text,) = built_in_texts("python-docs", "held_out")
    tokenizer = load_tokenizer(resolve("embedded").folder)
    (doc,) = make_documents([(text.name, text.kind, text.text)], tokenizer, length=length, count=1)
    begun = tokenizer.decode(doc.input_ids[1:], clean_up_tokenization_spaces=False)
    again = tokenizer(begun, add_special_tokens=False)["input_ids"]
    assert again == doc.input_ids[1:].tolist(), "the text of these tokens gives other tokens: take another length"
    return doc, begun


class Ours:
    """One of our ways; `run` gives (token losses or one log-likelihood, tokens read)."""

    def __init__(self, way: str, length: int) -> None:
        from retrofit.model.load import load_model
        from retrofit.model.source import resolve

        self.way, self.length = way, length
        self.model = load_model(resolve("embedded").folder, dtype="float32")

    def run(self, doc: Any, text: str) -> tuple[np.ndarray, int]:
        """Over the first `length` tokens, or over all of them in windows of `length`."""
        from retrofit.evaluation.metrics.protocols import prepared, value
        from retrofit.evaluation.scoring.score import score

        if self.way == "rolling":
            docs, windows = prepared("lm-eval", [doc], self.length, bos=True)
            found = value("lm-eval", score(self.model, docs, windows=windows), self.length, windows)
            assert windows is not None and found.log_likelihood is not None
            # The last token of every window is predicted and not read.
            return np.array([found.log_likelihood]), found.read - len(list(windows.spans(len(doc.input_ids))))
        doc = doc.cut(self.length)
        return score_retrofit(self.model, doc, self.length), len(doc.input_ids) - 1


class Harness:
    """lm-evaluation-harness with a checkpoint folder that it loads itself."""

    def __init__(self, length: int) -> None:
        from lm_eval.models.huggingface import HFLM

        from retrofit.model.source import resolve

        folder = str(resolve("embedded").folder)
        self.model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1, max_length=length)

    def run(self, doc: Any, text: str) -> tuple[np.ndarray, int]:
        """Its log-likelihood of `text`, in its windows."""
        from lm_eval.api.instance import Instance
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        (found,) = self.model.loglikelihood_rolling([request], disable_tqdm=True)
        windows = get_rolling_token_windows(
            self.model.tok_encode(text), self.model.prefix_token_id, self.model.max_length, 1
        )
        pairs = map(make_disjoint_window, windows)
        return np.array([found]), sum(len(context) + len(wanted) - 1 for context, wanted in pairs)


def child(way: str, length: int, longest: int, threads: int, out: Path) -> None:
    """One measurement, printed as JSON; its losses go to `out`."""
    import torch

    torch.set_num_threads(threads)
    doc, text = held_out(longest)
    measured = Harness(length) if way == "lm-eval" else Ours(way, length)
    measured.run(doc.cut(WARM_UP), text[:WARM_UP])
    loaded = resident()
    reset_peak()
    wall, processor = time.perf_counter(), time.process_time()
    found, read = measured.run(doc, text)
    seconds, wall = time.process_time() - processor, time.perf_counter() - wall
    np.save(out, found)
    figures = {"seconds": seconds, "wall_seconds": wall, "extra_bytes": peak() - loaded, "model_bytes": loaded}
    print(json.dumps({**figures, "read": read, "document": doc.name}))


# ------------------------------------------------------------------------------------------- in the parent


def measure(way: str, length: int, longest: int, threads: int) -> dict[str, Any]:
    """Run `child` in a process of its own -> its figures with `found`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.npy"
        options = ["--child", way, str(length), str(longest), str(out), "--threads", str(threads)]
        done = subprocess.run(
            [sys.executable, "-m", "evals.benchmarks.lengths", *options], check=True, stdout=subprocess.PIPE, text=True
        )
        figures = {**json.loads(done.stdout.splitlines()[-1]), "found": np.load(out).astype(np.float64)}
    shown = f"{figures['seconds']:.1f} s, {figures['extra_bytes'] / MIB:.0f} MiB, {figures['read']} tokens"
    print(f"{way} {length}: {shown}", file=sys.stderr, flush=True)
    return figures


def run_all(lengths: Sequence[int], threads: int) -> dict[str, Any]:
    """Every row, and the differences between those of one definition."""
    longest = lengths[-1]
    one = measure("one pass", longest, longest, threads)
    found = {("one pass", n): {**one, "found": one["found"][: n - 1]} for n in lengths} | {("separate", longest): one}
    found |= {("separate", n): measure("separate", n, longest, threads) for n in lengths[:-1]}
    found |= {(way, n): measure(way, n, longest, threads) for n in lengths for way in ROLLING}
    prefix, rolling = [], []
    for n in lengths:
        losses = {way: found[way, n]["found"] for way in PREFIX}
        row: dict[str, Any] = {"length": n, "ppl": {way: float(np.exp(a.mean())) for way, a in losses.items()}}
        row["largest_token_difference"] = float(np.abs(losses["one pass"] - losses["separate"]).max())
        prefix.append(row)
        sums = {way: float(found[way, n]["found"][0]) for way in ROLLING}
        row = {"length": n, "log_likelihood": sums, "difference": abs(sums["rolling"] - sums["lm-eval"])}
        row["ppl"] = {way: float(np.exp(-total / (longest - 1))) for way, total in sums.items()}
        rolling.append(row)
    costs = {way: _costs([found[way, n] for n in lengths]) for way in ("separate", *ROLLING)}
    return {
        "machine": {**machine(threads), "lm_eval": version("lm_eval")},
        "document": {"name": one["document"], "tokens": longest},
        "costs": {"one pass": _costs([one]), **costs},
        "prefix": prefix,
        "rolling": rolling,
    }


def _costs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("read", "seconds", "wall_seconds", "extra_bytes")
    return {"rows": [{key: row[key] for key in keys} for row in rows]} | {
        "read": sum(row["read"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "extra_bytes": max(row["extra_bytes"] for row in rows),
    }


def markdown(result: dict[str, Any], command: str) -> str:
    """The result as tables."""
    m, costs, count = result["machine"], result["costs"], len(result["prefix"])
    tokens = result["document"]["tokens"]
    lines = [
        "# Lengths",
        "",
        f"`{command}`, SmolLM2-135M-Instruct in float32 on {m['processor']}, {m['threads']} thread of {m['cores']} "
        f"cores, {m['memory_gib']} GiB, Python {m['python']}, torch {m['torch']}, transformers {m['transformers']}, "
        f"lm-eval {m['lm_eval']}.",
        "",
        f"One document, the first {tokens:,} tokens of Python's documentation ({result['document']['name']}). Every "
        "pass is a process of its own. Seconds are processor time. Extra memory is the peak resident memory of the "
        "pass minus the loaded model. Tokens are those that went through the model.",
        "",
        "## The first L tokens (PrefixPPL): one definition, two ways",
        "",
        "The longest of the separate passes is the one pass. That these are also the losses of `model(input_ids)` is "
        "in [scoring.md](scoring.md).",
        "",
        "| L | perplexity: one pass | a pass for each L | largest token difference |",
        "|---:|---:|---:|---:|",
    ]
    for row in result["prefix"]:
        cells = [f"{row['length']:,}", *(f"{row['ppl'][way]:.6f}" for way in PREFIX)]
        lines.append(f"| {' | '.join([*cells, format(row['largest_token_difference'], '.1e')])} |")
    one = costs["one pass"]
    lines += ["", "| | passes | tokens | seconds | extra MiB |", "|---|---:|---:|---:|---:|"]
    lines += [
        _cost_row(f"one pass, all {count} lengths", one),
        _cost_row("a pass for each length", costs["separate"]),
        "",
        f"One pass is {costs['separate']['seconds'] / one['seconds']:.1f} times faster and reads "
        f"{costs['separate']['read'] / one['read']:.1f} times fewer tokens.",
        "",
        "## The whole document in windows of L (rolling log-likelihood): one definition, two programs",
        "",
        "`retrofit evaluate --definition lm-eval` beside `HFLM.loglikelihood_rolling`. These are not the numbers "
        "above: a window forgets what stands before it, and every L reads the whole document.",
        "",
        "| L | log-likelihood: lm-eval | retrofit | difference | perplexity: lm-eval | retrofit | seconds: lm-eval | "
        "retrofit | extra MiB: lm-eval | retrofit |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for i, row in enumerate(result["rolling"]):
        spent = {way: costs[way]["rows"][i] for way in ROLLING}
        cells = [f"{row['length']:,}", *(f"{row['log_likelihood'][way]:.4f}" for way in ROLLING)]
        cells += [f"{row['difference']:.1e}", *(f"{row['ppl'][way]:.6f}" for way in ROLLING)]
        cells += [f"{spent[way]['seconds']:.1f}" for way in ROLLING]
        cells += [f"{spent[way]['extra_bytes'] / MIB:,.0f}" for way in ROLLING]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | passes | tokens | seconds | extra MiB |", "|---|---:|---:|---:|---:|"]
    names = {"lm-eval": f"lm-eval, all {count} lengths", "rolling": f"retrofit, all {count} lengths"}
    lines += [_cost_row(names[way], costs[way]) for way in ROLLING]
    last = result["rolling"][-1]["ppl"]["lm-eval"], result["prefix"][-1]["ppl"]["one pass"]
    both = abs(np.log(last[0] / last[1]))
    lines += [
        "",
        f"At {tokens:,} tokens the document is one window, where the two definitions meet: lm-eval's mean loss "
        f"and that of our one pass differ by {both:.1e}.",
        "",
        f"A curve over {count} lengths takes lm-eval {costs['lm-eval']['seconds']:.0f} s, "
        f"{costs['lm-eval']['read']:,} tokens and {costs['lm-eval']['extra_bytes'] / MIB:,.0f} MiB in rolling windows; "
        f"by prefixes of one pass it takes {one['seconds']:.0f} s, {one['read']:,} tokens and "
        f"{one['extra_bytes'] / MIB:,.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


def _cost_row(name: str, cost: dict[str, Any]) -> str:
    return (
        f"| {name} | {len(cost['rows'])} | {cost['read']:,} | {cost['seconds']:.1f} | "
        f"{cost['extra_bytes'] / MIB:,.0f} |"
    )


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, length, longest, out = options.child
        child(way, int(length), int(longest), options.threads, Path(out))
        return
    if find_spec("lm_eval") is None:
        sys.exit(f"lm-eval is not installed: {install_command(extra='eval')}, or make bench-lengths")
    result = run_all(sorted(options.lengths), options.threads)
    command = " ".join(["python -m evals.benchmarks.lengths", *sys.argv[1:]])
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(result, command)
    record = json.dumps({"command": command, **result}, indent=1) + "\n"
    (options.out / "lengths.json").write_text(record, encoding="utf-8")
    (options.out / "lengths.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
