"""Two models side by side from their stored token losses, paired token by token, and from their stored answers to
tasks, paired question by question. numpy only; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrofit.errors import UserError
from retrofit.escape import shell_word
from retrofit.evaluation.metrics.bits import ComparedBits, compare_bits
from retrofit.evaluation.metrics.bootstrap import ratio_interval
from retrofit.evaluation.metrics.perplexity import ALL, bits_per_byte, perplexity
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.tasks.answers import FOLDER, TaskAnswers, TaskChange, beside, changes, from_file
from retrofit.workflow.journal import Entry, Journal

MODELS = ("recovered", "extended", "converted", "original")
_CHANGES = {"original": (), "converted": ("convert", "extend"), "extended": ("extend",)}  # steps that make a model


@dataclass(frozen=True)
class Compared:
    """Perplexities of two models on the same tokens. ratio [low, high]: ppl(b) / ppl(a) and its paired 95% interval."""

    kind: str
    length: int
    tokens: int
    ppl_a: float
    ppl_b: float
    ratio: float
    low: float
    high: float
    unit: str
    bpb_a: float | None = None
    bpb_b: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison. a, b: what was compared, as people call it.

    rows: perplexities, for one tokenizer. bits: bits per byte on the same bytes, when those were asked for. tasks: of
    those that both were asked. read: the dtype and kernel that each was read with. notes: what else than the model may
    make a difference.
    """

    a: str
    b: str
    rows: tuple[Compared, ...]
    bits: tuple[ComparedBits, ...] = ()
    tasks: tuple[TaskChange, ...] = ()
    read: tuple[str, str] = ("", "")
    notes: tuple[str, ...] = ()


def compare(
    a: Path,
    b: Path,
    *,
    lengths: Sequence[int] | None = None,
    bits: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two stored results: run folders (their last model), or .npz files of token losses.

    lengths: by default powers of two up to the shorter of the two, from 512 on, and that length itself; of positions
    that change with the length, those that both hold. bits: compare bits per byte on the same bytes and nothing else;
    the only comparison that two tokenizers allow.
    Raises UserError when tokenizers, texts or windows differ, when a document is shorter than a length, when a length
    is not held, and for losses that are not of the checkpoint that their run now holds.
    """
    path_a, path_b = stored_losses(a), stored_losses(b)
    losses_a, losses_b = TokenLosses.load(path_a), TokenLosses.load(path_b)
    where = f"{path_a} and {path_b}"
    tasks, more = _tasks(stored_answers(a, path_a), stored_answers(b, path_b), resamples, seed)
    if bits:
        _require_same_texts(losses_a, losses_b, where)
        found = _bits(losses_a, losses_b, where, resamples, seed)
        return _comparison(a, b, losses_a, losses_b, bits=found, tasks=tasks, more=more)
    _require_same(losses_a, losses_b, where)
    chosen = sorted(set(lengths)) if lengths else _held(losses_a, losses_b, where)
    rows = []
    for kind in (*dict.fromkeys(losses_a.kinds), ALL):
        kind_a, kind_b = (one if kind == ALL else one.of_kind(kind) for one in (losses_a, losses_b))
        for length in chosen:
            arrays_a, arrays_b = kind_a.at(length), kind_b.at(length)
            interval = ratio_interval(arrays_b, arrays_a, resamples=resamples, seed=seed)
            rows.append(
                Compared(
                    kind=kind,
                    length=length,
                    tokens=sum(len(array) for array in arrays_a),
                    ppl_a=perplexity(arrays_a),
                    ppl_b=perplexity(arrays_b),
                    ratio=interval.value,
                    low=interval.low,
                    high=interval.high,
                    unit=interval.unit,
                    bpb_a=bits_per_byte(kind_a, length),
                    bpb_b=bits_per_byte(kind_b, length),
                )
            )
    return _comparison(a, b, losses_a, losses_b, tuple(rows), tasks=tasks, more=more)


def _comparison(
    a: Path,
    b: Path,
    losses_a: TokenLosses,
    losses_b: TokenLosses,
    rows: tuple[Compared, ...] = (),
    bits: tuple[ComparedBits, ...] = (),
    tasks: tuple[TaskChange, ...] = (),
    more: tuple[str, ...] = (),
) -> Comparison:
    both = [(what, str(losses_a.meta.get(what)), str(losses_b.meta.get(what))) for what in ("dtype", "kernel")]
    notes = tuple(
        f"a was read with {what} {of_a}, b with {of_b}: part of the difference may be rounding"
        for what, of_a, of_b in both
        if of_a != of_b
    )
    read_a, read_b = (", ".join(f"{one[0]} {one[i]}" for one in both) for i in (1, 2))
    return Comparison(_label(a, losses_a), _label(b, losses_b), rows, bits, tasks, (read_a, read_b), (*notes, *more))


def _tasks(
    a: Mapping[str, TaskAnswers], b: Mapping[str, TaskAnswers], resamples: int, seed: int
) -> tuple[tuple[TaskChange, ...], tuple[str, ...]]:
    """Both models on the questions that both were asked, and notes on tasks that have none."""
    rows, notes = [], []
    for name in (name for name in a if name in b):
        found = changes(a[name], b[name], resamples=resamples, seed=seed)
        rows += found
        if not set(a[name].asked) & set(b[name].asked):
            notes.append(
                f"task {name}: a and b were asked no question alike (other data, or another number of examples)"
            )
    return tuple(rows), tuple(notes)


def stored_answers(path: Path, losses: Path) -> dict[str, TaskAnswers]:
    """The answers to tasks that belong to stored losses: of the same model of a run folder, or beside a .npz.

    Raises UserError for answers that are not those that the run recorded.
    """
    if Path(path).is_file():
        file = beside(losses)
        return from_file(file) if file.is_file() else {}
    journal = Journal(Path(path))
    found: dict[str, TaskAnswers] = {}
    for file in sorted((Path(path) / FOLDER / losses.stem).glob("*.json")):
        answers = from_file(file)
        for name in answers:
            entry = journal.latest(f"evaluate:{losses.stem}:{name}")
            if entry is None or not journal.intact(entry):
                raise UserError(
                    "these answers are not those that the run recorded",
                    where=str(file),
                    fix=_again(Path(path)),
                )
            _require_unchanged(Path(path), losses.stem, journal, entry, file)
        found |= answers
    return found


def _held(a: TokenLosses, b: TokenLosses, where: str) -> list[int]:
    """The lengths to compare at when none is named: usual ones, or those that both were scored at."""
    usual = default_lengths(min(len(array) + 1 for array in (*a.losses, *b.losses)))
    held = [n for n in sorted({*usual, *a.by_length, *b.by_length}) if a.holds(n) and b.holds(n)]
    if not held:
        raise UserError(
            "the positions change with the length, and no length was scored in both",
            where=where,
            fix="evaluate both models with the same --lengths",
        )
    return held


def default_lengths(longest: int) -> list[int]:
    """Powers of two from 512 below `longest`, and `longest`."""
    powers = [2**power for power in range(9, 31) if 2**power < longest]
    return [*powers, longest]


def stored_losses(path: Path) -> Path:
    """The .npz meant: the file itself, or that of the last model of a run folder.

    Raises: UserError when there is none, or when the run has changed the model since.
    """
    path = Path(path)
    if path.is_file():
        return path
    for model in MODELS:
        found = path / "losses" / f"{model}.npz"
        if found.is_file():
            _require_current(path, model, found)
            return found
    raise UserError(
        "there are no token losses here",
        where=str(path),
        fix="name a run folder that has evaluated, or a file of `retrofit evaluate MODEL --out FILE.npz`",
    )


def _again(run: Path) -> str:
    return f"run the recipe again: retrofit run {shell_word(run / 'recipe.yaml')} --out {shell_word(run)}"


def _require_current(run: Path, model: str, losses: Path) -> None:
    """The losses are those the journal names, and nothing changed the model after they were scored."""
    journal = Journal(run)
    entry = journal.latest(f"evaluate:{model}")
    again = _again(run)
    if entry is None or not journal.intact(entry):
        raise UserError("these token losses are not those that the run recorded", where=str(losses), fix=again)
    _require_unchanged(run, model, journal, entry, losses)


def _require_unchanged(run: Path, model: str, journal: Journal, entry: Entry, file: Path) -> None:
    """Nothing changed the model after this entry of the journal, which made `file`."""
    later = [other.step for other in journal.entries[journal.entries.index(entry) + 1 :]]
    changed = [step for step in _CHANGES.get(model, ("convert", "extend", "recover")) if step in later]
    if changed:
        raise UserError(
            f"this was measured on another revision of the model: `{changed[0]}` was done again after it",
            where=str(file),
            fix=_again(run),
        )


def _bits(a: TokenLosses, b: TokenLosses, where: str, resamples: int, seed: int) -> tuple[ComparedBits, ...]:
    pairs = [(kind, a.of_kind(kind), b.of_kind(kind)) for kind in dict.fromkeys(a.kinds)] + [(ALL, a, b)]
    return tuple(compare_bits(x, y, kind, where=where, resamples=resamples, seed=seed) for kind, x, y in pairs)


def _require_same_texts(a: TokenLosses, b: TokenLosses, where: str) -> None:
    """The same texts in the same order, however many tokens of each were read."""
    texts = [losses.meta.get("texts_sha256") for losses in (a, b)]
    known = isinstance(texts[0], list) and None not in texts[0]
    if (a.documents, a.kinds) != (b.documents, b.kinds) or texts[0] != texts[1] or not known:
        raise UserError(
            "these losses are not known to be of the same texts",
            where=where,
            fix="evaluate both models with the same --text or --suite and --documents",
        )


def _require_same(a: TokenLosses, b: TokenLosses, where: str) -> None:
    """Losses are comparable when the same tokenizer read the same texts; a shorter cut of them is the same text."""
    if a.meta.get("tokenizer_sha256") != b.meta.get("tokenizer_sha256"):
        raise UserError(
            "these losses were made with different tokenizers, and a loss per token cannot be compared between them",
            where=where,
            fix="compare bits per byte: add --bits-per-byte",
        )
    if a.meta.get("windows") != b.meta.get("windows"):
        raise UserError(
            "these losses were scored with different amounts of context",
            where=where,
            fix="evaluate both models with the same options",
        )
    same_names = (a.documents, a.kinds) == (b.documents, b.kinds)
    cut = min((len(x) for x in (*a.losses, *b.losses)), default=0)
    same_bytes = same_names and all(
        (x[:cut] == y[:cut]).all() for x, y in zip(a.token_bytes, b.token_bytes, strict=True)
    )
    texts = [losses.meta.get("texts_sha256") for losses in (a, b)]
    if a.meta.get("documents_sha256") != b.meta.get("documents_sha256") and not (same_bytes and texts[0] == texts[1]):
        raise UserError(
            "these losses are of different texts, or of another revision of the same",
            where=where,
            fix="evaluate both models with the same --text or --suite and --lengths",
        )


def _label(path: Path, losses: TokenLosses) -> str:
    return f"{Path(path).name} ({losses.meta.get('model', 'model')})"
