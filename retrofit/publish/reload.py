"""Proof that a stranger gets the model that was measured.

A fresh, isolated process with stock transformers, which cannot import this package and has no network, loads the
folder, scores the first tokens of every recorded document again and runs the load snippet of the card. Its losses are
compared with the recorded ones; nothing is called final before they agree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrofit.errors import UserError
from retrofit.publish.snippet import snippet_of, with_model_id

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.evaluate.losses import Document, TokenLosses

CHILD = Path(__file__).with_name("reload_child.py")
CHUNK = 256
# What may leak a setting of this process into the fresh one; the token has no business there either.
_DROPPED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "PYTHONPATH", "PYTHONSTARTUP")


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


def reload_and_score(
    folder: str | Path,
    documents: Sequence[Document],
    recorded: TokenLosses,
    *,
    tokens: int = 1024,
    dtype: str | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> ReloadReport:
    """Load `folder` in a fresh process and compare the losses of the first `tokens` tokens of every document.

    documents: as they were scored, in the order of `recorded`. dtype: of the computation; by default the one that
    `recorded.meta` names. The folder's README.md must hold the load snippet: it is executed. timeout: seconds.

    Of a position encoding that changes with the length, no more tokens than a recorded pass has whose frequencies are
    the ones of a short text.

    Raises UserError when there is no such pass, when the process fails, when a tensor is missing, unexpected or of
    another shape, when the class is not one of transformers, or when losses differ by more than the dtype's tolerance.
    """
    folder = Path(folder).absolute()
    dtype = dtype or str(recorded.meta.get("dtype"))
    if dtype not in TOLERANCES:
        raise UserError(f"no tolerance is known for dtype {dtype}", fix=f"use one of {', '.join(TOLERANCES)}")
    assert tuple(document.name for document in documents) == recorded.documents, "documents in another order"
    if not (folder / "README.md").is_file():
        raise UserError("the folder has no card", where=str(folder), fix="retrofit run RECIPE --from publish")
    snippet = with_model_id(snippet_of((folder / "README.md").read_text(encoding="utf-8")), str(folder))
    tokens, losses = _comparable(recorded, tokens)
    if progress:
        progress.start("reload in a fresh process", None, "document")
    with tempfile.TemporaryDirectory(prefix="reload-") as work:
        job: dict[str, Any] = {
            "folder": str(folder),
            "dtype": dtype,
            "chunk": CHUNK,
            "snippet": snippet,
            "documents": f"{work}/documents.npz",
            "losses": f"{work}/losses.npz",
            "result": f"{work}/result.json",
        }
        # A document may be longer than what was scored of it: windows that move read on.
        ids: dict[str, Any] = {
            f"d{i:06d}": document.input_ids[: min(tokens, len(scored) + 1)]
            for i, (document, scored) in enumerate(zip(documents, recorded.losses, strict=True))
        }
        np.savez(job["documents"], **ids)
        result = _run(job, Path(work), timeout)
        with np.load(job["losses"], allow_pickle=False) as found:
            fresh = [found[key] for key in sorted(ids)]
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
    return tokens, recorded.at(tokens)


def nothing_to_compare(rope_type: str, until: int) -> UserError:
    """Of positions that change beyond `until` tokens, when only longer texts are scored."""
    return UserError(
        f"`{rope_type}` positions change beyond {until:,} tokens, and nothing shorter is scored that the reloaded "
        "checkpoint could be compared with",
        where="evaluate.lengths",
        fix=f"add a length of at most {until}",
    )


def _run(job: Mapping[str, Any], work: Path, timeout: float | None) -> dict[str, Any]:
    """Start the child isolated (-I), elsewhere and offline; UserError with the end of its output when it fails."""
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in _DROPPED}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-I", str(CHILD), str(work / "job.json")]
    try:
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the fresh process did not finish in {timeout:.0f} s", where=job["folder"]) from error
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        raise UserError(
            "a fresh process with stock transformers cannot load and run this folder:\n  " + "\n  ".join(last),
            where=job["folder"],
            fix="nothing was published; the lines above are the end of that process's output",
        )
    return json.loads(Path(job["result"]).read_text(encoding="utf-8"))


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
