"""What a re-expression is: the same function as another architecture, tensor by tensor.

Legend: H heads, D head dim, C model width, N output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]
HEADS = ("lm_head.weight", "embed_out.weight")
"""Heads that some checkpoints store beside an embedding they are tied to."""

_ROWS = 1024  # of a matrix, widened to float64 at a time


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Made:
    """One tensor of the target: `make` of the source tensors `sources`, by their names in the source's class."""

    sources: tuple[str, ...]
    make: Make = _same


@dataclass(frozen=True)
class Reexpression:
    """A source model as a model of the architecture `target`.

    fields: of the target's configuration. tensors: every stored tensor of the target by name; those made of the same
    source stand together. prefixes: other beginnings that stored source names have in older checkpoints. ignored:
    endings of stored source names that are no weights (masks and tables of older releases). folds: whether weights
    are multiplied into each other, which rounds in a dtype narrower than float32. notes: for people.
    """

    source: str
    target: str
    architecture: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Made]
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    folds: bool = False
    notes: tuple[str, ...] = field(default=())

    def config(self) -> Any:
        """The target's transformers configuration."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.target, **self.fields, architectures=[self.architecture])


def common_fields(config: Any) -> dict[str, Any]:
    """Fields that every target has under the same name."""
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "tie_word_embeddings")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def copied(names: Mapping[str, str]) -> dict[str, Made]:
    """{target name: source name} as tensors that are taken as they are."""
    return {target: Made((source,)) for target, source in names.items()}


def pair(target: str, source: str, *, bias: bool = True) -> dict[str, Made]:
    """Weight and bias of one module, taken as they are."""
    return copied({f"{target}.{kind}": f"{source}.{kind}" for kind in (("weight", "bias") if bias else ("weight",))})


def zeros(*shape: int) -> Made:
    """A tensor that the source does not have and the target adds."""
    return Made((), lambda: torch.zeros(shape))


def ones(*shape: int) -> Made:
    """A factor that the source does not have and the target multiplies with."""
    return Made((), lambda: torch.ones(shape))


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def scaled(w_NC: Tensor, norm_C: Tensor) -> Tensor:
    """W diag(gamma): a norm's weight goes into the matrix that reads the norm."""
    return wide(w_NC) * wide(norm_C)


def shifted(w_NC: Tensor, norm_bias_C: Tensor, b_N: Tensor | None) -> Tensor:
    """b + W beta: a norm's bias goes into the bias of the matrix that reads the norm. Summed in float64."""
    beta = norm_bias_C.double()
    out = torch.cat([rows.double() @ beta for rows in w_NC.split(_ROWS)])
    out = out if b_N is None else out + b_N.double()
    return out if w_NC.dtype == torch.float64 else out.float()


def heads_of_block(tensor: Tensor, which: int, head_dim: int) -> Tensor:
    """q (0), k (1) or v (2) of rows that are interleaved by head: [H, 3, D, ...] -> [H D, ...]."""
    return tensor.unflatten(0, (-1, 3, head_dim))[:, which].flatten(0, 1)


def to_half_split(tensor: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Rows of q or k by head, from pairs (x_2i, x_2i+1) to pairs (x_i, x_i + rotary_dim / 2)."""
    order = torch.cat(
        [torch.arange(0, rotary_dim, 2), torch.arange(1, rotary_dim, 2), torch.arange(rotary_dim, head_dim)]
    )
    return tensor.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def partial_factor(rotary_dim: int, head_dim: int) -> float:
    """The share of a head that int(head_dim * share) turns into rotary_dim again."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 2.0)
