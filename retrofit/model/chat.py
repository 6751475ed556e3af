"""A tokenizer's chat template, tried where it can do no harm.

A template is a program that came with the model. The sandbox it runs in keeps it from the machine, but not from running
for ever or filling memory, so it is rendered in a process of its own with limits on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.limited import LimitedError, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10
"""Of processor time. A template takes milliseconds."""
MOST_BYTES = 1 << 30
"""Of memory beyond what this process has."""
MOST_TEXT = 1 << 20
"""Bytes of a rendered conversation."""


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], folder: Path) -> str:
    """The conversation as the tokenizer's chat template writes it, with the start of an answer.

    folder: of the tokenizer, for messages. Raises UserError for a template that raises, takes too long or too much
    memory, or writes too much.
    """

    def write() -> bytes:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return str(text).encode("utf-8", "replace")

    try:
        answer = limited(write, seconds=SECONDS, memory=MOST_BYTES, most=MOST_TEXT)
    except LimitedError as error:
        if not str(error):
            what = f"takes longer than {SECONDS} seconds or more than {MOST_BYTES >> 30} GiB of memory"
            raise _refused(what, folder) from None
        raise _refused(f"cannot write a question of a user: {shown(error, 160)}", folder) from None
    if len(answer) > MOST_TEXT:
        raise _refused(f"writes more than {MOST_TEXT:,} bytes for one question", folder)
    text = answer.decode("utf-8", "replace")
    if not text.strip():
        raise _refused("writes nothing for a question of a user", folder)
    return text


def _refused(what: str, folder: Path) -> UserError:
    return UserError(
        f"the chat template {what}",
        where=shown(folder),
        fix="correct it (chat_template.jinja, or `chat_template` in tokenizer_config.json), or remove it",
    )
