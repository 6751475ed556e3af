"""Values as attention averages them: what a merge of values and output projection should keep.

The output projection never sees a value, only averages A_h v over the tokens that query head h looks at; directions in
which values vary from token to token, and their averages do not, cost nothing to lose. For a group of KV heads that
share one code, every query head averages the values of all of them, so the Gram is of A_h v for all KV heads' v.

Stock attention functions give A_h v for the KV head that query head h reads. With the value heads rolled by r, they
give it for the head r places on: K passes show every pair.

Legend: N sequences, T tokens, C model width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrofit.kv_heads.calibrate.stream import LayerRun
from retrofit.kv_heads.merge.weights import LayerWeights, write_layer
from retrofit.model.spec import LayerAttention

_VALUES = 1 << 26  # averaged values of one sequence that exist at a time


def averaged_values(
    run: LayerRun, weights: LayerWeights, layer: LayerAttention, hidden_NTC: Tensor, kwargs: dict[str, Any]
) -> Iterator[Tensor]:
    """[T', H, K, D] of each sequence: query head h's average of KV head k's values, for T' tokens at even distances
    (all of them where they fit).

    run: the layer with `weights` in memory, as it is again afterwards. kwargs: of a batch of one sequence.
    """
    heads, kv_heads, head_dim = layer.query_heads, layer.kv_heads, layer.head_dim
    step = -(-hidden_NTC.shape[1] * heads * kv_heads * head_dim // _VALUES)
    names = [slot.name for slot in (layer.v, layer.v_bias) if slot is not None]
    reads = torch.arange(heads) // (heads // kv_heads)
    for hidden_TC in hidden_NTC:
        seen = hidden_NTC.new_empty(len(range(0, len(hidden_TC), step)), heads, kv_heads, head_dim)
        for roll in range(kv_heads):
            v_bias = weights.v_bias_KD
            rolled = replace(
                weights,
                v_KDC=weights.v_KDC.roll(-roll, 0),
                v_bias_KD=None if v_bias is None else v_bias.roll(-roll, 0),
            )
            run.load(write_layer(rolled, layer, names))
            out_TN = run.head_outputs(hidden_TC[None], kwargs)[0, ::step]
            seen[:, torch.arange(heads), (reads + roll) % kv_heads] = out_TN.unflatten(1, (heads, head_dim))
        run.load(write_layer(weights, layer, names))
        yield seen


def chosen_rows(kinds: Sequence[str], lengths: Sequence[tuple[int, int]], tokens: int) -> dict[int, list[int]]:
    """Sequences of at most `tokens` tokens in all (one of each kind at least): {batch: rows}, at even distances within
    each kind.

    kinds, lengths: kind of text and (B, T) of each batch.
    """
    chosen: dict[int, list[int]] = {}
    names = list(dict.fromkeys(kinds))
    for name in names:
        rows = [(i, row) for i, kind in enumerate(kinds) if kind == name for row in range(lengths[i][0])]
        wanted = min(len(rows), max(1, tokens // (len(names) * lengths[0][1])))
        for n in range(wanted):
            batch, row = rows[n * len(rows) // wanted]
            chosen.setdefault(batch, []).append(row)
    return chosen
