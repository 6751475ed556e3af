"""Proof that a stranger gets the model that was measured.

A fresh, isolated process with stock transformers, which cannot import this package and has no network, loads the
folder, scores the first tokens of every recorded document again and runs the load snippet that the card shows. Its
losses are compared with the recorded ones; nothing is called final before they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrofit.errors import UserError
from retrofit.format import same_losses
from retrofit.fresh import FreshError, run_fresh

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.data.documents import Document
    from retrofit.evaluation.scoring.losses import TokenLosses

CHILD = Path(__file__).with_name("reload_child.py")
CHUNK = 256
START_SECONDS = 300.0
SLOW_FLOPS = 1e9  # of a machine that this is tried on: products and bytes a second
SLOW_BYTES = 100e6
ROOM = 2 << 30  # bytes for activations and logits
TOKEN_ROOM = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a fresh process may take: seconds, and bytes of data."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed |difference| of one token's loss, and of the mean loss of 1024 tokens or more, in nats."""

    token: float
    mean: float

    def mean_of(self, tokens: int) -> float:
        """The mean of fewer tokens averages fewer roundings: their spread grows with the root."""
        return min(self.token, self.mean * max(1.0, 1024 / tokens) ** 0.5)


# Float32 differs by the order of summation only. With 8 (bfloat16) or 11 (float16) bits of mantissa another kernel
# rounds differently in every layer: single tokens move, their mean hardly. SmolLM2-135M, two documents of 1024 tokens:
# float32 2e-5 for a token and 1e-7 in the mean, bfloat16 0.35 and 2e-3.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(token=2e-3, mean=1e-4),
    "float16": Tolerance(token=0.25, mean=5e-3),
    "bfloat16": Tolerance(token=1.0, mean=2e-2),
}


def tolerance_of(dtype: str) -> Tolerance:
    """The tolerance of a dtype. Raises UserError where none is known."""
    if dtype not in TOLERANCES:
        raise UserError(f"no tolerance is known for dtype {dtype}", fix=f"use one of {', '.join(TOLERANCES)}")
    return TOLERANCES[dtype]


@dataclass(frozen=True)
class ReloadReport:
    """What the fresh process found. Differences are in nats; `worst` is the document with the largest of a token."""

    passed: bool
    problems: tuple[str, ...]
    dtype: str
    documents: int
    tokens: int
    tolerance_token: float
    tolerance_mean: float
    max_difference: float
    mean_difference: float
    worst: str
    architecture: str
    generated: str
    new_tokens: int
    seconds: float
    versions: dict[str, str]

    @property
    def in_words(self) -> str:
        """How near the losses are, beside the tolerance."""
        return same_losses(self.max_difference, self.tolerance_token, passed=self.passed)


def reload_and_score(
    folder: str | Path,
    documents: Sequence[Document],
    recorded: TokenLosses,
    *,
    tokens: int = 1024,
    snippet: str,
    dtype: str | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ReloadReport:
    """Load `folder` in a fresh process and compare the losses of the first `tokens` tokens of every document.

    documents: as they were scored, in the order of `recorded`. dtype: of the computation; by default the one that
    `recorded.meta` names. snippet: our own lines (`snippet.load_snippet`), executed in the folder as they stand in its
    card; the card itself is never read for what to run. limits: by default `limits_of` the folder.

    Of a position encoding that changes with the length, no more tokens than a recorded pass has whose frequencies are
    the ones of a short text.

    Raises UserError when there is no such pass, when the process fails, when a tensor is missing, unexpected or of
    another shape, when the class is not one of transformers, or when losses differ by more than the dtype's tolerance.
    """
    folder = Path(folder).absolute()
    dtype = dtype or str(recorded.meta.get("dtype"))
    tolerance_of(dtype)
    assert tuple(document.name for document in documents) == recorded.documents, "documents in another order"
    tokens, losses = _comparable(recorded, tokens)
    if progress:
        progress.start("reload in a fresh process", None, "document")
    # A document may be longer than what was scored of it: windows that move read on.
    ids = [
        document.input_ids[: min(tokens, len(scored) + 1)].tolist()
        for document, scored in zip(documents, recorded.losses, strict=True)
    ]
    job = {"dtype": dtype, "chunk": CHUNK, "snippet": snippet, "documents": ids}
    allowed = limits or limits_of(folder, sum(map(len, ids)))
    try:
        result = run_fresh(CHILD, job, seconds=allowed.seconds, memory=allowed.memory, cwd=folder)
    except FreshError as error:
        raise UserError(
            f"a fresh process with stock transformers cannot load and run this folder:\n  {error}",
            where=str(folder),
            fix="nothing was published; the lines above are the end of that process's output",
        ) from None
    fresh = [np.asarray(found, np.float32) for found in result["losses"]]
    if progress:
        progress.finish()
    report = _compare(recorded.documents, fresh, losses, dtype, result)
    if not report.passed:
        listed = "".join(f"\n  - {problem}" for problem in report.problems)
        raise UserError(
            f"a fresh process with stock transformers does not reproduce this model:{listed}",
            where=str(folder),
            fix="nothing was published; inspect the folder with `retrofit inspect`, and report this with the recipe",
        )
    return report


def _comparable(recorded: TokenLosses, tokens: int) -> tuple[int, Sequence[np.ndarray]]:
    """(tokens to score again, recorded losses of at least so many).

    The child reads in chunks, and frequencies follow the highest position of each: beyond `static_until` no pass over a
    whole length reads as it does. Raises UserError when no length up to there was scored.
    """
    if not recorded.by_length:
        return tokens, recorded.losses
    facts = recorded.meta["frequencies"]
    assert isinstance(facts, Mapping)
    until = int(facts["static_until"])
    inside = [length for length in recorded.by_length if length <= until]
    if not inside:
        raise nothing_to_compare(str(facts["rope_type"]), until)
    tokens = min(tokens, max(inside))
    return tokens, recorded.passed(tokens)


def nothing_to_compare(rope_type: str, until: int) -> UserError:
    """Of positions that change beyond `until` tokens, when only longer texts are scored."""
    return UserError(
        f"`{rope_type}` positions change beyond {until:,} tokens, and nothing shorter is scored that the reloaded "
        "checkpoint could be compared with",
        where="evaluate.lengths",
        fix=f"add a length of at most {until}",
    )


def limits_of(folder: Path, tokens: int) -> Limits:
    """Far more than a fresh process needs to score `tokens` tokens and to generate a few: for a slow machine, and for
    weights that are held twice in the widest dtype."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    # A product and a sum for each weight, of which none is stored in less than half a byte; read again for each token
    # that is generated.
    work = 4 * stored * tokens / SLOW_FLOPS + 100 * stored / SLOW_BYTES
    return Limits(seconds=START_SECONDS + work, memory=ROOM + 8 * stored + TOKEN_ROOM * tokens)


def _compare(
    documents: Sequence[str],
    fresh: Sequence[np.ndarray],
    recorded: Sequence[np.ndarray],
    dtype: str,
    result: Mapping[str, Any],
) -> ReloadReport:
    """fresh: losses of every document; recorded: as many or more."""
    tolerance = TOLERANCES[dtype]
    problems = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in result["loading"].items() if names]
    if not result["stock"]:
        problems.append(f"{result['architecture']} is not a class of transformers")
    if result["new_tokens"] < 1:
        problems.append("the load snippet generated nothing")
    token, mean, worst = 0.0, 0.0, ""
    for name, new, all_old in zip(documents, fresh, recorded, strict=True):
        old = np.asarray(all_old[: len(new)], np.float64)
        assert len(old) == len(new) > 0, f"{name}: {len(new)} losses against {len(old)} recorded"
        difference = np.asarray(new, np.float64) - old
        if not np.isfinite(difference).all():
            problems.append(f"{name}: a loss is not finite")
            token, worst = float("inf"), name
            continue
        if np.abs(difference).max() >= token:
            token, worst = float(np.abs(difference).max()), name
        mean = max(mean, abs(float(difference.mean())))
        allowed = tolerance.mean_of(len(difference))
        if np.abs(difference).max() > tolerance.token or abs(difference.mean()) > allowed:
            at = int(np.abs(difference).argmax())
            problems.append(
                f"{name}: mean loss {new.mean():.4f} against {old.mean():.4f} recorded; token {at + 1}: {new[at]:.4f} "
                f"against {old[at]:.4f} (allowed: {allowed:.2g} in the mean, {tolerance.token:g} for a token)"
            )
    return ReloadReport(
        passed=not problems,
        problems=tuple(problems),
        dtype=dtype,
        documents=len(fresh),
        tokens=sum(len(array) + 1 for array in fresh),
        tolerance_token=tolerance.token,
        tolerance_mean=tolerance.mean,
        max_difference=token,
        mean_difference=mean,
        worst=worst,
        architecture=result["architecture"],
        generated=result["generated"].strip(),
        new_tokens=result["new_tokens"],
        seconds=round(result["seconds"], 1),
        versions=result["versions"],
    )
