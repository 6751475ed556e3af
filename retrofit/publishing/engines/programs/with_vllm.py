"""Scores with vLLM, on a GPU where it is built for one and sees it. Opened by `scoring.py`."""

import gc
import os
from typing import Any

TOP = 20
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
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
    """The most probable tokens at every wanted position, from one pass over each document.

    It is started with the tokens that there are, for which its cache has room. Where it takes another length by default
    than `window`, the request gets a note.
    """
    from vllm import EngineArgs, SamplingParams

    top, window = request["top"] or TOP, request["window"]
    accepted = EngineArgs(model=request["folder"], dtype="float32").create_model_config().max_model_len
    notes = [f"start it with --max-model-len {window}: by default it takes {accepted} tokens"] * (accepted != window)
    request["note"] = "; ".join([*notes, *_device()]) or None
    model = _model(request, top)
    try:
        return [_scored(model, SamplingParams, document, top) for document in request["documents"]]
    finally:
        del model
        gc.collect()


def _device() -> list[str]:
    """What it computed on, where that is no CPU."""
    from vllm.platforms import current_platform

    return [] if current_platform.is_cpu() else [f"on {current_platform.get_device_name()}"]


def _model(request: dict[str, Any], top: int) -> Any:
    from vllm import LLM

    gc.freeze()  # vLLM collects at every start, through all modules of torch each time
    return LLM(
        model=request["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=request["context"],
        max_logprobs=top,
        max_num_batched_tokens=max(2048, request["context"]),
        max_num_seqs=1,
        kv_cache_memory_bytes=request["cache_bytes"],
        disable_log_stats=True,
        seed=0,
    )


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
