"""Scores a GGUF file with llama.cpp, through xllamacpp's server object. Opened by `scoring.py`."""

import json
from typing import Any

TOP = 20


def version() -> str:
    """The release of the extension module, whose number ends with llama.cpp's build."""
    import xllamacpp

    return str(xllamacpp.__version__)


def score(request: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The most probable tokens after every prefix that ends at a wanted position."""
    server = _server(request["folder"], request["context"])
    top = request["top"] or TOP
    found = []
    for document in request["documents"]:
        tokens, logprobs = [], []
        for position in document["positions"]:
            listed = _next(server, document["ids"][: position + 1], top)
            tokens.append([one["id"] for one in listed])
            logprobs.append([one["logprob"] for one in listed])
        found.append((tokens, logprobs))
    return found


def _next(server: Any, ids: list[int], top: int) -> Any:
    """What llama.cpp lists for the token after `ids`; probabilities before any sampling."""
    asked = {
        "prompt": ids,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": top,
        "cache_prompt": True,
        "post_sampling_probs": False,
        "ignore_eos": True,
    }
    answer = server.handle_completions(asked)
    if isinstance(answer, str | bytes):
        answer = json.loads(answer)
    if "completion_probabilities" not in answer:
        raise ValueError(str(answer.get("error", answer))[:300])
    [first] = answer["completion_probabilities"]
    return first["top_logprobs"]


def _server(path: str, context: int) -> Any:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = path
    options.n_ctx = context
    options.n_parallel = 1
    options.n_batch = options.n_ubatch = 512
    options.n_predict = 1
    options.warmup = False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(options)
