"""Which tokens are read together and which of them are scored: plain arithmetic, no torch.

Every published perplexity is the same losses under another rule of windows. A `Span` is one pass: the tokens
[begin, stop) of a document are read, and those in [first, stop) are scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from retrofit.errors import UserError


@dataclass(frozen=True)
class Span:
    """One pass over the tokens [begin, stop), of which [first, stop) are scored; first > begin unless `start`.

    start: the document's own first token (its BOS) is read before `begin`.
    """

    begin: int
    stop: int
    first: int
    start: bool = False

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.stop - self.begin + self.start


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens that move by `stride`; a token is scored in the first window that holds it.

    So every token is scored once, with length - stride to length - 1 tokens before it (fewer in the first window).
    repeat_start: every window reads the document's first token, and one token less of its own. fill_last: the last
    window begins earlier, so that it is as long as the others, and has more context.
    """

    length: int
    stride: int
    repeat_start: bool = False
    fill_last: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.length:
            raise UserError(
                f"windows of {self.length} tokens cannot move by {self.stride}",
                fix=f"give a stride of 1 to {self.length - 1}",
            )

    def spans(self, total: int) -> Iterator[Span]:
        """The passes over a document of `total` tokens."""
        if total <= self.length:
            yield Span(0, total, 1)
            return
        yield Span(0, self.length, 1)
        own = self.length - 1 if self.repeat_start else self.length
        begin, done = (1 if self.repeat_start else 0), self.length
        while done < total:
            begin += self.stride
            stop = min(begin + own, total)
            begin = stop - own if self.fill_last else begin
            yield Span(begin, stop, done, start=self.repeat_start)
            done = stop

    def cost(self, total: int) -> int:
        """Tokens read for a document of `total` tokens."""
        return sum(span.tokens for span in self.spans(total))


@dataclass(frozen=True)
class Tails(Windows):
    """Only the last `size` tokens before each of `ends`, and none that stand in the first `length` tokens."""

    size: int = 1
    ends: tuple[int, ...] = ()

    def spans(self, total: int) -> Iterator[Span]:
        """The passes over a document of `total` tokens; tokens that none of them scores have no loss."""
        done = self.length
        for end in sorted(end for end in self.ends if self.length < end <= total):
            done = max(done, end - self.size)
            while done < end:
                stop = min(done + self.stride, end)
                yield Span(stop - self.length, stop, done)
                done = stop


def rolling(length: int) -> Windows:
    """lm-evaluation-harness's windows: `length` tokens are read and `length` predicted.

    Each window starts with the last token that the one before it predicted, the last one earlier.
    """
    return Windows(length + 1, length, fill_last=True)
