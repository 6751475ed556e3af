"""Converts a folder for CTranslate2 and scores it. Opened by `scoring.py`."""

import tempfile
from pathlib import Path
from typing import Any


def version() -> str:
    """The release."""
    import ctranslate2

    return str(ctranslate2.__version__)


def score(request: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Log-probabilities over the vocabulary, in float32."""
    import ctranslate2
    import numpy as np

    with tempfile.TemporaryDirectory() as place:
        out = str(Path(place) / "model")
        _converter()(request["folder"]).convert(out)
        model = ctranslate2.Generator(out, device="cpu", compute_type="float32", intra_threads=1)
        found = []
        for document in request["documents"]:
            scored = np.array(model.forward_batch([document["ids"]], return_log_probs=True))[0]
            logprobs = scored[document["positions"]]
            tokens, top = None, request["top"]
            if top is not None:
                tokens = np.argsort(-logprobs, axis=-1)[:, :top]
                logprobs = np.take_along_axis(logprobs, tokens, 1)
            found.append((tokens, logprobs))
        return found


def _converter() -> Any:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            """With an unknown token: where there is none some of its loaders write null, which its engine refuses."""
            tokenizer = super().load_tokenizer(*args, **kwargs)
            tokenizer.unk_token = tokenizer.unk_token or tokenizer.eos_token
            return tokenizer

    return Converter
