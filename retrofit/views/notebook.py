"""Results in a notebook: the tables that the terminal shows, as HTML."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from retrofit.tables import Part, as_html
from retrofit.views import budget, measured, releases, results, windows

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

VIEWS: Mapping[str, Callable[[Any], Iterable[Part]]] = {
    "RunResult": results.run,
    "Plan": results.plan,
    "PriceList": results.prices,
    "WindowList": windows.prices,
    "BudgetList": budget.budget,
    "Inspection": results.inspection,
    "Undescribed": results.inspection,
    "Written": results.written,
    "ModelEvaluation": measured.evaluation,
    "Comparison": measured.comparison,
    "Certified": releases.certified,
    "Exported": releases.exported,
    "Published": releases.published,
    "Repaired": releases.repaired,
    "Health": results.health,
}
"""By the name of a result's class: importing them all would import torch."""


def as_tables(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, whose results a notebook shows as tables."""

    @functools.wraps(function)
    def run(*args: Parameters.args, **named: Parameters.kwargs) -> Result:
        result = function(*args, **named)
        kind: Any = type(result)
        if view := VIEWS.get(kind.__name__):
            kind._repr_html_ = lambda shown: as_html(view(shown))
        return result

    return run
