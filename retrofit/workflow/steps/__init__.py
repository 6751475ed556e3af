"""The steps, in the order of a run. A new one is a module here and a line in `STEPS`."""

from __future__ import annotations

from retrofit.recipe.schema import Recipe
from retrofit.workflow.step import Step
from retrofit.workflow.steps.convert import Convert
from retrofit.workflow.steps.evaluate import Evaluate
from retrofit.workflow.steps.extend import Extend
from retrofit.workflow.steps.publish import Publish
from retrofit.workflow.steps.recover import Recover
from retrofit.workflow.steps.window import Window

STEPS: dict[str, type[Step]] = {
    "convert": Convert,
    "window": Window,
    "context": Extend,
    "recover": Recover,
    "evaluate": Evaluate,
    "publish": Publish,
}
"""By the section of a recipe that asks for it."""
FOLDERS = {step.name: f"{number}-{step.name}" for number, step in enumerate(STEPS.values(), start=1)}


def steps_of(recipe: Recipe) -> tuple[Step, ...]:
    """The steps that a recipe has, in order."""
    asked = ((step, getattr(recipe, section)) for section, step in STEPS.items())
    return tuple(step(recipe, section) for step, section in asked if section is not None)
