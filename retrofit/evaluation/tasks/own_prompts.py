"""Tasks of the harness that make their own prompts while they are loaded, as its RULER does.

The harness has no option for how many it makes: 500 of each length, one length after the other, before `limit` takes
the first of them. So a limit does not save the time, and of several lengths it leaves the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from retrofit.errors import UserError

LENGTH = "max_length"
"""Key of a prompt that says how long it is meant to be."""


def makes_prompts(task: Any) -> bool:
    """Whether a task of the harness makes its prompts itself."""
    return callable(getattr(task.config, "custom_dataset", None))


def require_all_lengths(name: str, tasks: Iterable[Any], limit: int | None) -> None:
    """UserError where a limit leaves only some of the lengths that a task has to make."""
    for task in tasks:
        if limit is None or not makes_prompts(task):
            continue
        every = list(dict.fromkeys(prompt.get(LENGTH) for prompt in task.eval_docs))
        asked = list(dict.fromkeys(prompt.get(LENGTH) for prompt in islice(task.eval_docs, limit)))
        if len(asked) < len(every):
            raise UserError(
                f"the first {limit:,} prompts of `{name}` are of {_and(asked)} tokens only, not of {_and(every)}: the "
                "harness makes one length after the other",
                where="evaluate.tasks.limit",
                fix="ask one length at a time (metadata: {max_seq_lengths: [...]}), or leave the limit out",
            )


def _and(lengths: list[Any]) -> str:
    return " and ".join(f"{length:,}" if isinstance(length, int) else str(length) for length in lengths)
