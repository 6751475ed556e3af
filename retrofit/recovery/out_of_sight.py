"""Held-out passages that come again when a window hides their first copy: what the far context is still good for.

A model with windows may buy text with what it finds far away. So a state of its training is kept only where both are no
worse than at the start: the loss of held-out text, and that of the second copies.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from retrofit.model.spec import AttentionSpec
from retrofit.recovery.schedule import TrainRows
from retrofit.windows.rows import PASSAGE, RECOGNISED

LEAST = 2
"""Rows that are measured, where there are as many."""


def hiding_window(student: AttentionSpec, teacher: AttentionSpec | None) -> int | None:
    """Tokens that the most near-sighted layer of the student sees; None where all see everything, or where its teacher
    has the same windows."""
    window = _narrowest(student)
    return None if teacher is not None and _narrowest(teacher) == window else window


def passages(measured: TrainRows, window: int) -> TrainRows | None:
    """Held-out rows, half of them, whose end is their beginning once more; only the second copies count, from where
    the passage can be recognised on. None where rows are too short for a window to hide the first copy, or where
    positions skip or rows hold several texts.
    """
    length = measured.ids_NT.shape[1]
    passage = length // PASSAGE
    apart = length - passage - 1  # from the token after BOS to the first of its copy
    if measured.positions_NT is not None or set(measured.cuts) != {length} or apart < window:
        return None
    rows = max(LEAST, len(measured.ids_NT) // 2)
    ids_NT = measured.ids_NT[:rows].clone()
    ids_NT[:, -passage:] = ids_NT[:, 1 : 1 + passage]
    counted_NT = torch.zeros_like(ids_NT, dtype=torch.bool)
    counted_NT[:, length - passage - 1 + max(1, passage // RECOGNISED) : length - 1] = True
    cuts, learned = measured.cuts[:rows], measured.learned[:rows]
    return replace(measured, ids_NT=ids_NT, cuts=cuts, counted_NT=counted_NT, learned=learned)


def unmeasured(window: int) -> str:
    """What a person should know where there are none."""
    least = -(-(window + 1) * PASSAGE // (PASSAGE - 1))
    return (
        f"what lies out of sight of windows of {window:,} tokens is not measured: that takes rows of {least:,} tokens, "
        "each one text"
    )


def _narrowest(spec: AttentionSpec) -> int | None:
    return min((layer.window for layer in spec.layers if layer.window is not None), default=None)
