"""A model that reads: tokens in chunks against one KV cache, back to an earlier token, and losses of what comes next.

Legend: T tokens, R rows of logits, C model width, V vocabulary. A chunk goes through the base model, its hidden states
through the class's own head in rows, so that nothing of size tokens x vocabulary exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrofit.errors import UserError
from retrofit.evaluation.scoring.cache import PreallocatedLayer, mark, preallocated_cache, rewind
from retrofit.model.families import describe
from retrofit.system.device import chunks_between_readings, forward_tokens, logit_rows

Head = Callable[[Tensor], Tensor]


class Reader:
    """One sequence being read. position: tokens read so far.

    capacity: most tokens it will ever hold. chunk, rows: tokens of a forward pass and rows of logits that exist at a
    time, by default what suits the device. It can go back to its start and to where it was marked.
    Tokens stand at positions 0, 1, 2, ... of a static rotary encoding; `skip` lets those that follow stand later.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        *,
        chunk: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.model = model
        self.rows = rows or default_rows(model)
        self.chunk = max(1, min(chunk or default_chunk(model), capacity))
        self.position = 0
        self._cache = preallocated_cache(model.config, capacity, self.chunk)
        self._marks = {0}
        self._end = describe(model.config).learned_positions
        self._last: dict[int, Tensor] = {}  # hidden state [1, 1, C] of the last token at positions one returns to
        self._skips: dict[int, int] = {}  # by tokens read before: positions left out there

    def hidden(self, ids_T: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Read `ids_T`; yields (offset in ids_T, hidden states [1, t, C]) of every chunk."""
        if self._end is not None and self.position + len(ids_T) > self._end:
            require_positions(self._end, self.position + len(ids_T))
        base = self.model.get_decoder()
        for start in range(0, len(ids_T), self.chunk):
            part = ids_T[None, start : start + self.chunk]
            skipped = {"position_ids": self._positions(part)} if self._skips else {}
            hidden_1TC = base(input_ids=part, past_key_values=self._cache, use_cache=True, **skipped).last_hidden_state
            self.position += part.shape[1]
            yield start, hidden_1TC
        if len(ids_T):
            self._last[self.position] = hidden_1TC[:, -1:].clone()

    def read(self, ids_T: Tensor) -> None:
        """Read `ids_T` and keep only the cache."""
        for _ in self.hidden(ids_T):
            pass

    def skip(self, positions: int) -> None:
        """Leave out `positions` positions: what is read next stands that much further on. Attention still sees all
        that was read; sliding layers count tokens, not positions."""
        self._skips[self.position] = self._skips.get(self.position, 0) + positions

    @contextmanager
    def nearby(self, tokens: int) -> Iterator[None]:
        """Inside the block, chunks see that many tokens before them and no more; whoever reads later sees all of them.

        A cheap way to a long cache: what its keys and values took from far away is missing in them.
        """
        layers = [layer for layer in self._cache.layers if isinstance(layer, PreallocatedLayer)]
        for layer in layers:
            layer.reach = tokens
        try:
            yield
        finally:
            for layer in layers:
                layer.reach = None

    def predicted(self, ids_T: Tensor, next_T: Tensor, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Read `ids_T`, whose token i is followed by next_T[i]; yields (tokens of the chunk, losses float32 of what
        follows those from `first` on, in nats) of every chunk, on a GPU of a few chunks together."""
        group = chunks_between_readings(str(self.model.device))
        read, losses, chunks = 0, [], 0
        for offset, hidden_1TC in self.hidden(ids_T):
            end = offset + hidden_1TC.shape[1]
            with head_of(self.model) as head:
                for row in range(max(offset, first), end, self.rows):
                    stop = min(row + self.rows, end)
                    logits_RV = head(hidden_1TC[:, row - offset : stop - offset])[0].float()
                    losses.append(nn.functional.cross_entropy(logits_RV, next_T[row:stop], reduction="none"))
            read, chunks = read + end - offset, chunks + 1
            if chunks == group or end == len(ids_T):
                yield read, torch.cat(losses).cpu() if losses else torch.empty(0)
                read, losses, chunks = 0, [], 0

    def mark(self) -> int:
        """Let `rewind` come back to here, and return the position. A layer with a window keeps a copy of it for that,
        until the reader goes back to before the mark."""
        mark(self._cache)
        self._marks.add(self.position)
        return self.position

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens: all, or those read up to a mark."""
        assert tokens in self._marks, f"the reader was not marked at {tokens}"
        rewind(self._cache, tokens)
        self.position = tokens
        self._marks = {position for position in self._marks if position <= tokens}
        self._last = {position: last for position, last in self._last.items() if position <= tokens}
        self._skips = {position: skip for position, skip in self._skips.items() if position < tokens}

    def _positions(self, part_1T: Tensor) -> Tensor:
        skipped = sum(skip for position, skip in self._skips.items() if position <= self.position)
        return torch.arange(part_1T.shape[1], device=part_1T.device)[None] + self.position + skipped

    def losses(self, ids_T: Tensor) -> Tensor:
        """Losses float32 [T] of `ids_T` as the continuation of what was read, in nats. The last of them is not read."""
        return self.judged(ids_T)[0]

    def judged(self, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """(losses float32 [T], whether each token is the likeliest bool [T]) of a continuation of a few tokens.

        All true means that greedy decoding would write exactly these tokens.
        """
        before = self._last[self.position]
        hidden_1TC = [before, *(hidden for _, hidden in self.hidden(ids_T[:-1]))]
        logits_TV = self.logits(torch.cat(hidden_1TC, 1))
        losses_T = nn.functional.cross_entropy(logits_TV, ids_T, reduction="none")
        return losses_T.cpu(), (logits_TV.argmax(-1) == ids_T).cpu()

    def logits(self, hidden_1RC: Tensor) -> Tensor:
        """Logits fp32 [R, V] of a few rows."""
        with head_of(self.model) as head:
            return head(hidden_1RC)[0].float()

    def greedy(self, tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
        """The `tokens` likeliest next tokens one after the other, up to one of `stop` or where learned positions end;
        they are read."""
        found: list[int] = []
        for _ in range(tokens):
            token = self.logits(self._last[self.position])[-1].argmax()
            found.append(int(token))
            if found[-1] in stop or self.position == self._end:
                break
            self.read(token[None])
        return found


def default_chunk(model: PreTrainedModel) -> int:
    """Tokens of a forward pass that suit the model's device."""
    return forward_tokens(str(model.device), describe(model.config), model.dtype.itemsize)


def default_rows(model: PreTrainedModel) -> int:
    """Rows of logits that suit the model's device."""
    return logit_rows(str(model.device), model.config.get_text_config().vocab_size)


class _Outputs(tuple[Tensor]):
    """(hidden states,); every other field an output may have (cache, router logits, ...) is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _GivenHidden(nn.Module):
    """Stands in for the base model and returns the hidden states it is given."""

    def forward(self, *_: object, inputs_embeds: Tensor | None = None, **__: object) -> _Outputs:
        assert inputs_embeds is not None
        return _Outputs((inputs_embeds,))


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[Head]:
    """hidden [B, T, C] -> logits [B, T, V] by the class's own code after its base model.

    So softcaps, logit scales and biases of the head are exactly those of `model(input_ids)`, for every class.
    """
    name = model.base_model_prefix
    base = getattr(model, name)
    setattr(model, name, _GivenHidden())
    try:
        yield lambda hidden_BTC: model(inputs_embeds=hidden_BTC, use_cache=False).logits
    finally:
        setattr(model, name, base)


def require_positions(end: int | None, tokens: int, where: str = "") -> None:
    """Raises UserError when `tokens` are more than a table of learned positions holds. end: of the table; None for
    RoPE, which goes on, whatever comes out."""
    if end is not None and tokens > end:
        raise UserError(
            f"{tokens} tokens are more than the {end} learned positions of the model",
            where=where,
            fix=f"ask for at most {end}, or extend it: retrofit extend MODEL --length {tokens} --method linear "
            "--out DIR",
        )
