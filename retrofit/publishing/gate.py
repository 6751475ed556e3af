"""The gate: what a recipe requires of the measured numbers. Torch-free.

It fails closed: a metric that was not measured, is NaN or infinite, or a bound that cannot be read does not pass.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from retrofit.errors import GateError
from retrofit.recipe.schema import parse_bound

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class GateResult:
    """One requirement: `value` is None when it was not measured; `reason` says in words how it ended."""

    metric: str
    bound: str
    value: float | None
    passed: bool
    reason: str


def check(require: Mapping[str, str], metrics: Mapping[str, float]) -> list[GateResult]:
    """Every requirement against what was measured, in the recipe's order. Raises nothing; see `enforce`."""
    return [_check(metric, bound, metrics) for metric, bound in require.items()]


def _check(metric: str, bound: str, metrics: Mapping[str, float]) -> GateResult:
    compared = parse_bound(bound)
    if compared is None:
        return GateResult(metric, bound, None, False, f"`{bound}` is not a bound")
    if metric not in metrics:
        close = difflib.get_close_matches(metric, list(metrics), n=1, cutoff=0.5)
        hint = f"; measured is for example {close[0]}" if close else ""
        return GateResult(metric, bound, None, False, f"was not measured{hint}")
    value = float(metrics[metric])
    if not math.isfinite(value):
        return GateResult(metric, bound, None, False, f"is {value}, not a finite number")
    passed = _COMPARE[compared[0]](value, compared[1])
    return GateResult(metric, bound, value, passed, f"is {value:.6g}, {'as' if passed else 'not'} {bound.strip()}")


def enforce(results: Sequence[GateResult], *, where: str | None = None, kept: Sequence[str] = ()) -> None:
    """Raises GateError that lists every requirement that is not met. kept: lines on what there is to look at."""
    unmet = [result for result in results if not result.passed]
    if not unmet:
        return
    listed = "".join(f"\n  - {result.metric} {result.reason} (required {result.bound.strip()})" for result in unmet)
    listed += "".join(f"\n  {line}" for line in kept)
    raise GateError(
        f"{len(unmet)} of {len(results)} requirements are not met, so nothing is published:{listed}",
        where=where or "`require` in the recipe",
        fix="recover with more tokens or convert less (a larger kv_heads), or relax the bound under `require`",
    )
