"""The types of GGUF files: which of llama.cpp's programs writes each, and how large it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from retrofit.publishing.engines.converter import OutType
from retrofit.recipe.values import GgufType

CONVERTED: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")
"""What the converter writes from the folder itself."""
FTYPES: Mapping[GgufType, int] = {
    "q6_k": 18,
    "q5_k_m": 17,
    "q4_k_m": 15,
    "q4_0": 2,
    "q3_k_m": 12,
    "q2_k": 10,
}
"""What the quantiser writes from a file that the converter wrote: the numbers of `enum llama_ftype` in llama.h."""
STORED: Mapping[str, OutType] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""The type that holds the weights of a dtype as they are."""
FLOATS: tuple[GgufType, ...] = ("f32", "f16", "bf16")
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0}
_MOST_QUANTISED = 8.5 / 8  # llama.cpp falls back to as much where rows are no multiple of 256
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def stored_as(dtype: str) -> OutType:
    """The type that quantised files are made from: that of the checkpoint's own dtype, which loses nothing."""
    return STORED.get(dtype, "f32")


def converted(kinds: Sequence[GgufType], dtype: str) -> tuple[OutType, ...]:
    """What the converter has to write for `kinds`, the stored type first: every file is compared beside it."""
    asked = (stored_as(dtype), *(kind for kind in kinds if kind in CONVERTED))
    return cast(tuple[OutType, ...], tuple(dict.fromkeys(asked)))


def file_name(name: str, kind: GgufType) -> str:
    """`SmolLM2-135M-16k-Q4_K_M.gguf`, as files are called on the hub. name: of the model; what no file name holds
    becomes a hyphen."""
    return f"{_NAME.sub('-', Path(name).name).strip('-.') or 'model'}-{kind.upper()}.gguf"


def most_bytes(parameters: int, kinds: Sequence[GgufType], dtype: str) -> int:
    """Disk that writing the files takes at most, the one that others are made from included."""
    every = dict.fromkeys((*converted(kinds, dtype), *kinds))
    return int(sum(parameters * _BYTES.get(kind, _MOST_QUANTISED) for kind in every)) + (64 << 20)
