"""Sliding windows beside fewer KV heads and smaller cache dtypes: what each costs at what size of the KV cache.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.windows --books DIR --work DIR

Makes checkpoints of SmolLM2-135M by the commands that everybody has (`window`, `convert`, `recover` as the recipe
`window` says, `extend`), and measures each with `evaluate`: perplexity on novels at the model's 8,192 positions, a
passage that comes again from out of sight, needles, questions of common knowledge. --books: a folder of novels (*.txt)
that nothing is calibrated or trained on. --parts: rows of the table, by default all but those of 32,768 positions
(`NAME@32k`) and of further trainings. Every part is a process of its own; what --work holds of it is not done again.
Writes results/windows.json, .md and .svg after each. Pieces of the novels are written into --work, and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.benchmarks.heads import cpu_seconds
from evals.benchmarks.recovery import machine
from evals.benchmarks.windows_parts import CHECKPOINTS, EVERY, FAR, PARTS, RANKED, ROWS
from evals.benchmarks.windows_table import chart, table
from retrofit.console import to_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODEL = "embedded"
LENGTH, FAR_LENGTH = 8192, 32_768
PASSAGE, APART = 256, 2304  # tokens that come again, and how far after their first copy: more than any window here
RECOGNISED = 32  # tokens of the second copy that do not count: the passage has to be recognised
NEEDLES = {"needle": [4096], "depths": 10, "multi_key": True}
CHARS = 16  # of a piece for each token that is read of it, more than any novel has


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(ROWS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help="one part, in this process")
    return parser


def main() -> None:
    """Measure the parts that have no result yet, and write table and chart after each."""
    parser = _parser()
    options = parser.parse_args()
    if options.child:
        _write(result_file(options.work, options.child), measured(options.books, options.work, options.child))
        return
    parts = options.parts.split(",")
    for name in parts:
        if name not in PARTS:
            parser.error(f"`{name}` is no part; there are: {', '.join(PARTS)}")
    if not any(options.books.glob("*.txt")):
        parser.error(f"{options.books} holds no *.txt")
    first = [f"original{FAR}"] if any(name.endswith(FAR) for name in parts) else []
    for name in dict.fromkeys(["original", *first, *parts]):  # what the others are compared with
        if not result_file(options.work, name).exists():
            _in_process(options, name)
        save(options.work, options.out)


def _in_process(options: argparse.Namespace, name: str) -> None:
    command = [sys.executable, "-m", "evals.benchmarks.windows", "--child", name]
    command += ["--books", str(options.books), "--work", str(options.work)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    print(f"{name}: {result_file(options.work, name).read_text('utf-8')}", flush=True)


def result_file(work: Path, name: str) -> Path:
    """Where the result of a part is kept."""
    return work / "parts" / f"{name}.json"


def measured(books: Path, work: Path, name: str) -> dict[str, Any]:
    """Make the checkpoint of a part, measure it, and compare it with the original: what the table shows of it."""
    row, far = EVERY[name.removesuffix(FAR)], name.endswith(FAR)
    began, cpu = time.monotonic(), cpu_seconds()
    folder = checkpoint(work, row.checkpoint)
    made = cpu_seconds() - cpu
    found = _at_32k(books, work, name, folder) if far else _at_8k(books, work, name, folder, row.cache)
    seconds = {"made": made, "measured": cpu_seconds() - cpu - made, "elapsed": time.monotonic() - began}
    return {**found, "cpu_seconds": seconds}


def checkpoint(work: Path, name: str) -> str:
    """The folder of a checkpoint, and of those that it is made from; what is there already is not made again."""
    import retrofit
    from retrofit.recipe.load import load_recipe
    from retrofit.recipe.options import recipe_of
    from retrofit.workflow.command import write

    if name == "original":
        return MODEL
    how, out = CHECKPOINTS[name], work / name
    if out.is_dir():  # whole, as a command leaves it, and the same for all rows that are made from it
        return str(out)
    start = checkpoint(work, how.start)
    if how.verb == "recover":
        section = load_recipe("window", model=MODEL).recover
        assert section
        write(recipe_of("recover", {"model": start}, {"recover": section.model_dump(mode="json")}), out, original=MODEL)
    else:
        full = {} if how.full is None else {"full_layers": ranked(work, how.full)}
        {"window": retrofit.window, "convert": retrofit.convert}[how.verb](start, out=out, **how.options, **full)
    return str(out)


def ranked(work: Path, count: int) -> list[int]:
    """The layers that need full attention most."""
    from retrofit.checkpoint.provenance import read_provenance

    (step,) = read_provenance(Path(checkpoint(work, RANKED)))["steps"]
    return sorted(step["result"]["choice"]["ranking"][:count])


def _at_8k(books: Path, work: Path, name: str, folder: str, cache: str | None) -> dict[str, Any]:
    """Text, passages out of sight, needles and short prompts within the model's own positions."""
    import retrofit
    from retrofit.model.cache_dtype import AUTO, cache_bytes
    from retrofit.model.folder import opened
    from retrofit.model.source import resolve

    usual: dict[str, Any] = {"documents": 1, "no_cost": True, **({"kv_cache_dtype": cache} if cache else {})}
    place = work / "losses" / name
    place.mkdir(parents=True, exist_ok=True)
    text = retrofit.evaluate(
        folder,
        text=pieces(books, work / "text", LENGTH),
        lengths=[LENGTH],
        common_knowledge=True,
        out=place / "text.npz",
        **NEEDLES,
        **usual,
    )
    again = passages(books, work / "passages")
    retrofit.evaluate(folder, text=again, lengths=[PASSAGE + APART], out=place / "passages.npz", **usual)
    spec = opened(resolve(folder).folder).spec
    cells = text.long_context.needle.cells
    return {
        "kv_cache_bytes": {n: cache_bytes(spec, n, cache or AUTO, value_bytes=2) for n in (LENGTH, FAR_LENGTH)},
        "novels": _ratio(work, name, "text", LENGTH),
        "passages": _copies(work, name),
        "needles": {
            "found": sum(cell.found for cell in cells),
            "of": len(cells),
            "loss": sum(cell.answer.loss for cell in cells) / len(cells),
        },
        "common_knowledge": _short_prompts(work, name),
    }


def _at_32k(books: Path, work: Path, name: str, folder: str) -> dict[str, Any]:
    """Text at four times the positions: the base of the position encoding is raised where layers see everything."""
    import retrofit

    out, place = work / name, work / "losses" / name
    place.mkdir(parents=True, exist_ok=True)
    retrofit.extend(folder, length=FAR_LENGTH, method="ntk", out=out)
    text = pieces(books, work / "text-32k", FAR_LENGTH)[:2]
    retrofit.evaluate(out, text=text, lengths=[LENGTH, FAR_LENGTH], documents=1, no_cost=True, out=place / "text.npz")
    lengths = (LENGTH, FAR_LENGTH)
    return {"novels": {n: _ratio(work, name, "text", n, f"original{FAR}") for n in lengths}}


def pieces(books: Path, folder: Path, tokens: int) -> list[str]:
    """A file for every novel that is long enough: more than `tokens` tokens of it, from its first quarter on."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for novel in sorted(books.glob("*.txt")):
        text = novel.read_text("utf-8")
        start = text.find("\n\n", len(text) // 4) + 2
        if len(text) - start >= 6 * tokens:
            found.append(folder / novel.name)
            found[-1].write_text(text[start : start + CHARS * tokens], encoding="utf-8")
    return [str(file) for file in found]


def passages(books: Path, folder: Path) -> list[str]:
    """A file for every novel: APART tokens of it, and then its beginning once more."""
    from retrofit.model.load import load_tokenizer
    from retrofit.model.source import resolve

    tokenizer = load_tokenizer(resolve(MODEL).folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for novel in sorted(books.glob("*.txt")):
        text = novel.read_text("utf-8")
        start = text.find("\n\n", len(text) // 2) + 2
        ids = tokenizer(text[start : start + CHARS * APART], add_special_tokens=False, verbose=False)["input_ids"]
        again = tokenizer.decode(ids[:APART]) + tokenizer.decode(ids[: 2 * PASSAGE])
        found.append(folder / novel.name)
        found[-1].write_text(again, encoding="utf-8")
    return [str(file) for file in found]


def _losses(work: Path, name: str, what: str) -> Any:
    from retrofit.evaluation.scoring.losses import TokenLosses

    return TokenLosses.load(work / "losses" / name / f"{what}.npz")


def _ratio(work: Path, name: str, what: str, length: int, original: str = "original") -> dict[str, float]:
    """Perplexity over that of the original on the same tokens, with its paired 95% interval over documents."""
    from retrofit.evaluation.metrics.bootstrap import ratio_interval
    from retrofit.evaluation.metrics.perplexity import perplexity

    new, old = (_losses(work, one, what).at(length) for one in (name, original))
    interval = ratio_interval(new, old)
    return {
        "perplexity": perplexity(new),
        "ratio": interval.value,
        "low": interval.low,
        "high": interval.high,
        "tokens": sum(len(one) for one in new),
    }


def _copies(work: Path, name: str) -> dict[str, float]:
    """Loss of the second copies, in nats per token, and what it rises by over the original's."""
    import numpy as np

    counted = PASSAGE - RECOGNISED
    new, old = (
        np.concatenate([one[-counted:] for one in _losses(work, which, "passages").at(PASSAGE + APART)])
        for which in (name, "original")
    )
    return {"loss": float(new.mean()), "rise": float((new - old).mean()), "tokens": len(new)}


def _short_prompts(work: Path, name: str) -> dict[str, Any]:
    """Questions of common knowledge, paired with the original's answers."""
    from retrofit.evaluation.tasks.answers import beside, changes, from_file

    files = [beside(work / "losses" / one / "text.npz") for one in ("original", name)]
    [(before, after)] = zip(*(from_file(file).values() for file in files), strict=True)
    change = changes(before, after)[0]
    return {key: getattr(change, key) for key in ("questions", "before", "after", "lost", "gained", "p")}


def save(work: Path, out: Path) -> None:
    """Write the results of all parts that --work holds."""
    rows = {name: json.loads(file.read_text("utf-8")) for name, file in _known(work)}
    labels = {name: vars(EVERY[name.removesuffix(FAR)]) for name in rows}
    record = {
        "command": "OMP_NUM_THREADS=1 python -m evals.benchmarks.windows --books DIR --work DIR",
        "machine": machine(),
        "rows": {name: {**labels[name], **row} for name, row in rows.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "windows.json", record)
    record = json.loads((out / "windows.json").read_text("utf-8"))
    (out / "windows.md").write_text(table(record), encoding="utf-8")
    (out / "windows.svg").write_text(chart(record), encoding="utf-8")


def _known(work: Path) -> Iterator[tuple[str, Path]]:
    return ((name, result_file(work, name)) for name in PARTS if result_file(work, name).exists())


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(to_json(values) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
