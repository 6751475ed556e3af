"""The text source `self`: how much the original model is asked to write, the same for every step of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retrofit.data.sources import OWN_SAMPLES
from retrofit.recipe.schema import Recipe, TextSource

if TYPE_CHECKING:
    from retrofit.data.samples import Teacher
    from retrofit.model.folder import ModelFolder

SAMPLED_TOKENS = 20_480  # to train on, at least: as `data.samples.Teacher` asks for
HELD_OUT_TOKENS = 4_096  # to measure with, at least
MOST_SAMPLED = 524_288  # for training, which may read them again
SPARE = 1.25  # times what is read once: read again as text, samples may have fewer tokens
DOCUMENTS = 2  # times those that are measured: some are too short when they are read again
SAMPLE = 512  # tokens of one, `data.samples.SAMPLE_TOKENS`


def sampled_tokens(text: Sequence[TextSource], tokens: int) -> int:
    """Tokens that the original is asked to write to train on, for the source `self`: what the source says, else enough
    for its share of `tokens`, and the same number for every recipe where that suffices. 0 where it is not among the
    sources."""
    found = 0
    for source in text:
        if source.source == OWN_SAMPLES:
            enough = math.ceil(SPARE * tokens * _share(source, text))
            found = max(found, source.tokens or max(SAMPLED_TOKENS, enough))
    return found


def samples_of(recipe: Recipe, model: ModelFolder, device: str) -> Teacher:
    """The original model, for text that it samples itself: the same text in every step. Training reads what there is
    again rather than have more than `MOST_SAMPLED` tokens written."""
    from retrofit.data.samples import Teacher

    return Teacher(
        model, tokens=train_tokens(recipe), held_out=held_out_tokens(recipe), seed=recipe.seed, device=device
    )


def train_tokens(recipe: Recipe) -> int:
    """Tokens that the original is asked to write to train on, where a source does not say: what the step that reads
    most of them needs."""
    tokens = [SAMPLED_TOKENS]
    if recipe.convert and recipe.convert.calibrates:
        calibration = recipe.convert.calibration
        tokens.append(sampled_tokens(calibration.text, calibration.tokens))
    if recipe.window:
        tokens.append(sampled_tokens(recipe.window.calibration.text, recipe.window.calibration.tokens))
    if recipe.recover:
        tokens.append(min(MOST_SAMPLED, sampled_tokens(recipe.recover.text, recipe.recover.tokens)))
    return max(tokens)


def held_out_tokens(recipe: Recipe) -> int:
    """Tokens that the original is asked to write to measure with: enough for the held-out loss of a training, and for
    the documents of an evaluation."""
    found = HELD_OUT_TOKENS
    if recipe.recover:
        shares = [_share(source, recipe.recover.text) for source in recipe.recover.text if _is_own(source)]
        found = max([found, *(math.ceil(SPARE * recipe.recover.eval_tokens * share) for share in shares)])
    if recipe.evaluate and any(map(_is_own, recipe.evaluate.text)):
        found = max(found, DOCUMENTS * recipe.evaluate.documents * SAMPLE)
    return found


def sampled_in(recipe: Recipe, step: str) -> int:
    """Tokens that the original writes in this step of a recipe ("convert", "window", "recover", "evaluate"), in a plan:
    whatever an earlier step has not had written already."""
    written: dict[tuple[object, ...], int] = {}
    done: dict[str, int] = {}
    sections = (
        ("convert", recipe.convert.calibration.text if recipe.convert and recipe.convert.calibrates else (), True),
        ("window", recipe.window.calibration.text if recipe.window else (), True),
        ("recover", recipe.recover.text if recipe.recover else (), True),
        ("evaluate", recipe.evaluate.text if recipe.evaluate else (), False),
    )
    for name, text, trains in sections:
        before = sum(written.values())
        for source in filter(_is_own, text):
            own = (source.temperature, source.top_p, source.prompts, source.prompt_share)
            if trains:
                written["train", *own] = max(written.get(("train", *own), 0), source.tokens or train_tokens(recipe))
            if name not in ("convert", "window"):
                written["held-out", *own] = held_out_tokens(recipe)
        done[name] = sum(written.values()) - before
    return done[step]


def _is_own(source: TextSource) -> bool:
    return source.source == OWN_SAMPLES


def _share(source: TextSource, text: Sequence[TextSource]) -> float:
    return source.weight / sum(other.weight for other in text)
