"""Seeded bytes, and everything that was ever found, through every parser: a result or a UserError, within seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
INPUTS = {"tokenizer": 40, "config": 60, "recipe": 100}
"""Seeded inputs of the slower targets; others get more."""


@pytest.mark.parametrize("name", TARGETS)
def test_seeded_bytes(name: str) -> None:
    generator = random.Random(name)
    for _ in range(INPUTS.get(name, 200)):
        TARGETS[name](generator.randbytes(generator.choice((2, 8, 24, 60))))


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*.bin")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_found(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())
