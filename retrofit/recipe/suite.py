"""An evaluation suite: lengths and texts with a name, for `evaluate --suite`."""

from __future__ import annotations

from pydantic import Field

from retrofit.recipe.evaluation import Evaluate
from retrofit.recipe.values import NAME


class Suite(Evaluate):
    """The `evaluate` section of a recipe, kept in a file of its own so that models are measured alike."""

    name: str = Field(pattern=NAME, max_length=100, description="what the suite is called")
    description: str = Field("", max_length=100_000, description="what it measures")

    def evaluation(self) -> Evaluate:
        """The section without its name."""
        return Evaluate.model_validate(self.model_dump(exclude={"name", "description"}))
