"""A tiny model, two texts and a recipe that runs every step on them in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from retrofit.cli.app import app
from tests.tiny import save_tiny

WORDS = (
    "the",
    "model",
    "reads",
    "a",
    "long",
    "text",
    "while",
    "other",
    "heads",
    "look",
    "back",
    "at",
    "every",
    "token",
)


def sentences(seed: int, count: int) -> str:
    """Text without meaning but with repetition that a tiny model can learn from."""
    state, out = seed, []
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        out.append(WORDS[state % len(WORDS)])
    return " ".join(out) + "."


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama, 4 KV heads, 512 positions, float32."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training files and a file for evaluation."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train").mkdir()
    for index in range(12):
        (folder / "train" / f"{index:02d}.txt").write_text(sentences(index, 200))
    (folder / "held.txt").write_text(sentences(99, 400))
    return folder


def sections(model: Path, texts: Path) -> dict[str, Any]:
    """A recipe with every step."""
    return {
        "name": "tiny",
        "model": str(model),
        "convert": {"kv_heads": 1, "method": "mean"},
        "context": {"length": 1024, "method": "yarn"},
        "recover": {
            "tokens": 512,
            "sequence_length": 64,
            "text": [str(texts / "train")],
            "evals": 2,
            "eval_tokens": 64,
            "checkpoints": 4,
            "adapter": {"rank": 2, "alpha": 4},
        },
        "evaluate": {
            "lengths": [64, 128, 600],
            "text": [str(texts / "held.txt")],
            "documents": 1,
            "tail": 32,
            "chunk": 64,
            "cost_lengths": [32, 64],
            "decode_tokens": 2,
            "resamples": 100,
        },
        "publish": {"license": "apache-2.0", "base_model": "someone/tiny"},
        "require": {"ppl_ratio@64": "<= 100"},
    }


@pytest.fixture
def recipe(tmp_path: Path, model: Path, texts: Path) -> Callable[..., Path]:
    """Write a recipe; keywords replace its keys."""

    def write(**changed: object) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**sections(model, texts), **changed}))
        return path

    return write


def retrofit(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
