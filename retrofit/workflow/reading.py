"""How much text a recipe reads."""

from __future__ import annotations

from retrofit.data.packing import CHARS_PER_TOKEN
from retrofit.data.search_text import LONG_SEARCH
from retrofit.recipe.schema import Recipe

_USUALLY_READ = 1 << 25  # characters of a text that are compared with what is measured, at least


def most_read(recipe: Recipe, claimed: int) -> int:
    """Characters that the steps of a recipe, or of another one of usual size, read of one text source at most.

    claimed: tokens of the window after them.
    """
    convert, context, recover = recipe.convert, recipe.context, recipe.recover
    tokens = max(convert.calibration.tokens if convert else 0, recover.tokens if recover else 0)
    searched = LONG_SEARCH * claimed if context and context.searches else 0
    return max(_USUALLY_READ, CHARS_PER_TOKEN * tokens, searched)
