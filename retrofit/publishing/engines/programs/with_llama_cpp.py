"""Scores a GGUF file with llama.cpp, through xllamacpp's server object. Opened by `scoring.py`."""

import json
import os
import tempfile
from typing import Any

TOP = 20
TRIES = 100


def version() -> str:
    """The release of the extension module, whose number ends with llama.cpp's build."""
    import xllamacpp

    return str(xllamacpp.__version__)


def score(request: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The most probable tokens after every prefix that ends at a wanted position."""
    server = _server(request["folder"], request["context"], request["cache_type"])
    top = request["top"] or TOP
    sampled = _text_token(server, request["documents"][0]["ids"])
    found = []
    for document in request["documents"]:
        tokens, logprobs = [], []
        for position in document["positions"]:
            listed = _next(server, document["ids"][: position + 1], top, sampled)
            assert listed is not None
            tokens.append([one["id"] for one in listed])
            logprobs.append([one["logprob"] for one in listed])
        found.append((tokens, logprobs))
    return found


def _text_token(server: Any, ids: list[int]) -> int:
    """A token of the document that is text by itself: where a part of a character is sampled, nothing is listed."""
    for token in ids[:TRIES]:
        if _next(server, ids[:1], 1, token) is not None:
            return token
    raise ValueError(f"none of the first {TRIES} tokens is text by itself, so llama.cpp lists no probabilities")


def _next(server: Any, ids: list[int], top: int, sampled: int) -> Any:
    """What llama.cpp lists for the token after `ids`: probabilities before any sampling, which then takes `sampled`."""
    asked = {
        "prompt": ids,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": top,
        "cache_prompt": True,
        "post_sampling_probs": False,
        "ignore_eos": True,
        "logit_bias": [[sampled, 1e4]],
    }
    answer = server.handle_completions(asked)
    if isinstance(answer, str | bytes):
        answer = json.loads(answer)
    if "choices" not in answer:
        raise ValueError(str(answer.get("error", answer))[:300])
    logprobs = answer["choices"][0]["logprobs"]
    return logprobs["content"][0]["top_logprobs"] if logprobs and logprobs["content"] else None


def _server(path: str, context: int, cache_type: str) -> Any:
    """cache_type: of keys and values; llama.cpp computes blocks of values in its flash attention alone."""
    import xllamacpp

    options, kinds = xllamacpp.CommonParams(), xllamacpp.llama_flash_attn_type
    blocks = cache_type not in ("f32", "f16")
    options.model.path = path
    options.n_ctx = context
    options.n_parallel = 1
    options.n_batch = options.n_ubatch = 512
    options.n_predict = 1
    options.warmup = False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type.upper()}")
    options.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if blocks else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with tempfile.TemporaryFile() as log:
        shown = os.dup(2)
        os.dup2(log.fileno(), 2)  # why a file is refused stands in the log alone
        try:
            return xllamacpp.Server(options)
        except RuntimeError as error:
            log.seek(0)
            lines = [
                line.partition(": ")[2] for line in log.read().decode(errors="replace").splitlines() if " E " in line
            ]
            raise ValueError(lines[0] if lines else str(error)) from None
        finally:
            os.dup2(shown, 2)
            os.close(shown)
