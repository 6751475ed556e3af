"""Two models side by side from their stored token losses, paired token by token. numpy only; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retrofit.errors import UserError
from retrofit.evaluate.bootstrap import ratio_interval
from retrofit.evaluate.losses import TokenLosses
from retrofit.evaluate.perplexity import ALL, prefix, prefix_ppl

MODELS = ("recovered", "extended", "converted", "original")


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


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison. a, b: what was compared, as people call it."""

    a: str
    b: str
    rows: tuple[Compared, ...]


def compare(
    a: Path, b: Path, *, lengths: Sequence[int] | None = None, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compare two stored results: run folders (their last model), or .npz files of token losses.

    lengths: by default powers of two up to the shorter of the two, from 512 on, and that length itself.
    Raises UserError when tokenizers or texts differ, or when a document is shorter than a length.
    """
    path_a, path_b = stored_losses(a), stored_losses(b)
    losses_a, losses_b = TokenLosses.load(path_a), TokenLosses.load(path_b)
    _require_same(losses_a, losses_b, f"{path_a} and {path_b}")
    shortest = min(len(array) + 1 for array in (*losses_a.losses, *losses_b.losses))
    chosen = sorted(set(lengths)) if lengths else default_lengths(shortest)
    rows = []
    for kind in (*dict.fromkeys(losses_a.kinds), ALL):
        kind_a, kind_b = (one if kind == ALL else one.of_kind(kind) for one in (losses_a, losses_b))
        for length in chosen:
            arrays_a, arrays_b = prefix(kind_a.losses, length), prefix(kind_b.losses, length)
            interval = ratio_interval(arrays_b, arrays_a, resamples=resamples, seed=seed)
            rows.append(
                Compared(
                    kind=kind,
                    length=length,
                    tokens=sum(len(array) for array in arrays_a),
                    ppl_a=prefix_ppl(kind_a.losses, length),
                    ppl_b=prefix_ppl(kind_b.losses, length),
                    ratio=interval.value,
                    low=interval.low,
                    high=interval.high,
                    unit=interval.unit,
                )
            )
    return Comparison(_label(a, losses_a), _label(b, losses_b), tuple(rows))


def default_lengths(longest: int) -> list[int]:
    """Powers of two from 512 below `longest`, and `longest`."""
    powers = [2**power for power in range(9, 31) if 2**power < longest]
    return [*powers, longest]


def stored_losses(path: Path) -> Path:
    """The .npz meant: the file itself, or that of the last model of a run folder."""
    path = Path(path)
    if path.is_file():
        return path
    for model in MODELS:
        found = path / "losses" / f"{model}.npz"
        if found.is_file():
            return found
    raise UserError(
        "there are no token losses here",
        where=str(path),
        fix="name a run folder that has evaluated, or a file of `retrofit evaluate MODEL --out FILE.npz`",
    )


def _require_same(a: TokenLosses, b: TokenLosses, where: str) -> None:
    """Losses are comparable when the same tokenizer read the same texts; a shorter cut of them is the same text."""
    if a.meta.get("tokenizer_sha256") != b.meta.get("tokenizer_sha256"):
        raise UserError(
            "these losses were made with different tokenizers, and a loss per token cannot be compared between them",
            where=where,
            fix="compare the bits per byte that `retrofit evaluate` shows",
        )
    same_names = (a.documents, a.kinds) == (b.documents, b.kinds)
    cut = min((len(x) for x in (*a.losses, *b.losses)), default=0)
    same_bytes = same_names and all(
        (x[:cut] == y[:cut]).all() for x, y in zip(a.token_bytes, b.token_bytes, strict=True)
    )
    if a.meta.get("documents_sha256") != b.meta.get("documents_sha256") and not same_bytes:
        raise UserError(
            "these losses are of different texts",
            where=where,
            fix="evaluate both models with the same --text or --suite and --lengths",
        )


def _label(path: Path, losses: TokenLosses) -> str:
    return f"{Path(path).name} ({losses.meta.get('model', 'model')})"
