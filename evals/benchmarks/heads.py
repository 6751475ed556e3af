"""Head conversion by every method, each repair and a short distillation: perplexity against seconds of compute.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.heads --books DIR

Converts SmolLM2-135M from 3 to 1 KV heads in every layer and scores each checkpoint on prose that no fit has seen:
DIR/moby_dick.txt, where the other .txt files of DIR are the calibration text of the same kind. Without --books the
held-out documentation is scored, after calibration on the rest of the documentation. Rows that end in `, other text`
are calibrated on the built-in kinds of text other than that; --also FILE adds rows whose mix has the FILE too. Writes
results/kv_heads.json, .md and .svg, a row at a time; a row that is there already, measured with the same settings, is
not measured again, so an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shlex
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.benchmarks.heads_table import chart, table
from evals.benchmarks.heads_text import HELD_OUT, LENGTH, PIECES, Texts
from evals.benchmarks.recovery import machine
from retrofit.console import to_json

if TYPE_CHECKING:
    from retrofit.recipe.schema import Recover

RESULTS = Path(__file__).resolve().parents[1] / "results"
DISTIL = [50_000, 150_000, 500_000]


@dataclass(frozen=True)
class Row:
    """One line of the table. other_text: calibrated on other kinds of text than the table's; also: and on a file of
    this name. start: the row whose checkpoint it goes on from. tokens: of its training."""

    name: str
    method: str = "calibrated"
    repair: str = "none"
    other_text: bool = False
    also: str = ""
    start: str | None = None
    loss: str = ""
    tokens: int = 0


def rows(distil: Sequence[int], also: Sequence[Path] = ()) -> list[Row]:
    """Every row, cheap ones first."""
    found = [Row("first", "first"), Row("mean", "mean"), Row("procrustes", "procrustes"), Row("real-pca", "real-pca")]
    repairs = {"calibrated": "none", "+ o_proj": "o_proj", "+ o_proj + transfer": "transfer"}
    for name, repair in repairs.items():
        found += [Row(name, repair=repair), Row(f"{name}, other text", repair=repair, other_text=True)]
        for file in also:
            named = f"{name}, other text with {file.stem}"
            found.append(Row(named, repair=repair, other_text=True, also=file.name))
    best = "+ o_proj"
    for tokens in distil:
        found.append(Row(f"{best} + distillation, {tokens // 1000}k", start=best, loss="distill", tokens=tokens))
        found.append(Row(f"mean + LM LoRA, {tokens // 1000}k", start="mean", loss="lm", tokens=tokens))
    return found


def recipe(row: Row) -> Recover:
    """How a row is trained; the text is left to the benchmark."""
    from retrofit.recipe.schema import Recover

    return Recover(loss=row.loss, tokens=row.tokens, sequence_length=LENGTH)  # type: ignore[arg-type]


def settings(row: Row, chosen: Mapping[str, Row], tokens: int) -> dict[str, Any]:
    """What a row's numbers depend on, kept with them. tokens: of the calibration. A learning rate of None is that of
    the model's width."""
    found = {**vars(row), "calibration_tokens": tokens}
    if not row.also:
        del found["also"]
    if row.start:
        trained = recipe(row)
        found["start"] = settings(chosen[row.start], chosen, tokens)
        found |= {"rank": trained.adapter.rank, "alpha": trained.adapter.alpha, "learning_rate": trained.learning_rate}
    return found


def model_name(model: str) -> str:
    """A model as a title names it: the last part of a hub id or path."""
    from retrofit.model.source import EMBEDDED, EMBEDDED_MODEL

    return Path(EMBEDDED_MODEL if model == EMBEDDED else model).name


class Bench:
    """Text, model and results of one benchmark."""

    def __init__(
        self, model: str, books: Path | None, tokens: int, distil: Sequence[int], work: Path, also: Sequence[Path] = ()
    ) -> None:
        from retrofit.model.load import load_tokenizer
        from retrofit.model.source import resolve

        self.folder = resolve(model).folder
        self.work = work
        self.identity = [model, books is not None]
        self.texts = Texts(self.folder, load_tokenizer(self.folder), books, tokens, distil, also)
        self.documents = list(self.texts.scored())

    def score(self, folder: Path, kinds: Collection[str] = ()) -> Any:
        """Token losses of a checkpoint, of all kinds of text or of these."""
        from retrofit.evaluation.scoring.score import score
        from retrofit.model.load import load_model

        documents = [document for document in self.documents if not kinds or document.kind in kinds]
        return score(load_model(folder, dtype="float32"), documents, lengths=(LENGTH,))

    def convert(self, row: Row, out: Path) -> dict[str, Any]:
        """Convert as the row says."""
        from retrofit.kv_heads.convert import convert

        text = None
        if row.method not in ("first", "mean"):
            also = [self.texts.also[row.also]] if row.also else []
            text = self.texts.calibration([*self.texts.other, *also] if row.other_text else self.texts.same)
        began = cpu_seconds()
        report = convert(self.folder, out, kv_heads=1, method=row.method, repair=row.repair, text=text)  # type: ignore[arg-type]
        seconds = cpu_seconds() - began
        layers = [
            {"keys": layer.keys, "values": layer.values, "repairs": [vars(repair) for repair in layer.repairs]}
            for layer in report.layers
        ]
        return {"seconds": seconds, "layers": layers, "calibrated_on": report.tokens_by_kind}

    def train(self, row: Row, start: Path, out: Path) -> dict[str, Any]:
        """Adapters on the checkpoint of another row, on the calibration text's own sources."""
        from retrofit.recovery.train import recover

        section = recipe(row).model_copy(update={"text": tuple(self.texts.same)})
        text = self.texts.training(row.tokens)
        teacher = self.folder if row.loss == "distill" else None
        began = cpu_seconds()
        work = self.work / "training"
        report = recover(start, teacher, out, section, text, None, work_dir=work)
        shutil.rmtree(work, ignore_errors=True)
        return {"seconds": cpu_seconds() - began, "steps": report.steps, "compute": report.compute_dtype}

    def path(self, settings: Mapping[str, Any]) -> Path:
        """Where the checkpoint of a row with these settings is kept."""
        key = hashlib.sha256(json.dumps([self.identity, settings], sort_keys=True).encode()).hexdigest()[:8]
        return self.work / ("".join(c if c.isalnum() else "-" for c in settings["name"]) + f"-{key}")


def measured(losses: Any, original: Any) -> dict[str, Any]:
    """Perplexity by kind of `losses`, its ratio to the original's, and how much of the added loss few tokens carry."""
    import numpy as np

    found: dict[str, Any] = {}
    for kind in dict.fromkeys(losses.kinds):
        new, old = (np.concatenate(x.of_kind(kind).losses).astype(np.float64) for x in (losses, original))
        added = np.sort(new - old)[::-1]
        found[kind] = {
            "perplexity": float(np.exp(new.mean())),
            "ratio": float(np.exp(added.mean())),
            "tokens": len(new),
            "median_added": float(np.median(added)),
            "worse": float((added > 0).mean()),
            "share_of_dearest_tenth": float(added[: len(added) // 10].sum() / max(added.sum(), 1e-9)),
        }
    return found


def cpu_seconds() -> float:
    """Processor time of this process so far: what the work costs on one otherwise idle core."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="any model with 3 KV heads or more")
    parser.add_argument("--books", type=Path, help=f"folder with {HELD_OUT} and other novels")
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="text for the mix of other kinds; repeatable",
    )
    parser.add_argument("--tokens", type=int, default=49_152, help="calibration tokens")
    parser.add_argument("--distil", type=int, nargs="*", default=DISTIL, metavar="TOKENS")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="names of the rows to measure, in this order")
    parser.add_argument("--work", type=Path, help="keep the checkpoints here, so that later rows can start from them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def main() -> None:
    """Measure what is not measured yet, and write table and chart."""
    parser = _parser()
    options = parser.parse_args()
    if options.books and not (options.books / HELD_OUT).is_file():
        parser.error(f"{options.books} holds no {HELD_OUT}")
    for file in options.also:
        if not file.is_file():
            parser.error(f"--also: there is no {file}")
    chosen = {row.name: row for row in rows(options.distil, options.also)}
    names = options.only or list(chosen)
    for name in names:
        if name not in chosen:
            parser.error(f"`{name}` is not a row; there are: {', '.join(chosen)}")
    others = _others(_load(options.out), options)
    if others:
        parser.error(f"{options.out / 'kv_heads.json'} holds results of {others}: use another --out")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        bench = Bench(options.model, options.books, options.tokens, options.distil, work, options.also)
        original = bench.score(bench.folder)
        for name in names:
            _measure(bench, chosen[name], chosen, original, options)
    print(shown(_load(options.out)))


def _measure(
    bench: Bench, row: Row, chosen: Mapping[str, Row], original: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """The facts of a row: those in the results if they are of its settings, else measured now and added to them.

    A kind of text that the results lack is scored where the row's checkpoint is still at hand.
    """
    from retrofit.checkpoint.staging import staged
    from retrofit.model.load import multiplies_in_bfloat16

    own = settings(row, chosen, options.tokens)
    known = _load(options.out)["rows"].get(row.name)
    if known and known["settings"] == own:
        facts = dict(known)
        lacking = {document.kind for document in bench.documents} - set(facts["by_kind"])
        if lacking and bench.path(own).is_dir():
            facts["by_kind"] |= measured(bench.score(bench.path(own), lacking), original)
            _save(options, row.name, facts, measured(original, original))
        return facts
    before = 0.0
    if row.start:
        before = _measure(bench, chosen[row.start], chosen, original, options)["seconds"]
        start = bench.path(own["start"])
        if not start.is_dir():  # its row was measured in another work folder
            with staged(start) as out:
                bench.convert(chosen[row.start], out)
    with staged(bench.path(own), overwrite=True) as out:
        facts = bench.train(row, start, out) if row.start else bench.convert(row, out)
    facts["settings"] = own
    facts["machine"] = machine()
    facts["own_seconds"] = facts.pop("seconds")
    facts["bfloat16"] = multiplies_in_bfloat16("cpu")
    facts["seconds"] = facts["own_seconds"] + before
    facts["by_kind"] = measured(bench.score(bench.path(own)), original)
    _save(options, row.name, facts, measured(original, original))
    return facts


def _load(out: Path) -> dict[str, Any]:
    path = out / "kv_heads.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}


def _typed(record: Mapping[str, Any]) -> argparse.Namespace:
    """The options in the command that results carry."""
    _, _, given = record["command"].partition("evals.benchmarks.heads")
    return _parser().parse_args(shlex.split(given))


def _others(record: Mapping[str, Any], options: argparse.Namespace) -> str:
    """What the results are of, where that is not what these options ask for, and so no row can join them."""
    if not record["rows"]:
        return ""
    typed = _typed(record)
    if (typed.model, bool(typed.books), record["tokens"]) == (options.model, bool(options.books), options.tokens):
        return ""
    books = "with" if typed.books else "without"
    return f"--model {typed.model}, {books} --books, --tokens {record['tokens']}"


def _command(options: argparse.Namespace, found: Mapping[str, Any]) -> str:
    """The command that gives all rows, without places on this machine."""
    parts = [f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python -m evals.benchmarks.heads"]
    default = _parser().parse_args([])
    if options.model != default.model:
        parts.append(f"--model {shlex.quote(options.model)}")
    if options.books:
        parts.append("--books DIR")
    if options.tokens != default.tokens:
        parts.append(f"--tokens {options.tokens}")
    parts += [
        f"--also {shlex.quote(name)}"
        for name in dict.fromkeys(r["settings"].get("also") for r in found.values())
        if name
    ]
    trained = {row["settings"]["tokens"] for row in found.values()} - {0}
    if not trained <= set(DISTIL):
        parts.append(f"--distil {' '.join(map(str, sorted(trained)))}")
    return " ".join(parts)


def shown(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    if not record["rows"]:
        return "nothing measured yet"
    return table(record, model_name(_typed(record).model), f"{PIECES} pieces of {LENGTH:,} tokens")


def _save(options: argparse.Namespace, name: str, facts: dict[str, Any], original: dict[str, Any]) -> None:
    """Add a row to the results; two processes may measure rows of the same file, one after the other writes."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    before = _load(out)
    found = {**before["rows"], name: facts}
    record = {
        "command": _command(options, found),
        # Of the first row; those of other machines carry their own.
        "machine": before.get("machine", facts["machine"]),
        "tokens": options.tokens,
        "original": original,
        "rows": found,
    }
    path = out / "kv_heads.json"
    partial = path.with_suffix(".partial")
    partial.write_text(to_json(record) + "\n", encoding="utf-8")
    partial.replace(path)
    (out / "kv_heads.md").write_text(shown(record), encoding="utf-8")
    (out / "kv_heads.svg").write_text(chart(record), encoding="utf-8")
    print(f"{name}: {facts['seconds']:.0f} s, {facts['by_kind']}", flush=True)


if __name__ == "__main__":
    main()
