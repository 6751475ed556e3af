"""How much disk a calibrated conversion needs, from the model's shape alone: it is asked for before anything else."""

from __future__ import annotations

from pathlib import Path

from retrofit.model.spec import AttentionSpec

_FLOAT32 = 4
_STREAMS = 4  # the original's and the converted one, into a layer and out of it


def room_needed(
    spec: AttentionSpec,
    kv_heads: int,
    tokens: int,
    *,
    repairs: bool,
    moments: bool,
    value_bytes: int,
    checkpoint_bytes: int,
) -> int:
    """The most bytes that lie on disk at a time: the streams of `tokens` tokens, which go before the checkpoint is
    written, and what every finished layer leaves. value_bytes: of a written weight.
    """
    first, width = spec.layers[0], spec.hidden_size
    per_token = _STREAMS * width + (width + first.query_heads * first.head_dim if repairs else 0)
    return max(_FLOAT32 * per_token * tokens, checkpoint_bytes) + sum(
        _layer(layer.query_heads, layer.kv_heads, layer.head_dim, width, kv_heads, moments, value_bytes)
        for layer in spec.layers
    )


def survey_room(spec: AttentionSpec, tokens: int, *, moments: bool) -> int:
    """The most bytes that one pass over the layers has on disk: the stream of `tokens` tokens into a layer and out of
    it, and the moments of all layers."""
    grams = sum(_grams(layer.kv_heads, layer.head_dim) for layer in spec.layers) if moments else 0
    return _FLOAT32 * (2 * spec.hidden_size * tokens + grams)


def _layer(heads: int, before: int, dim: int, width: int, after: int, moments: bool, value_bytes: int) -> int:
    projections = 2 * (heads + after) * dim * (width + 1)
    return projections * value_bytes + (_grams(before, dim) * _FLOAT32 if moments else 0)


def _grams(heads: int, dim: int) -> int:
    """Values in a layer's moments: triangles of keys, values and averaged values, and the queries of each KV head."""
    return 3 * (heads * dim) * (heads * dim + 1) // 2 + heads * dim * (dim + 3)


def held(folder: Path) -> int:
    """Bytes of what an interrupted attempt left."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
