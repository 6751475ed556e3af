"""The moments of one layer on text, as calibration and survey both take them.

Legend: T tokens, C model width, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from retrofit.kv_heads.calibrate.averaged import averaged_values, chosen_rows
from retrofit.kv_heads.calibrate.moments import LayerMoments, MomentSums
from retrofit.kv_heads.calibrate.stream import LayerRun
from retrofit.kv_heads.merge.qk_norm import project, queries_and_keys
from retrofit.kv_heads.merge.weights import LayerWeights
from retrofit.model.spec import LayerAttention
from retrofit.system.world import ALONE, World


def layer_moments(
    run: LayerRun,
    weights: LayerWeights,
    layer: LayerAttention,
    batches: Sequence[tuple[str, Tensor]],
    hidden: Callable[[int], Tensor],
    kwargs: Callable[[int], dict[str, Any]],
    single: dict[str, Any],
    *,
    averaged_tokens: int,
    own: Sequence[int] | None = None,
    world: World = ALONE,
) -> LayerMoments:
    """Moments of a layer, with `weights` in memory, on the stream that enters it.

    batches: (kind, ids [B, T]) of each. hidden, kwargs: a batch's stream [B, T, C] and keyword arguments by its number;
    single: those of a batch of one sequence. averaged_tokens: tokens whose attention patterns average the values, 0 for
    none. own: numbers of the batches that this process reads, all by default; the others of `world` read the rest, and
    all return the moments of the whole.
    """
    own = range(len(batches)) if own is None else own
    sums = MomentSums(layer.kv_heads)
    # Of a process that reads no batch, where the others read theirs.
    none_TC = weights.k_KDC.new_empty(0, weights.k_KDC.shape[2], device=run.device)
    sums.add(*queries_and_keys(none_TC, weights, layer), project(none_TC, weights.v_KDC, weights.v_bias_KD), none_TC)
    for i in own:
        x_BTC = hidden(i)
        a_TC = run.attention_input(x_BTC, kwargs(i)).flatten(0, 1)
        v_TKD = project(a_TC, weights.v_KDC, weights.v_bias_KD)
        sums.add(*queries_and_keys(a_TC, weights, layer), v_TKD, x_BTC.flatten(0, 1))
    if averaged_tokens:
        # Each takes K passes: no more of them than one pass over all of the text costs.
        tokens = min(averaged_tokens, sum(ids.numel() for _, ids in batches) // layer.kv_heads)
        sizes = [(ids.shape[0], ids.shape[1]) for _, ids in batches]
        chosen = chosen_rows([kind for kind, _ in batches], sizes, tokens)
        for i, rows in ((i, rows) for i, rows in chosen.items() if i in own):
            for averaged_THKD in averaged_values(run, weights, layer, hidden(i)[rows], single):
                sums.add_averaged(averaged_THKD)
    sums.together(world)
    return sums.finish(layer.index)
