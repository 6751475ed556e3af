"""Scores with vLLM on a CPU. Opened by `scoring.py`."""

import gc
import os
from typing import Any

TOP = 20
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    DO_NOT_TRACK="1",
)


def version() -> str:
    """The release."""
    import vllm

    return str(vllm.__version__)


def score(request: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The most probable tokens at every wanted position, from one pass over each document."""
    from vllm import LLM, SamplingParams

    top = request["top"] or TOP
    model = LLM(
        model=request["folder"],
        dtype="float32",
        enforce_eager=True,
        max_logprobs=top,
        max_num_batched_tokens=max(4096, request["context"]),
        max_num_seqs=1,
        disable_log_stats=True,
        seed=0,
        **({"max_model_len": request["window"]} if request.get("window") else {}),
    )
    try:
        accepted = model.llm_engine.model_config.max_model_len
        if accepted < request["context"]:
            raise ValueError(f"it takes {accepted} tokens by default, not the {request['context']} asked for")
        return [_scored(model, SamplingParams, document, top) for document in request["documents"]]
    finally:
        del model
        gc.collect()


def _scored(model: Any, settings: Any, document: dict[str, Any], top: int) -> tuple[Any, Any]:
    asked = settings(max_tokens=1, temperature=0, prompt_logprobs=top, logprobs=top)
    [answer] = model.generate([{"prompt_token_ids": document["ids"]}], asked, use_tqdm=False)
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    tokens, logprobs = [], []
    for position in document["positions"]:
        # The token that followed stands in the row as well, whatever its rank.
        best = sorted(rows[position].items(), key=lambda pair: -pair[1].logprob)[:top]
        tokens.append([token for token, _ in best])
        logprobs.append([found.logprob for _, found in best])
    return tokens, logprobs
