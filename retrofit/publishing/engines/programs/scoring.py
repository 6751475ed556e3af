"""The program that scores requests in one engine; run in the engine's environment, so nothing of this package is used.

`main(job)` opens the engine's own script beside this file, which has two functions: `version()`, and
`score(request)` -> (token ids [positions, k] or None, log-probabilities [positions, k or the whole vocabulary]) for
every document of the request. A request that an engine cannot load gets the engine's message, and the next one follows.

A request: folder (a GGUF file for llama.cpp); documents: token ids and the positions at which the next token's
distribution is wanted, ascending; top: so many of the most probable tokens, None for all; context: tokens of the
longest document and one more; window: tokens that the folder claims; config: fields of the configuration that are
replaced (transformers only); cache_bytes: for a KV cache (vLLM only); cache_type: of the KV
cache (llama.cpp only); out: the .npz that is written. A script may add a
`note` to the request.
"""

import runpy
from pathlib import Path
from typing import Any

MAX_MESSAGE = 600


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Score `job["requests"]` with the script `job["engine"]` and say how each went, in order."""
    engine = runpy.run_path(str(Path(__file__).with_name(f"{job['engine']}.py")))
    found: list[dict[str, Any]] = []
    for request in job["requests"]:
        try:
            greedy = _written(request, engine["score"](request))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is what the engine says of the folder
            found.append({"error": _message(error)})
            continue
        found.append({"greedy": greedy, "note": request.get("note")})
    return {"version": engine["version"](), "results": found}


def _written(request: dict[str, Any], rows: list[Any]) -> list[list[int]]:
    """Write the rows of every document; returns the most probable token at every position."""
    import numpy as np

    arrays: dict[str, Any] = {}
    greedy = []
    for index, (tokens, logprobs) in enumerate(rows):
        logprobs = np.asarray(logprobs, np.float32)
        best = logprobs.argmax(-1)
        arrays[f"logprobs{index}"] = logprobs
        if tokens is not None:
            arrays[f"tokens{index}"] = np.asarray(tokens, np.int64)
            best = np.take_along_axis(arrays[f"tokens{index}"], best[:, None], 1)[:, 0]
        greedy.append([int(token) for token in best])
    np.savez(request["out"], **arrays)
    return greedy


def _message(error: BaseException) -> str:
    """What went wrong, in the engine's words: type and first lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:MAX_MESSAGE]
