"""A checkpoint is whole when it has what its configuration asks for; what is not is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.model.load import load_config
from retrofit.model.whole import expected, require_complete
from tests.tiny import FAMILIES, save_tiny

Tensors = dict[str, torch.Tensor]


def check(folder: Path) -> None:
    config = load_config(folder)
    require_complete(Checkpoint.open(folder), config, describe(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_what_is_expected(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, tie_word_embeddings=tied)
    config = load_config(folder)
    stored = {name: entry.shape for name, entry in Checkpoint.open(folder).entries.items()}
    assert dict(expected(config, describe(config))) == stored


def without(*endings: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    ("change", "said", "fix"),
    [
        (
            without("layers.1.self_attn.k_proj.weight"),
            r"lacks 1 tensors .*`model\.layers\.1\.self_attn\.k_proj",
            "again",
        ),
        (without("layers.1.mlp.up_proj.weight"), r"lacks 1 tensors .*`model\.layers\.1\.mlp\.up_proj", "again"),
        (without("proj.weight"), r"lacks 14 tensors .* and 10 more", "again"),
        (lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()}, "lacks", "save_pretrained"),
    ],
)
def test_missing_tensors_are_listed(change: Callable[[Tensors], Tensors], said: str, fix: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said) as caught:
        check(folder)
    assert fix in str(caught.value.fix)


def test_shapes_that_the_configuration_does_not_mean_are_listed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 2}))
    with pytest.raises(
        UserError, match=r"4 tensors have another shape .*k_proj.weight` is \[64, 64\] and not \[32, 64\]"
    ):
        check(folder)
