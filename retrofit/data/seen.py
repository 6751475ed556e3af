"""Which kinds of text the steps that made a model have read, and which are unseen.

No document is measured that was read (`unseen`), but other documents of its kind may have been. What a conversion and a
training win back on text of a kind that they have read says little of other text: only a kind that no step has read
shows what everything else has lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from retrofit.data.corpora import OF_PYTHON
from retrofit.data.sources import CHAT, holds_dialogues, kind_of
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import SYNTHETIC

READ = "read"
"""Key of a recorded step: by purpose, the kinds of text that it has read."""
Read = Mapping[str, Sequence[str]]
Purpose = Literal["calibration", "search", "training"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
"""What steps read text for, in the order of a recipe."""


def kinds_read(sources: Sequence[TextSource]) -> tuple[str, ...]:
    """The kinds of text in these sources: their names in results, those of the text that samples begin with and that
    synthetic rows are filled with, and `chat` for dialogues. Raises UserError for a source that cannot be read."""
    kinds = []
    for source in sources:
        kinds += [kind_of(source.source), *(kind_of(prompt.source) for prompt in source.prompts)]
        kinds += OF_PYTHON if source.source == SYNTHETIC else ()
        kinds += [CHAT] if holds_dialogues(source) else []
    return tuple(dict.fromkeys(kinds))


def seen(
    kinds: Iterable[str], steps: Sequence[Mapping[str, Any]], shared: Mapping[str, Collection[str]]
) -> dict[str, tuple[str, ...]]:
    """{kind of measured text: what text of that kind was read for}, in the order of `PURPOSES`; () for an unseen one.
    Empty where no step read any text.

    steps: as a checkpoint records them. shared: by kind of measured text, the kinds of read text that hold some of it.
    """
    records = [step.get(READ) or {} for step in steps]
    read = {purpose: {kind for one in records for kind in one.get(purpose, ())} for purpose in PURPOSES}
    if not any(read.values()):
        return {}
    return {
        kind: tuple(purpose for purpose in PURPOSES if read[purpose] & {kind, *shared.get(kind, ())}) for kind in kinds
    }
