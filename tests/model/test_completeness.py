"""A checkpoint is whole when it has what its configuration asks for; what is not is listed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.model.completeness import expected, require_complete, require_sound, require_tied, tied_copy
from retrofit.model.families import describe
from retrofit.model.load import load_config
from tests.tiny import FAMILIES, save_tiny

Tensors = dict[str, torch.Tensor]


def check(folder: Path, *, by_name: bool = True) -> None:
    config = load_config(folder)
    require_complete(Checkpoint.open(folder), config, describe(config) if by_name else None)


def change_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_what_is_expected(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, tie_word_embeddings=tied)
    config = load_config(folder)
    stored = {name: entry.shape for name, entry in Checkpoint.open(folder).entries.items()}
    assert dict(expected(config, describe(config))) == stored
    check(folder)


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
        (
            lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()},
            "older names",
            "save_pretrained",
        ),
    ],
)
def test_missing_tensors_are_listed(change: Callable[[Tensors], Tensors], said: str, fix: str, tmp_path: Path) -> None:
    folder = change_weights(save_tiny(tmp_path / "model", "llama"), change)
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def adding(*names: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name: torch.ones(8).to(dtype) for name in names}}


def stored_as(dtype: torch.dtype, ending: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t.to(dtype) if n.endswith(ending) else t for n, t in tensors.items()}


def packed(tensors: Tensors) -> Tensors:
    """As AWQ and GPTQ store a matrix."""
    return {n.replace("q_proj.weight", "q_proj.qweight"): t.int() if "q_proj" in n else t for n, t in tensors.items()}


ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adding("v_head.summary.weight"), r"1 tensors have no place in a LlamaForCausalLM: `v_head\.summary\.weight`"),
        (adding("score.weight", "model.layers.2.eh_proj.weight"), "2 tensors have no place"),
        (adding("\x1b[2J", dtype=torch.int64), r"no place .*\\x1b\[2J"),
        (stored_as(torch.int8, "proj.weight"), r"look quantised \(int8\).*no quantization_config: `model"),
        (stored_as(torch.int32, "norm.weight"), r"look quantised \(int32\)"),
        (stored_as(torch.uint8, "layers.1.mlp.up_proj.weight"), r"look quantised \(uint8\).*layers\.1\.mlp\.up_proj"),
        (stored_as(torch.float8_e4m3fn, "k_proj.weight"), r"look quantised \(float8_e4m3fn\)"),
        (adding(f"{ATTENTION}.k_proj.weight_scale_inv"), "look quantised.*weight_scale_inv"),
        (adding(f"{ATTENTION}.k_scale"), "look quantised.*k_scale"),
        (packed, r"look quantised \(int32\).*q_proj\.qweight"),
        (without("layers.1.mlp.up_proj.weight", "lm_head.weight"), "lacks 2 tensors"),
        (lambda tensors: {f"language_model.{n}": t for n, t in tensors.items()}, "lacks 21 tensors"),
        (lambda tensors: {n: t.flatten() for n, t in tensors.items()}, "16 tensors have another shape"),
    ],
)
def test_tensors_that_are_not_what_they_seem(change: Callable[[Tensors], Tensors], said: str, folder: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check(change_weights(folder, change), by_name=False)
    assert caught.value.fix


def test_what_transformers_leaves_out_is_left_out(folder: Path) -> None:
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    check(change_weights(folder, adding(*names)))


def test_masks_of_older_releases_are_no_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt_bigcode")
    masks = adding("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", dtype=torch.uint8)
    check(change_weights(folder, masks))


def test_older_names_are_those_that_transformers_reads(folder: Path) -> None:
    change_weights(folder, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    check(folder, by_name=False)
    with pytest.raises(UserError, match="older names"):
        check(folder)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral")
    change_weights(folder, without("layers.1.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(UserError, match=r"lacks 1 tensors .*experts\.2\.w3"):
        check(folder)
    with pytest.raises(UserError, match="some are missing or have another shape"):
        check(folder, by_name=False)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tied_head_that_is_stored_as_well(prefix: str, tmp_path: Path) -> None:
    def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Checkpoint:
        def add(tensors: Tensors) -> Tensors:
            tensors = {prefix + name.removeprefix("model."): t for name, t in tensors.items() if "lm_head" not in name}
            return {**tensors, "lm_head.weight": change(tensors[f"{prefix}embed_tokens.weight"].clone())}

        return Checkpoint.open(change_weights(folder, add))

    folder = save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    config = load_config(folder)
    assert tied_copy(Checkpoint.open(folder), config) is None
    assert tied_copy(with_head(lambda e: e), config) == ("lm_head.weight", f"{prefix}embed_tokens.weight")
    require_sound(with_head(lambda e: e), config)
    require_sound(with_head(lambda e: e.double()), config)
    for change in (lambda e: e + 1e-3, lambda e: e.double() + 1e-12, lambda e: e[:-1]):
        with pytest.raises(UserError, match=rf"`lm_head\.weight` differs from `{prefix}embed_tokens\.weight`"):
            require_tied(with_head(change), config)
    config.tie_word_embeddings = False
    require_tied(with_head(lambda e: e + 1), config)
