"""Dialogues as tokens of the model's chat template, with the tokens that a loss is taken on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from retrofit.data.corpora import Text
from retrofit.data.sources import HUB
from retrofit.data.texts import read_texts
from retrofit.errors import UserError
from retrofit.model.dialogues import AT_A_TIME, Written, write_dialogues
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import LossOn

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_HUB_ROWS = 100


@dataclass(frozen=True)
class ChatTokens:
    """One dialogue: its tokens as the template writes it, nothing before or after.

    scored: the tokens that the loss is taken on. turns: where the assistant's turns end, in tokens; () where the
    template does not tell. text: as it was written.
    """

    name: str
    text: str
    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    turns: tuple[int, ...]

    def cut(self, most: int) -> ChatTokens | None:
        """The dialogue up to its last turn of the assistant that ends within `most` tokens; itself where it fits.

        None where there is no such turn.
        """
        if len(self.ids) <= most:
            return self
        end = max((turn for turn in self.turns if turn <= most), default=0)
        if not any(self.scored[:end]):
            return None
        return ChatTokens(self.name, self.text, self.ids[:end], self.scored[:end], self.turns)


def chat_tokens(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn = "assistant"
) -> list[ChatTokens]:
    """The dialogues of some texts as tokens. loss_on: the assistant's turns, or every token but the first.

    Raises UserError, with file and line, for a dialogue that the template cannot write, for one whose assistant's turns
    cannot be found among the tokens where the loss is on them, and for a tokenizer that cannot say which text a token
    is.
    """
    given = [(text, text.dialogue) for text in texts if text.dialogue is not None]
    if given and not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers",
            fix="use a model folder that has a tokenizer.json",
        )
    written = write_dialogues(tokenizer, [(one.turns, one.tools, one.where) for _, one in given])
    return [
        _tokens(text.name, how, dialogue.where, tokenizer, loss_on)
        for (text, dialogue), how in zip(given, written, strict=True)
    ]


def dialogues(count: int) -> str:
    """So many dialogues, in words."""
    return "1 dialogue" if count == 1 else f"{count:,} dialogues"


def rendered_text(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The dialogues of some texts as the template writes them."""
    given = [one.dialogue for one in texts if one.dialogue is not None]
    return [one.text for one in write_dialogues(tokenizer, [(one.turns, one.tools, one.where) for one in given])]


def check_dialogues(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, *, limit_chars: int
) -> None:
    """Raise what `chat_tokens` raises for any dialogue of a source. limit_chars: how much of it is read at most; of a
    hub dataset no more than its first dialogues are looked at."""
    texts = read_texts(source, split="all", limit_chars=limit_chars)
    first = next(texts, None)
    if first is None or first.dialogue is None:
        return
    texts = chain([first], texts)
    if source.source.startswith(HUB):
        texts = islice(texts, _HUB_ROWS)
    while some := list(islice(texts, AT_A_TIME)):
        chat_tokens(some, tokenizer, loss_on)


def _tokens(name: str, written: Written, where: str, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> ChatTokens:
    encoded = tokenizer(written.text, add_special_tokens=False, verbose=False)
    ids = encoded["input_ids"]
    if loss_on == "assistant" and written.assistant is None:
        raise UserError(
            f"the chat template does not tell the assistant's turns apart: {written.why}",
            where=where,
            fix="put {% generation %} and {% endgeneration %} around them in chat_template.jinja, or set loss_on: all",
        )
    own = [_covered(encoded, *span) for span in written.assistant or ()]
    marked = {index for span in own for index in span}
    scored = [index in marked if loss_on == "assistant" else True for index in range(len(ids))]
    scored[:1] = [False] * len(scored[:1])  # nothing predicts the first
    if not any(scored):
        raise UserError(
            "the chat template writes nothing of the assistant's turns",
            where=where,
            fix="leave the row out, or correct the template",
        )
    return ChatTokens(name, written.text, tuple(ids), tuple(scored), tuple(span.stop for span in own if span))


def _covered(encoded: BatchEncoding, start: int, stop: int) -> range:
    """The tokens of the characters [start, stop), as transformers' own mask has them."""
    if start >= stop:
        return range(0)
    first, last = encoded.char_to_token(start), encoded.char_to_token(stop - 1)
    if first is None:
        return range(0)
    return range(first, len(encoded["input_ids"]) if last is None else last + 1)
