"""A tokenizer's chat template, tried where it can do no harm.

A template is a program that came with the model. The sandbox it runs in keeps it from the machine, but not from running
for ever or filling memory, so it is rendered in a process of its own with limits on both.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import UserError
from retrofit.escape import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10
"""Of processor time. A template takes milliseconds."""
WAIT_SECONDS = 120
"""Until the answer is there, on a machine that does much else."""
MOST_BYTES = 1 << 30
"""Of memory beyond what this process has."""
MOST_TEXT = 1 << 20
"""Bytes of a rendered conversation."""
_TEXT, _ERROR = b"t", b"e"


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], folder: Path) -> str:
    """The conversation as the tokenizer's chat template writes it, with the start of an answer.

    folder: of the tokenizer, for messages. Raises UserError for a template that raises, takes too long or too much
    memory, or writes too much.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _child(tokenizer, messages, read, write)
    os.close(write)
    try:
        answer = _answer(read)
    finally:
        os.close(read)
        _end(child)
    if answer is None:
        raise _refused(f"takes longer than {SECONDS} seconds or more than {MOST_BYTES >> 30} GiB of memory", folder)
    if len(answer) > MOST_TEXT:
        raise _refused(f"writes more than {MOST_TEXT:,} bytes for one question", folder)
    text = answer[1:].decode("utf-8", "replace")
    if answer[:1] == _ERROR:
        raise _refused(f"cannot write a question of a user: {shown(text, 160)}", folder)
    if not text.strip():
        raise _refused("writes nothing for a question of a user", folder)
    return text


def _child(tokenizer: Any, messages: Sequence[dict[str, str]], read: int, write: int) -> None:
    """Render and write the answer; never returns. What the template raises is an answer too."""
    answer = _ERROR + b"it ended without an answer"
    try:
        os.close(read)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = Path("/proc/self/statm")
        if size.exists():
            limit = int(size.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + MOST_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        answer = _TEXT + str(text).encode("utf-8", "replace")
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            said = "it needs too much memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
            answer = _ERROR + said.encode("utf-8", "replace")
        rest = memoryview(answer[: MOST_TEXT + 1])
        while rest:
            rest = rest[os.write(write, rest) :]
        os._exit(0)


def _answer(read: int) -> bytes | None:
    """What the child wrote; None when it was ended by a limit, or does not answer."""
    until = time.monotonic() + WAIT_SECONDS
    parts: list[bytes] = []
    while select.select([read], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(read, 1 << 16)
        if not part:
            return b"".join(parts) or None
        parts.append(part)
    return None


def _end(child: int) -> None:
    ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _refused(what: str, folder: Path) -> UserError:
    return UserError(
        f"the chat template {what}",
        where=shown(folder),
        fix="correct it (chat_template.jinja, or `chat_template` in tokenizer_config.json), or remove it",
    )
