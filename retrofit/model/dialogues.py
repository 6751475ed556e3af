"""Dialogues as a tokenizer's chat template writes them, and which characters of them the assistant wrote.

Templates are rendered where `chat` renders them: in transformers' sandbox, in a process of its own with limits of time
and memory; many dialogues in one process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.chat import MOST_BYTES, MOST_TEXT, SECONDS
from retrofit.model.foreign import foreign_values
from retrofit.model.limited import LimitedError, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[dict[str, Any]]

AT_A_TIME = 500
"""Dialogues that one process renders."""
GROWTH = 16
"""A dialogue is written in at most so many times its own bytes."""
_PER_DIALOGUE = 0.1  # seconds of processor time beyond those of one template
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Written:
    """A dialogue as text. assistant: (start, stop) of the characters that are the assistant's; None where the template
    does not tell, and `why`."""

    text: str
    assistant: tuple[tuple[int, int], ...] | None
    why: str = ""


def write_dialogues(
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[tuple[Turns, Sequence[dict[str, Any]], str]],
    *,
    answered: bool = True,
) -> Iterator[Written]:
    """Each dialogue (turns, tools, where it stands) as the chat template writes it. answered: False for dialogues that
    the start of an answer is added to; nothing of them is the assistant's.

    The assistant's characters are those of the template's own `{% generation %}` blocks. Without such blocks they are
    what the template adds for a turn to the turns before it and the start of an answer, without white space after an
    end-of-turn token; they are known only where what it writes for those stands unchanged at the start of the whole.

    Raises UserError without a template, for a dialogue that it cannot write, with where that stands, and for a template
    that leaves out a system turn or a tool, takes too long or writes too much.
    """
    template = getattr(tokenizer, "chat_template", None)
    folder = Path(str(tokenizer.name_or_path or "tokenizer"))
    if not template:
        raise UserError(
            "the model has no chat template, so dialogues cannot be written as it reads them",
            where=shown(folder),
            fix="use an instruct model, or put a chat_template.jinja into its folder",
        )
    for start in range(0, len(dialogues), AT_A_TIME):
        some = dialogues[start : start + AT_A_TIME]
        for (_, _, where), one in zip(some, _written(tokenizer, some, folder, answered), strict=False):
            if "problem" in one:
                raise UserError(one["problem"], where=where, fix=one["fix"])
            spans = None if one["spans"] is None else tuple((begin, stop) for begin, stop in one["spans"])
            yield Written(one["text"], spans, one["why"])


def write_questions(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[tuple[Turns, Sequence[dict[str, Any]], str]]
) -> Iterator[str]:
    """Each dialogue up to its first turn of the user, and the start of an answer, as the chat template writes them.

    A dialogue without such a turn is left out. Raises UserError as `write_dialogues` does.
    """
    asked = []
    for turns, tools, where in dialogues:
        first = next((index for index, turn in enumerate(turns, 1) if turn["role"] == "user"), None)
        if first is not None:
            asked.append((turns[:first], tools, where))
    return (one.text for one in write_dialogues(tokenizer, asked, answered=False))


def _written(
    tokenizer: PreTrainedTokenizerBase,
    some: Sequence[tuple[Turns, Sequence[dict[str, Any]], str]],
    folder: Path,
    answered: bool,
) -> list[dict[str, Any]]:
    """What another process wrote, up to the first problem."""
    size = sum(len(json.dumps([list(turns), list(tools)], default=str)) for turns, tools, _ in some)
    most, seconds = MOST_TEXT + GROWTH * size, SECONDS + int(_PER_DIALOGUE * len(some))

    def work() -> bytes:
        found: list[dict[str, Any]] = []
        for turns, tools, where in some:
            try:
                found.append(_write(tokenizer, turns, tools, where, answered))
            except UserError as error:
                found.append({"problem": error.what, "fix": error.fix})
                break
        return json.dumps(found).encode("ascii")

    try:
        answer = limited(work, seconds=seconds, memory=MOST_BYTES, most=most)
    except LimitedError as error:
        what = f"takes longer than {seconds} seconds or more than {MOST_BYTES >> 30} GiB of memory"
        raise _refused(shown(error, 160) if str(error) else what, folder) from None
    if len(answer) > most:
        raise _refused(f"writes more than {GROWTH} times the text of the dialogues", folder)
    written: list[dict[str, Any]] = json.loads(answer)
    return written


def _write(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Sequence[dict[str, Any]], where: str, answered: bool
) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    fix = "correct the row, or the template (chat_template.jinja, or `chat_template` in tokenizer_config.json)"
    with foreign_values("the chat template cannot write this dialogue", where, fix):
        template = tokenizer.get_chat_template(None, list(tools) or None)
        own = answered and bool(_GENERATION.search(template))

        def render(some: Turns, **how: Any) -> tuple[str, Any]:
            how |= {"tools": list(tools) or None, "chat_template": template, **tokenizer.special_tokens_map}
            texts, spans = cast(Any, render_jinja_template([list(some)], **how))
            return texts[0], spans

        text, spans = render(turns, return_assistant_tokens_mask=own, add_generation_prompt=not answered)
    left_out = _left_out(turns, tools, text)
    if left_out:
        raise UserError(
            f"the chat template leaves out {left_out}",
            where=where,
            fix="leave it out of the row, or correct the template",
        )
    if not answered:
        return {"text": text, "spans": None, "why": ""}
    if own:
        return {"text": text, "spans": spans[0], "why": ""}
    found, why = _added(turns, text, lambda some, **how: render(some, **how)[0], _ends(tokenizer), where)
    return {"text": text, "spans": found, "why": why}


def _left_out(turns: Turns, tools: Sequence[Mapping[str, Any]], text: str) -> str:
    """What a template must not drop, and this one did; empty for nothing."""
    for number, turn in enumerate(turns, 1):
        if turn["role"] in ("system", "developer", "user") and turn["content"].strip() not in text:
            return f"turn {number}, of the role `{turn['role']}`"
    for tool in tools:
        function = tool.get("function", tool)
        name = str(function.get("name", "")) if isinstance(function, Mapping) else ""
        if name not in text:
            return f"the tool `{shown(name, 60)}`"
    return ""


def _added(
    turns: Turns, text: str, render: Callable[..., str], ends: Sequence[str], where: str
) -> tuple[list[tuple[int, int]] | None, str]:
    """The characters that each turn of the assistant adds, or why they are not known."""
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        try:
            with foreign_values("it cannot write the turns before", where, ""):
                before, after = render(turns[:index], add_generation_prompt=True), render(turns[: index + 1])
        except UserError as error:
            return None, f"turn {index + 1}: {error.what}"
        if not after.startswith(before):
            return None, f"turn {index + 1} does not follow what it writes to ask for an answer"
        if not text.startswith(after):
            return None, f"it writes turn {index + 1} another way when turns follow it"
        stop = len(before) + len(after[len(before) :].rstrip())
        spans.append((len(before), stop if after[:stop].endswith(tuple(ends)) else len(after)))
    return spans, ""


def _ends(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens, one of which ends a turn."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]


def _refused(what: str, folder: Path) -> UserError:
    return UserError(
        f"the chat template cannot write the dialogues: {what}",
        where=shown(folder),
        fix="correct it (chat_template.jinja, or `chat_template` in tokenizer_config.json)",
    )
