"""Scores with transformers, whichever release is installed. Opened by `scoring.py`."""

import inspect
from typing import Any


def version() -> str:
    """The release."""
    import transformers

    return transformers.__version__


def score(request: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Log-probabilities over the vocabulary, in float32, with the attention that transformers takes by default."""
    import numpy as np
    import torch

    model = _model(request)
    found = []
    with torch.no_grad():
        for document in request["documents"]:
            ids = torch.tensor([document["ids"]])
            logits = _logits(model, ids, document["positions"])
            logprobs = torch.log_softmax(logits.float(), -1).numpy()
            tokens, top = None, request["top"]
            if top is not None:
                tokens = np.argsort(-logprobs, axis=-1)[:, :top]
                logprobs = np.take_along_axis(logprobs, tokens, 1)
            found.append((tokens, logprobs))
    return found


def _logits(model: Any, ids: Any, positions: list[int]) -> Any:
    """Of the wanted positions alone, where the class can leave the others out."""
    import torch

    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(positions)).logits[0]
    return model(input_ids=ids, use_cache=False).logits[0, positions]


def _model(request: dict[str, Any]) -> Any:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(request["folder"], trust_remote_code=False)
    for name, value in (request.get("config") or {}).items():
        setattr(config.get_text_config(), name, value)
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype = "dtype" if release >= (4, 56) else "torch_dtype"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        request["folder"],
        config=config,
        output_loading_info=True,
        trust_remote_code=False,
        **{dtype: torch.float32},
    )
    model, loading = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(kind):
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, loading[kind]))[:4])}")
    return model.eval()
