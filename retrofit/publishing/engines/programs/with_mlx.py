"""Scores with mlx-lm on a CPU. Opened by `scoring.py`."""

from importlib import metadata
from pathlib import Path
from typing import Any


def version() -> str:
    """The release of mlx-lm."""
    return metadata.version("mlx-lm")


def score(request: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Log-probabilities over the vocabulary, in float32."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model = load_model(Path(request["folder"]))[0]
    model.set_dtype(mx.float32)
    found = []
    for document in request["documents"]:
        logits = model(mx.array([document["ids"]]))[0].astype(mx.float32)[mx.array(document["positions"])]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        tokens, top = None, request["top"]
        if top is not None:
            tokens = np.argsort(-logprobs, axis=-1)[:, :top]
            logprobs = np.take_along_axis(logprobs, tokens, 1)
        found.append((tokens, logprobs))
    return found
