"""Score tokens in an engine, in its own environment and process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrofit.errors import UserError
from retrofit.fresh import FreshError, run_fresh
from retrofit.publishing.engines.environments import Environment

PROGRAM = Path(__file__).with_name("programs") / "scoring.py"
SCRIPTS = {
    "transformers": "with_transformers",
    "vllm": "with_vllm",
    "llama.cpp": "with_llama_cpp",
    "mlx": "with_mlx",
    "ctranslate2": "with_ctranslate2",
}
ON_GPUS = ("vllm", "llama.cpp")
"""Engines that compute on this machine's GPUs where somebody installed a build for them; the environments that are made
here are for CPUs."""
START_SECONDS = 600.0
SECONDS_PER_REQUEST = 120.0
SLOW_FLOPS = 1e9  # of a machine that this is tried on
ROOM = 12 << 30  # bytes of data: vLLM reserves gigabytes whatever the model


@dataclass(frozen=True)
class Passage:
    """Tokens, and the positions (ascending) after which the distribution of the next token is wanted."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A folder (a GGUF file for llama.cpp) and what is scored of it.

    window: tokens that the folder claims. top: so many of the most probable tokens, None for the whole vocabulary where
    the engine gives it. config: fields of the configuration to replace, for transformers alone. cache_bytes: of a KV
    cache that holds the longest passage, in float32. cache_type: of llama.cpp's KV cache.
    """

    path: Path
    passages: tuple[Passage, ...]
    window: int
    top: int | None = 20
    config: Mapping[str, Any] = field(default_factory=dict)
    cache_bytes: int = 64 << 20
    cache_type: str = "f32"

    @property
    def context(self) -> int:
        """Tokens of the longest passage and one more."""
        return 1 + max(len(passage.input_ids) for passage in self.passages)


@dataclass(frozen=True)
class Rows:
    """Of one passage, a row a position. tokens: [positions, k] which, None where a row is the whole vocabulary;
    logprobs: [positions, k]; greedy: the most probable token of each."""

    tokens: np.ndarray | None
    logprobs: np.ndarray
    greedy: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """What an engine gave for one request: rows of every passage, or the message with which it refused.

    note: how it has to be started.
    """

    version: str
    rows: tuple[Rows, ...] = ()
    error: str | None = None
    note: str | None = None


def engine_of(name: str) -> str:
    """The engine of an environment: `transformers` of `transformers-4.57`."""
    return next(engine for engine in SCRIPTS if name == engine or name.startswith(f"{engine}-"))


def computes_on_gpus(environment: Environment) -> bool:
    """Whether the engine of an environment sees the GPUs that this process may use, if there are any."""
    return not environment.pinned and engine_of(environment.name) in ON_GPUS


def score(environment: Environment, requests: Sequence[Request]) -> list[Scored]:
    """Score every request in one process, one after the other.

    Raises UserError with the last lines of the process where it died, so that none has a result.
    """
    with tempfile.TemporaryDirectory() as place:
        outs = [Path(place) / f"{index}.npz" for index in range(len(requests))]
        job = {
            "engine": SCRIPTS[engine_of(environment.name)],
            "requests": [_job(request, out) for request, out in zip(requests, outs, strict=True)],
        }
        stored = sum(_nbytes(request.path) for request in requests)
        tokens = sum(len(passage.input_ids) for request in requests for passage in request.passages)
        longest = max(_nbytes(request.path) for request in requests)
        try:
            done = run_fresh(
                PROGRAM,
                job,
                seconds=START_SECONDS + SECONDS_PER_REQUEST * len(requests) + stored * tokens / SLOW_FLOPS,
                memory=None if computes_on_gpus(environment) else ROOM + 8 * longest,
                cwd=Path(place),
                python=environment.python,
            )
        except FreshError as error:
            raise UserError(
                f"{environment.name} did not run to its end:\n  {error}",
                where=str(environment.python),
                fix="the lines above are the end of that process's output",
            ) from None
        return [
            Scored(done["version"], error=one["error"])
            if "error" in one
            else Scored(done["version"], _rows(out, one["greedy"]), note=one["note"])
            for one, out in zip(done["results"], outs, strict=True)
        ]


def _job(request: Request, out: Path) -> dict[str, Any]:
    return {
        "folder": str(request.path.absolute()),
        "documents": [
            {"ids": list(passage.input_ids), "positions": list(passage.positions)} for passage in request.passages
        ],
        "top": request.top,
        "context": request.context,
        "config": dict(request.config),
        "window": request.window,
        "cache_bytes": request.cache_bytes,
        "cache_type": request.cache_type,
        "out": str(out),
    }


def _rows(path: Path, greedy: Sequence[Sequence[int]]) -> tuple[Rows, ...]:
    with np.load(path) as arrays:
        return tuple(
            Rows(arrays.get(f"tokens{index}"), arrays[f"logprobs{index}"], tuple(best))
            for index, best in enumerate(greedy)
        )


def _nbytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
