"""Numbers that a recipe can require, from stored token losses and specs. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from retrofit.evaluation.metrics.perplexity import last as last_tokens
from retrofit.evaluation.metrics.perplexity import perplexity
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.tasks.answers import TaskAnswers, metrics_of


def metrics(
    losses: Mapping[str, TokenLosses],
    lengths: Sequence[int],
    tail: int,
    *,
    kv_bytes: tuple[int, int],
    kernel_max_diff: float,
    effective_length: int | None = None,
    tasks: Sequence[Mapping[str, TaskAnswers]] = (),
) -> dict[str, float]:
    """{"ppl@2048": ..., "ppl_ratio@2048/python-docs": ..., "kv_ratio": ..., ...} of the last model against the first.

    losses: by model, the original first, the result last. tail: tokens of a TailPPL. kv_bytes: of the KV cache at the
    result's whole window, before and after. effective_length: of the last model, in tokens; left out when it was not
    certified. tasks: answers by task, of each model.
    """
    first, *_, last = (*losses.values(), *losses.values())
    found = {"kv_ratio": kv_bytes[1] / kv_bytes[0], "kernel_max_diff": kernel_max_diff}
    if effective_length is not None:
        found["effective_length"] = effective_length
    for kind in (None, *dict.fromkeys(last.kinds)):
        suffix = f"/{kind}" if kind else ""
        for length in lengths:
            at = f"@{length}{suffix}"
            before, after = (_arrays(model, kind, length) for model in (first, last))
            found[f"ppl{at}"] = perplexity(after)
            found[f"ppl_ratio{at}"] = found[f"ppl{at}"] / perplexity(before)
            found[f"tail_ppl{at}"] = perplexity(last_tokens(after, tail))
            found[f"tail_ppl_ratio{at}"] = found[f"tail_ppl{at}"] / perplexity(last_tokens(before, tail))
    return {**found, **(metrics_of(tasks) if tasks else {})}


def _arrays(losses: TokenLosses, kind: str | None, length: int) -> tuple[np.ndarray, ...]:
    return (losses if kind is None else losses.of_kind(kind)).at(length)
