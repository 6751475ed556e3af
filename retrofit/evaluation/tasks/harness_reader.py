"""The harness's own reader of transformers models, around a model that is loaded already, in one process or several.

In several, each makes the same requests and reads a part of them: whole batches, put together as one process would put
them together, so that padding and rounding are the same. What reads one request after another (a perplexity of whole
texts, generation) is dealt out request by request; with batches of several, whose padding would differ, rank 0 does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from retrofit.system.dealing import collected, own_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.system.world import World

Tokenized = tuple[tuple[str, str], list[int], list[int]]
"""A request as the harness has it: (context, continuation), and the tokens of both."""


def reader_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    length: int,
    world: World,
    progress: Progress | None,
) -> Any:
    """A model of the harness; it tells `progress` what this process has read. length: tokens of the longest prompt."""
    from lm_eval.models.huggingface import HFLM

    class Reader(HFLM):
        """Its three kinds of requests without bars of their own, shared by the processes of `world`."""

        _whole = False  # what is asked for is all this process's: it was dealt out before

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._whole = True
            read = super().loglikelihood_rolling
            found = _one_by_one(requests, lambda own: read(own, disable_tqdm=True), batch_size, world)
            self._whole = False
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            write = super().generate_until
            return _one_by_one(requests, lambda own: write(own, disable_tqdm=True), batch_size, world)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            read = super()._loglikelihood_tokens
            if self._whole or world.size == 1:
                return read(requests, *args, **kwargs)
            return _dealt(requests, batches(requests, batch_size), lambda own: read(own, *args, **kwargs), world)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            return _counted(progress, inps, super()._model_call(inps, *args, **kwargs))

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            return _counted(progress, context, super()._model_generate(context, *args, **kwargs))

    return Reader(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length, backend="causal")


def batches(requests: Sequence[Tokenized], size: int) -> list[list[int]]:
    """Numbers of the requests that the harness reads in one batch, batch by batch.

    It reads requests that differ in their last token alone once, and sorts what is left from the longest down.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        same.setdefault((*context, *continuation[:-1]), []).append(index)

    def place(group: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, continuation = requests[group[0]]
        return -len(context) - len(continuation), (*context, *continuation)

    ordered = sorted(same.values(), key=place)
    return [[i for group in ordered[start : start + size] for i in group] for start in range(0, len(ordered), size)]


def _dealt(
    requests: Sequence[Any], parts: Sequence[list[int]], read: Callable[[list[Any]], Sequence[Any]], world: World
) -> list[Any]:
    """The results of all requests, in order. parts: numbers of requests that stay together."""
    costs = {part: float(sum(_size(requests[i]) for i in numbers)) for part, numbers in enumerate(parts)}
    own = sorted(i for part in own_share(costs, world) for i in parts[part])
    found = collected(dict(zip(own, read([requests[i] for i in own]) if own else (), strict=True)), world)
    return [found[i] for i in range(len(requests))]


def _one_by_one(
    requests: Sequence[Any], read: Callable[[list[Any]], Sequence[Any]], batch_size: int, world: World
) -> list[Any]:
    if batch_size > 1:
        return world.only(lambda: list(read(list(requests))))
    return _dealt(requests, [[i] for i in range(len(requests))], read, world)


def _size(request: Any) -> int:
    """Of a tokenized request its tokens, of another the characters of its text."""
    if isinstance(request, tuple):
        return len(request[1]) + len(request[2])
    return sum(len(part) for part in request.args if isinstance(part, str))


def _counted(progress: Progress | None, ids: Any, result: Any) -> Any:
    if progress:
        progress.advance(len(ids))
    return result
