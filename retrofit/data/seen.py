"""Which kinds of text the steps that made a model have read, and which are unseen.

No document is measured that was read (`unseen`), but other documents of its kind may have been. What a conversion and a
training win back on text of a kind that they have read says little of other text: only a kind that no step has read
shows what everything else has lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from retrofit.data.corpora import OF_PYTHON
from retrofit.data.sources import CHAT, holds_dialogues, kind_of
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import SYNTHETIC

READ = "read"
"""Key of a recorded step: the kinds of text that it has read."""
PURPOSES = {"convert": "calibration", "extend": "search", "recover": "training"}
"""What a step reads text for."""


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
    read: dict[str, set[str]] = {}
    for step in steps:
        if step["step"] in PURPOSES and step.get(READ):
            read.setdefault(PURPOSES[step["step"]], set()).update(step[READ])
    if not read:
        return {}
    purposes = [purpose for purpose in PURPOSES.values() if purpose in read]
    return {
        kind: tuple(purpose for purpose in purposes if read[purpose] & {kind, *shared.get(kind, ())}) for kind in kinds
    }
