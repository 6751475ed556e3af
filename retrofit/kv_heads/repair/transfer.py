"""Layer-wise transfer: the attention of a converted layer trained, alone, to give what the original's gave.

Attention scores and values are bilinear in the weights, so no least squares finds the best of all four projections
together; a short descent from the merged weights does. One layer is trained at a time on the converted stream, against
the target of the output ridge (`repairs.RepairInputs.target`), with its loss

    sum_t w_t |attn(X~)_t - Y*_t|^2 / sum_t w_t |Y*_t|^2,   w_t = 1 / mean(h_t^2),

in which the few tokens with massive activations weigh no more than others (attention transfer of LoLCATs, arXiv
2410.10254, section 3.2, with weights and an error-compensating target).

A descent fits its own text. Part of every kind of text is held out, and where there are several kinds, one of them
(another for each layer) is held out whole. The state that is best on all of that is kept, and none that is worse than
the start on any of it.

Of several processes, whoever holds the batch of a step computes its gradient, and all take the step: a descent is as
long as that of one process, and the same.

Legend: B sequences of a batch, R sequences of a step, T tokens, C model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.kv_heads.merge.weights import LayerWeights, read_layer, write_layer
from retrofit.kv_heads.repair.outcome import RepairOutcome
from retrofit.kv_heads.repair.repair_inputs import Fold, RepairInputs
from retrofit.system.dealing import collected
from retrofit.system.world import World

STEP_TOKENS = 2048
CHECKS = 3  # how often a descent is measured on held-out text
HELD_OUT_EVERY = 6  # batches of a kind, of which one is held out


@dataclass(frozen=True)
class LayerTransfer:
    """passes: over the calibration text that is trained on. learning_rate: of Adam, as a share of each tensor's root
    mean square, warmed up over five steps and brought to zero along a cosine."""

    name: str = "transfer"
    passes: float = 2.0
    learning_rate: float = 0.02

    def columns(self, heads: int, head_dim: int, bias: bool) -> int:
        return 0

    def __call__(self, inputs: RepairInputs, weights: LayerWeights) -> tuple[LayerWeights, RepairOutcome]:
        train, held_out = split(inputs.folds, inputs.layer.index)
        # What `write_layer` does not write (biases of norms) must stay: it would be trained and then lost.
        written = write_layer(weights, inputs.layer)
        parameters = {name: p for name, p in inputs.run.attention_parameters().items() if name in written}
        start = _errors(inputs, held_out)
        before = sum(start.values()) / len(start)
        if min(start.values()) == 0.0:  # nothing is asked of this layer, or it gives it already
            return weights, RepairOutcome(self.name, False, before, before)
        best, state = dict.fromkeys(start, 1.0), _copy(parameters)
        order = list(_steps(inputs, train, self.passes))
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": self.learning_rate * _rms(p)} for p in parameters.values()], betas=(0.9, 0.95)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(order)))
        for p in parameters.values():
            p.requires_grad_(True)
        for number, (batch, rows) in enumerate(order, 1):
            optimizer.zero_grad()
            if batch in inputs.own:
                _squared_error(inputs, batch, rows).backward()  # type: ignore[no-untyped-call]
            _share_gradients(parameters.values(), inputs.world)
            optimizer.step()
            schedule.step()
            if number == len(order) or number % max(1, len(order) // CHECKS) == 0:
                ratios = {kind: error / start[kind] for kind, error in _errors(inputs, held_out).items()}
                # NaN, of a descent that diverged, is in no comparison below 1.
                if all(ratio < 1.0 for ratio in ratios.values()) and _mean(ratios) < _mean(best):
                    best, state = ratios, _copy(parameters)
        state = inputs.world.share(state)
        for name, p in parameters.items():
            p.requires_grad_(False)
            p.data.copy_(state[name])
            p.grad = None
        after = sum(start[kind] * best[kind] for kind in start) / len(start)
        accepted = after < before
        return read_layer(state.__getitem__, inputs.layer) if accepted else weights, RepairOutcome(
            self.name, accepted, before, after
        )


def split(folds: Sequence[Fold], layer: int) -> tuple[list[int], dict[str, list[int]]]:
    """Batches to train on, and held-out batches by kind of text. With several kinds, one is held out whole."""
    kinds = list(dict.fromkeys(kind for kind, _ in folds))
    unseen = kinds[layer % len(kinds)] if len(kinds) > 1 else None
    train: list[int] = []
    held_out: dict[str, list[int]] = {}
    for kind in kinds:
        batches = [i for i, (k, _) in enumerate(folds) if k == kind]
        period = min(HELD_OUT_EVERY, len(batches))
        out = batches if kind == unseen else batches[period - 1 :: period]
        held_out[kind] = out[:: max(1, len(out) // 2)][:2] if kind == unseen else out
        train += [i for i in batches if i not in out]
    return train, held_out


def _steps(inputs: RepairInputs, train: Sequence[int], passes: float) -> Iterator[tuple[int, slice]]:
    """(batch, its rows) of every step, in an order of the layer's own."""
    generator = torch.Generator().manual_seed(inputs.layer.index)
    pieces = []
    for batch in train:
        sequences, tokens = inputs.shape(batch)
        size = max(1, STEP_TOKENS // tokens)
        pieces += [(batch, slice(row, row + size)) for row in range(0, sequences, size)]
    for _ in range(math.ceil(passes)):
        for place in torch.randperm(len(pieces), generator=generator).tolist()[: math.ceil(passes * len(pieces))]:
            yield pieces[place]


def _squared_error(inputs: RepairInputs, batch: int, rows: slice) -> Tensor:
    target_RTC, weight_RT = inputs.target(batch)[rows], inputs.weight(batch)[rows]
    out_RTC = inputs.attend(batch, rows)
    lost = ((out_RTC - target_RTC).square().sum(-1) * weight_RT).sum()
    return lost / (target_RTC.square().sum(-1) * weight_RT).sum().clamp_min(1e-30)


def _errors(inputs: RepairInputs, held_out: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The loss on held-out batches, by kind of text."""
    every = [i for batches in held_out.values() for i in batches]
    with torch.no_grad():
        own = {i: float(_squared_error(inputs, i, slice(None))) for i in every if i in inputs.own}
    lost = collected(own, inputs.world)
    return {kind: sum(lost[i] for i in batches) / len(batches) for kind, batches in held_out.items()}


def _share_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Give every process the gradients of the one that has them."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        world.sum_(parameter.grad)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def _rms(parameter: Tensor) -> float:
    """Root mean square; a tensor of zeros (a bias that is not used yet) moves like one of small weights."""
    return max(float(parameter.detach().square().mean().sqrt()), 0.01)


def _copy(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In host memory, where weights are when no layer is run; other processes have other GPUs."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def _mean(ratios: Mapping[str, float]) -> float:
    return sum(ratios.values()) / len(ratios)
