"""What the original and the result write after the same prompts, side by side."""

from __future__ import annotations

from pathlib import PurePath

from retrofit.report.data import RunData
from retrofit.report.parts import Passage


def passages(run: RunData) -> tuple[Passage, ...]:
    """Each prompt with the continuations of the original and of the final model, where they were written."""
    models = [model for model in (run.original, run.final) if model is not None and model.continuations]
    prompts = dict.fromkeys((one.source, one.prompt) for model in models for one in model.continuations)
    return tuple(
        Passage(
            f"the beginning of {PurePath(source).name or source}" if source else "a built-in prompt",
            prompt,
            tuple(
                (model.label, one.text)
                for model in models
                for one in model.continuations
                if (one.source, one.prompt) == (source, prompt)
            ),
        )
        for source, prompt in prompts
    )


def about(run: RunData) -> str:
    """How they were written; empty where none were."""
    tokens = [one.tokens for model in run.models for one in model.continuations]
    if not tokens:
        return ""
    return (
        f"The likeliest token each time, up to {max(tokens)} of them, with no chat template. Examples give an "
        "impression; only the numbers compare the models."
    )
