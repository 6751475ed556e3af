"""What the step `window` and the list of windows share: the target, the text, and the choice of full layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import UserError
from retrofit.recipe.layers import how_many
from retrofit.recipe.schema import Window as Section
from retrofit.windows import NEEDLE_ROWS, row_length

if TYPE_CHECKING:
    from retrofit.data.calibration import CalibrationText
    from retrofit.model.folder import ModelFolder
    from retrofit.model.spec import AttentionSpec
    from retrofit.windows.outcome import Choice
    from retrofit.windows.probes import Needles
    from retrofit.windows.rows import Repeats
    from retrofit.windows.targets import Target
    from retrofit.workflow.context import ModelContext

WINDOWS = 4
"""In a sequence that windows are fitted on, where nobody says how long it is and the context holds as many."""


@dataclass(frozen=True)
class Texts:
    """fit: what sinks and repairs are fitted on. rows: of other text, what losses are measured on; hidden: of the same,
    needles, None where a window has no room for one."""

    fit: CalibrationText
    rows: Repeats
    hidden: Needles | None


def measured_rows(section: Section) -> int:
    """Rows that losses are measured on."""
    return max(2, -(-section.calibration.measured_tokens // (row_length(section.size))))


def probed_tokens(section: Section) -> int:
    """Tokens that a choice is measured on: of the rows with passages, and of those with needles."""
    return (measured_rows(section) + NEEDLE_ROWS) * row_length(section.size)


def require_size(size: int, native: int) -> None:
    """UserError unless what a window of `size` tokens hides can be measured within the model's `native` positions."""
    if row_length(size) <= native:
        return
    raise UserError(
        f"a window of {size:,} tokens holds all of the model's {native:,} positions"
        if size >= native
        else f"a window of {size:,} tokens is measured on sequences of {row_length(size):,}, and the model has "
        f"{native:,} positions",
        where=f"window.size: {size}",
        fix=f"give at most {native // row_length(1):,}",
    )


def require_sequences(section: Section, length: int) -> None:
    """UserError unless every kind of text leaves two sequences to fit on, beside those that are measured on: repairs
    are checked on one that they were not fitted on."""
    text = section.calibration.text
    total = sum(source.weight for source in text)
    least = _least_sequences(section)
    for source in text:
        share = source.weight / total
        if -(-round(section.calibration.tokens * share) // length) < least:
            raise UserError(
                f"too few tokens: `{source.source}` gives fewer than {least} sequences of {length:,} tokens",
                where="window.calibration.tokens",
                fix=f"give at least {math.ceil(least * length / share):,}, or a smaller window",
            )


def _least_sequences(section: Section) -> int:
    """Of each kind of text."""
    return 2 + -(-measured_rows(section) // len(section.calibration.text))


def least_tokens(section: Section, length: int) -> int:
    """Tokens of calibration text that give every kind as many sequences as it needs."""
    text = section.calibration.text
    total = sum(source.weight for source in text)
    return max(math.ceil(_least_sequences(section) * length * total / source.weight) for source in text)


def target_of(section: Section, config: Any, spec: AttentionSpec) -> Target:
    """What is written. Raises UserError for a model that cannot have these windows."""
    from retrofit.windows import targets

    full = how_many(section.full_layers, len(spec.layers))
    sinks = section.sinks == "fitted"
    target = targets.target_of(config, spec, section.size, target=section.target, sinks=sinks, all_layers=full == 0)
    if isinstance(section.full_layers, tuple):
        targets.require_candidates(section.full_layers, target.candidates, len(spec.layers))
    if full is not None:
        targets.require_some(full, target)
    return target


def after_windows(section: Section, config: Any, spec: AttentionSpec) -> Any:
    """The configuration after the step; where layers are chosen by measuring, the first ones stand for them.

    Raises UserError where the architecture cannot hold such windows.
    """
    from retrofit.model.families import family_of
    from retrofit.model.reexpress import reexpression_of

    target, full = target_of(section, config, spec), how_many(section.full_layers, len(spec.layers))
    if isinstance(section.full_layers, tuple):
        left = frozenset(section.full_layers)
    else:
        left = frozenset(target.candidates[: 1 if full is None else full])
    if target.reexpressed and (reexpression := reexpression_of(config, target.family)) is not None:
        config = reexpression.config()
    windowed = frozenset(range(len(spec.layers))) - left
    return family_of(config).with_windows(config, section.size, windowed)


def length_of(section: Section, native: int) -> int:
    """Tokens of a sequence that is read."""
    return section.calibration.sequence_length or min(WINDOWS * section.size, native)


def texts_of(section: Section, context: ModelContext, model: ModelFolder, seed: int) -> Texts:
    """Sequences to fit on, and rows of others to measure on; rank 0 chooses for all processes."""
    from retrofit.data.calibration import calibration_text, sampled_sources
    from retrofit.data.texts import write_samples
    from retrofit.windows.probes import needles
    from retrofit.windows.rows import repeats, split

    reading, world = section.calibration.in_sequences(length_of(section, context.native)), context.world
    wanted = world.only(lambda: sampled_sources(reading, context.samples))
    write_samples(wanted, context.samples, ("train",), world, context.progress)
    usual: Any = {"seed": seed, "teacher": context.samples, "progress": context.progress}
    text = world.only(lambda: calibration_text(reading, model.tokenizer, one_document=True, **usual))
    count = measured_rows(section)
    fit, measured = split(text, count)
    rows = repeats(measured, section.size, count, bos=model.tokenizer.bos_token_id is not None)
    return Texts(fit, rows, needles(model.tokenizer, measured, rows))


def chosen_layers(
    section: Section,
    target: Target,
    model: ModelFolder,
    texts: Texts,
    context: ModelContext,
    work: Path,
    windows: Sequence[int] = (),
) -> Choice | None:
    """How the full layers are chosen; None where there is nothing to choose. model: before it is re-expressed, the same
    function. windows: further sizes whose moments are kept in `work`."""
    from retrofit.windows.outcome import Limits
    from retrofit.windows.selection import select

    full = how_many(section.full_layers, len(model.spec.layers))
    if isinstance(section.full_layers, tuple) or full == 0 or not target.candidates:
        return None
    choice = select(
        model,
        target.candidates,
        section.size,
        texts.fit,
        texts.rows,
        texts.hidden,
        Limits(section.text_loss, section.answer_loss),
        always=target.always,
        full=full,
        sinks=target.sinks,
        windows=windows,
        work=work,
        device=context.device,
        world=context.world,
        progress=context.progress,
    )
    context.note(f"layers that see everything: {', '.join(map(str, choice.full)) or 'none'}")
    return choice
