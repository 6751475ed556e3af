"""A folder as this program writes it, for the programs that people use it with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_tiny

WINDOW = 2048
THETA = 50_000.0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with 2 KV heads of 4 and a YaRN window of four times its own 512 tokens, in float32, with a chat
    template."""
    import retrofit

    place = tmp_path_factory.mktemp("downstream")
    rope = {"rope_type": "default", "rope_theta": THETA}
    source = save_tiny(place / "source", "llama", chat_template=True, rope_parameters=rope, head_dim=64)
    retrofit.convert(source, out=place / "heads", kv_heads=2, method="mean", progress=False)
    retrofit.extend(place / "heads", out=place / "ours", length=WINDOW, method="yarn", progress=False)
    return place / "ours"
