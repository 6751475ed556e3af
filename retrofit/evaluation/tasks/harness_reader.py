"""The harness's own reader of transformers models, around a model that is loaded already, in one process or several.

In several, each makes the same requests and reads a part of them: whole batches, put together as one process would put
them together, so that padding and rounding are the same. What reads one request after another (a perplexity of whole
texts, generation) is dealt out request by request; with batches of several, whose padding would differ, rank 0 does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.system.dealing import collected, own_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.system.world import World

Tokenized = tuple[tuple[str, str], list[int], list[int]]
"""A request as the harness has it: (context, continuation), and the tokens of both."""
GENERATED = 256  # tokens of an answer where the task sets no limit, as in the harness


@dataclass(frozen=True)
class Prompts:
    """How long prompts are read. length: tokens of the longest, its answer included. whole: a longer one is not asked;
    otherwise it loses its beginning, as the harness does it. rolling: tokens of the windows in which whole texts are
    read, the same for all models that are compared."""

    length: int
    whole: bool = False
    rolling: int | None = None


@dataclass(frozen=True)
class Lengths:
    """Prompts and their answers in tokens of a model. encode: its tokenizer as the harness uses it."""

    prompts: Prompts
    encode: Callable[[str], Sequence[int]]

    def too_long(self, arguments: Sequence[Any]) -> bool:
        """Whether a request is longer than the prompts that are read. arguments: (context, continuation), (context,
        settings of generation), or (text,), which is read in windows."""
        if len(arguments) < 2:
            return False
        context, rest = arguments[0], arguments[1]
        text, more = (context + rest, -1) if isinstance(rest, str) else (context, _generated(rest))
        if len(text.encode()) + 1 + more <= self.prompts.length:
            return False  # no token is shorter than a byte, and one may be put in front
        return len(self.encode(text)) + more > self.prompts.length

    def skipped(self, sample: Mapping[str, Any]) -> bool:
        """Whether a question was not asked, as one of its prompts is too long."""
        return self.prompts.whole and any(self.too_long(one) for one in sample["arguments"])

    def cut_to(self, sample: Mapping[str, Any]) -> int | None:
        """Tokens that a prompt of the question was cut to; None where all were read whole."""
        return self.prompts.length if any(self.too_long(one) for one in sample["arguments"]) else None


def _generated(settings: Mapping[str, Any]) -> int:
    return int(settings.get("max_gen_toks", GENERATED))


def reader_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    prompts: Prompts,
    world: World,
    progress: Progress | None,
) -> Any:
    """A model of the harness; it tells `progress` what this process has read. Its `lengths` are a `Lengths`."""
    from lm_eval.models.huggingface import HFLM

    class Reader(HFLM):
        """Its three kinds of requests without bars of their own, shared by the processes of `world`."""

        _whole = False  # what is asked for is all this process's: it was dealt out before

        @property
        def lengths(self) -> Lengths:
            return Lengths(prompts, self.tok_encode)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            read = super().loglikelihood
            return self._fitting(requests, lambda own: read(own, disable_tqdm=True), (0.0, False))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._whole, self._max_length = True, prompts.rolling or prompts.length
            read = super().loglikelihood_rolling
            found = _one_by_one(requests, lambda own: read(own, disable_tqdm=True), batch_size, world)
            self._whole, self._max_length = False, prompts.length
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            write = super().generate_until
            return self._fitting(
                requests,
                lambda some: _one_by_one(some, lambda own: write(own, disable_tqdm=True), batch_size, world),
                "",
            )

        def _fitting(self, requests: Any, read: Callable[[list[Any]], Sequence[Any]], instead: object) -> list[Any]:
            """What `read` gives for the requests that are asked, and `instead` for the others, which count nowhere.
            All are made, as the examples of a question depend on those before it."""
            if not prompts.whole:
                return list(read(requests))
            asked = [not self.lengths.too_long(one.args) for one in requests]
            own = [one for one, fits in zip(requests, asked, strict=True) if fits]
            found = iter(read(own) if own else ())
            return [next(found) if fits else instead for fits in asked]

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            read = super()._loglikelihood_tokens
            if self._whole or world.size == 1:
                return read(requests, *args, **kwargs)
            return _dealt(requests, batches(requests, batch_size), lambda own: read(own, *args, **kwargs), world)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            return _counted(progress, inps, super()._model_call(inps, *args, **kwargs))

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            return _counted(progress, context, super()._model_generate(context, *args, **kwargs))

    return Reader(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=prompts.length, backend="causal"
    )


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
