"""What running a model costs at a context length: prefill, decoding, memory, and the bounds this machine sets to them.

Decoding one sequence reads all weights and the whole KV cache for every token: it is bound by memory bandwidth. A
prefill multiplies every token with every weight: it is bound by floating-point operations.

A speed is a median over short rounds, kept with all of them: what the rounds of two models do not tell apart is no
difference between the models.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from retrofit.errors import UserError
from retrofit.evaluation.decoding import batch_costs, weights_read
from retrofit.evaluation.running import GPU_BATCHES, BatchCost, LengthCost, RunCost
from retrofit.evaluation.scoring.cache import growing_cache
from retrofit.model.families import describe
from retrofit.model.spec import AttentionSpec
from retrofit.system.memory import Watch
from retrofit.system.speed import bandwidth, flops, synchronize

WARM_UP = 16  # tokens of a pass that is not timed


@dataclass(frozen=True)
class Speeds:
    """What a machine can do: bytes it reads and writes, and floating-point operations in one dtype, per second."""

    bytes_per_second: float
    flops_per_second: float


def side_by_side(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    lengths: Sequence[int],
    decode_tokens: int = 16,
    *,
    rounds: int,
    batches: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, RunCost]:
    """`run_cost` of each model, for comparing: all have their turn, `rounds` times over, so that what else the machine
    does for a while slows rounds of every model, and their spread shows it. The bounds of the machine are measured once
    for each dtype.

    models: by label, what loads each; one is in memory at a time. batches: sequences decoded together; by default
    `GPU_BATCHES` on a GPU, and none on a CPU, where a forward pass of several rows only takes longer.

    Raises: as `run_cost`.
    """
    found: dict[str, list[RunCost]] = {label: [] for label in models}
    speeds: dict[tuple[torch.dtype, str], Speeds] = {}
    for _ in range(rounds):
        for label, load in models.items():
            model = load()
            where = model.dtype, model.device.type
            speeds[where] = speeds.get(where) or machine_speeds(*where)
            together = (GPU_BATCHES if model.device.type == "cuda" else ()) if batches is None else batches
            cost = run_cost(model, lengths, decode_tokens, speeds=speeds[where], batches=together, seed=seed)
            found[label].append(cost)
            del model
            gc.collect()
    return {label: _together(costs) for label, costs in found.items()}


def _together(costs: Sequence[RunCost]) -> RunCost:
    """Rounds of one model as one measurement: the median of each length."""
    lengths = []
    for rounds in zip(*(cost.lengths for cost in costs), strict=True):
        prefills = tuple(second for one in rounds for second in one.prefill_rounds)
        decoded = tuple(speed for one in rounds for speed in one.decode_rounds)
        seconds = statistics.median(prefills)
        lengths.append(
            replace(
                rounds[0],
                prefill_seconds=seconds,
                prefill_per_s=rounds[0].length / seconds,
                prefill_bytes=max(one.prefill_bytes for one in rounds),
                decode_per_s=statistics.median(decoded) if decoded else None,
                prefill_rounds=prefills,
                decode_rounds=decoded,
                batches=_batches_together([one.batches for one in rounds]),
            )
        )
    return replace(costs[0], lengths=tuple(lengths))


def _batches_together(rounds: Sequence[Sequence[BatchCost]]) -> tuple[BatchCost, ...]:
    """Every batch with the speeds of all rounds."""
    return tuple(
        replace(
            same[0],
            loop_rounds=tuple(speed for one in same for speed in one.loop_rounds),
            graph_rounds=tuple(speed for one in same for speed in one.graph_rounds),
            note=next((one.note for one in same if one.note), ""),
        )
        for same in zip(*rounds, strict=True)
    )


def machine_speeds(dtype: torch.dtype, device: str) -> Speeds:
    """Measured now, in a second."""
    return Speeds(bandwidth(device), flops(dtype, device))


def run_cost(
    model: PreTrainedModel,
    lengths: Sequence[int],
    decode_tokens: int = 16,
    *,
    speeds: Speeds | None = None,
    batches: Sequence[int] = (),
    seed: int = 0,
) -> RunCost:
    """The cost at every length, clipped to the model's window, each measured once; random tokens, a stock cache
    whose layers with a window hold no more than that.

    batches: sequences that are decoded together as well, over a cache of fixed size (`decoding.batch_costs`).
    With learned positions, which end with the window, what is decoded has its place inside it. speeds: of the machine
    in the model's dtype, measured where they are not given.

    Raises: UserError for a length below one token.
    """
    if not lengths or min(lengths) < 1:
        raise UserError("a cost is measured at one token or more", fix="set evaluate.cost_lengths: [512, 2048]")
    spec, device = describe(model.config), model.device.type
    window = spec.max_position_embeddings
    if spec.learned_positions:
        window = max(1, window - decode_tokens)
    speeds = speeds or machine_speeds(model.dtype, device)
    weights = weights_read(model)
    generator = torch.Generator().manual_seed(seed)
    found = []
    with torch.inference_mode():
        cache = growing_cache(model.config)
        token = _next(model, _prompt(model, min(WARM_UP, window), generator), cache)
        if decode_tokens:
            _next(model, token, cache)
        for length in sorted({min(length, window) for length in lengths}):
            prompt = _prompt(model, length, generator)
            cache = growing_cache(model.config)
            with Watch(model.device) as watch:
                seconds, token = _timed(model, prompt, cache)
            held = cache_bytes(cache)
            together = (
                batch_costs(model, spec, cache, token, batches, decode_tokens, speeds.bytes_per_second)
                if batches and decode_tokens
                else ()
            )
            synchronize(str(model.device))
            began = time.perf_counter()
            for _ in range(decode_tokens):
                token = _next(model, token, cache)
            synchronize(str(model.device))
            speed = decode_tokens / (time.perf_counter() - began)
            expected = spec.kv_cache_bytes(length, model.dtype.itemsize)
            found.append(
                LengthCost(
                    length=length,
                    prefill_seconds=seconds,
                    prefill_per_s=length / seconds,
                    prefill_bound=length * speeds.flops_per_second / prefill_flops(model, spec, length),
                    prefill_bytes=watch.most_bytes,
                    kv_bytes=held,
                    kv_bytes_expected=expected,
                    decode_tokens=decode_tokens,
                    decode_per_s=speed if decode_tokens else None,
                    decode_bound=speeds.bytes_per_second / (weights + expected),
                    prefill_rounds=(seconds,),
                    decode_rounds=(speed,) if decode_tokens else (),
                    batches=together,
                )
            )
            del cache
            gc.collect()
    return RunCost(
        lengths=tuple(found),
        weight_bytes=weights,
        kernel=str(model.config._attn_implementation),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        bytes_per_second=speeds.bytes_per_second,
        flops_per_second=speeds.flops_per_second,
    )


def prefill_flops(model: PreTrainedModel, spec: AttentionSpec, tokens: int) -> float:
    """Of one pass over `tokens` tokens that predicts one: matrices, and causal attention within each layer's window."""
    head = spec.vocab_size * spec.hidden_size
    body = weights_read(model) // model.dtype.itemsize - head
    scores = 0.0
    for layer in spec.layers:
        window = min(tokens, layer.window or tokens)
        pairs = window * (window + 1) / 2 + (tokens - window) * window
        scores += 4 * layer.query_heads * layer.head_dim * pairs
    return 2.0 * (body * tokens + head) + scores


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values a transformers cache holds."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)


def _prompt(model: PreTrainedModel, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(model.config.get_text_config().vocab_size, (1, tokens), generator=generator).to(model.device)


def _timed(model: PreTrainedModel, ids_1T: torch.Tensor, cache: DynamicCache) -> tuple[float, torch.Tensor]:
    synchronize(str(model.device))
    began = time.perf_counter()
    token = _next(model, ids_1T, cache)
    synchronize(str(model.device))
    return time.perf_counter() - began, token


def _next(model: PreTrainedModel, ids_1T: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    logits = model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)
