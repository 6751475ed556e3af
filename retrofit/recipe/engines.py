"""Names of the engines that a checkpoint can be tried in."""

from __future__ import annotations

from typing import Literal, get_args

Engine = Literal["transformers", "transformers-4.51", "transformers-4.57", "vllm", "llama.cpp", "mlx", "ctranslate2"]
ENGINES: tuple[str, ...] = get_args(Engine)
