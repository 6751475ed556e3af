"""The text source `self`: how much the original model is asked to write, the same for every step of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retrofit.recipe.schema import Recipe, TextSource

if TYPE_CHECKING:
    from retrofit.data.samples import Teacher
    from retrofit.model.folder import ModelFolder

SAMPLED_TOKENS = 20_480  # as `data.samples.Teacher` asks for: one batch
MOST_SAMPLED = 65_536  # for training, which may read them again
SAMPLE_ROWS = 40  # texts that it writes at a time


def sampled_tokens(text: Sequence[TextSource], tokens: int) -> int:
    """Tokens that the original is asked to write, for the source `self`: enough for its share of `tokens` without what
    is held out, and the same number for every recipe where that suffices. 0 where it is not among the sources."""
    total = sum(source.weight for source in text)
    own = sum(source.weight for source in text if source.source == "self")
    return max(SAMPLED_TOKENS, math.ceil(1.25 * tokens * own / total)) if own else 0


def samples_of(recipe: Recipe, model: ModelFolder, device: str) -> Teacher:
    """The original model, for text that it samples itself: the same text in every step. Training reads what there is
    again rather than have more than `MOST_SAMPLED` tokens written."""
    from retrofit.data.samples import Teacher

    tokens = SAMPLED_TOKENS
    if recipe.convert and recipe.convert.calibrates:
        calibration = recipe.convert.calibration
        tokens = max(tokens, sampled_tokens(calibration.text, calibration.tokens))
    if recipe.recover:
        tokens = max(tokens, min(MOST_SAMPLED, sampled_tokens(recipe.recover.text, recipe.recover.tokens)))
    return Teacher(model, tokens=tokens, seed=recipe.seed, device=device)
