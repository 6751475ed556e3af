"""Every bundled recipe plans on models of every size, or is refused with what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

import retrofit
from retrofit import bundled
from retrofit.errors import UserError
from tests.tiny import tiny_config

RECIPES = [name for name in bundled.names("recipes") if not name.startswith("quickstart")]
FEWER = {"chat-gqa", "gqa", "mqa"}  # what they do is to make KV heads fewer, and nothing else


@pytest.mark.parametrize("kv_heads", [1, 3, 4, 8, 32])
@pytest.mark.parametrize("native", [2048, 4096, 8192, 32768, 131072])
def test_every_bundled_recipe_plans_on_any_model(native: int, kv_heads: int, tmp_path: Path) -> None:
    shape = {
        "num_attention_heads": 96,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": native,
        "hidden_size": 1536,
    }
    tiny_config("llama", **shape, head_dim=16).save_pretrained(tmp_path)
    for name in RECIPES:
        if name in FEWER and kv_heads == 1:
            with pytest.raises(UserError, match=r"(?s)already has 1 KV head, and can have no fewer.*leave out"):
                retrofit.plan(name, model=tmp_path, measure=False, progress=False)
            continue
        plan = retrofit.plan(name, model=tmp_path, measure=False, progress=False)
        assert plan.positions[1] == native * {"extend-4x": 4, "extend-long": 4, "gqa-long": 2}.get(name, 1)
        if name not in ("kernel-only", "extend-4x", "extend-long", "window", "budget"):
            fewer = 1 if name == "mqa" else max(1, kv_heads // 4)
            assert plan.kv_heads == (kv_heads, fewer)


def test_as_many_heads_and_a_training_are_refused_with_what_is_possible(tmp_path: Path) -> None:
    tiny_config("llama", num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"(?s)already has 8 KV heads: there is nothing .*choose one of: 1, 2, 4$"):
        retrofit.plan("gqa", model=tmp_path, overrides=["convert.kv_heads=8"], measure=False, progress=False)
    plan = retrofit.plan(
        "gqa", model=tmp_path, overrides=["convert.kv_heads=8", "recover=null"], measure=False, progress=False
    )
    assert plan.kv_heads == (8, 8)
