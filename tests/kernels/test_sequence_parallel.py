"""Models whose sequences are shared out over processes, against one process that sees whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels import registry
from retrofit.kernels.placement import zigzag
from retrofit.kernels.registry import using
from retrofit.kernels.ring_group import Ring
from retrofit.kernels.sequence_parallel import _window_mask, sequence_parallel
from retrofit.model.families import describe
from retrofit.system.world import World
from tests.kernels.test_blockwise import BLOCKWISE, EXPRESSIBLE
from tests.ranks import on_ranks
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_model

TOKENS = 45  # no multiple of the chunks of 2, 3 or 4 ranks, and longer than the windows of 16 and 32


def ids(tokens: int = TOKENS, batch: int = 2) -> Tensor:
    return torch.randint(VOCAB_SIZE - 8, (batch, tokens), generator=torch.Generator().manual_seed(2))


def differences(world: World, models: list[tuple[str, dict[str, Any]]]) -> list[tuple[float, float, float]]:
    """|difference| to one process of (any logit, the loss, relative, any parameter's gradient) for every model."""
    return [_difference(world, tiny_model(family, **over)) for family, over in models]


def _difference(world: World, model: Any) -> tuple[float, float, float]:
    tokens, parameters = ids(), list(model.parameters())
    with using(model, BLOCKWISE):
        expected = model(input_ids=tokens, labels=tokens, use_cache=False)
        expected_grads = torch.autograd.grad(expected.loss, parameters)
    ring = Ring.over(TOKENS)
    with sequence_parallel(ring, model):
        found = model(
            **ring.inputs(tokens),
            labels=ring.shard(tokens),
            shift_labels=ring.next_tokens(tokens),
            num_items_in_batch=tokens[:, 1:].numel(),
            use_cache=False,
        )
        grads = torch.autograd.grad(found.loss, parameters)
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        loss, whole = world.sum_(found.loss.clone()), ring.unshard(found.logits)
        unequal = [
            (world.sum_(ours.clone()) - theirs).abs().max() for ours, theirs in zip(grads, expected_grads, strict=True)
        ]
        return (
            float((whole - expected.logits).abs().max()),
            float((loss - expected.loss).abs() / expected.loss),
            float(torch.stack(unequal).max()),
        )


def require_equal(folder: Path, ranks: int, models: list[tuple[str, dict[str, Any]]]) -> None:
    found = on_ranks(folder, ranks, differences, models)
    assert found == [found[0]] * ranks
    worst = {f"{family} {over}": parts for (family, over), parts in zip(models, found[0], strict=True)}
    assert {model: logits for model, (logits, _, _) in worst.items() if logits > 1e-5} == {}
    assert {model: loss for model, (_, loss, _) in worst.items() if loss > 1e-6} == {}
    assert {model: gradient for model, (_, _, gradient) in worst.items() if gradient > 1e-6} == {}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_every_family_equals_one_process(tmp_path: Path, ranks: int) -> None:
    require_equal(tmp_path, ranks, EXPRESSIBLE)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_more_and_fewer_ranks_equal_one_process(tmp_path: Path, ranks: int) -> None:
    require_equal(tmp_path, ranks, [("llama", {"num_key_value_heads": 2}), ("gemma3_text", {}), ("gpt_bigcode", {})])


def test_frequencies_that_depend_on_the_length_are_those_of_the_whole_sequence(tmp_path: Path) -> None:
    """Rank 0 holds the last positions, rank 1 none beyond the middle: alone it would take the short frequencies."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
    longrope = {
        "original_max_position_embeddings": 40,
        "rope_parameters": rope | {"original_max_position_embeddings": 40},
    }
    dynamic = {
        "max_position_embeddings": 40,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    }
    require_equal(tmp_path, 2, [("phi3", longrope), ("llama", dynamic)])


def checkpointed(world: World) -> float:
    model, tokens, ring = tiny_model("llama").train(), ids(), Ring.over(TOKENS)
    parameters = list(model.parameters())
    losses = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with sequence_parallel(ring, model):
            model(
                **ring.inputs(tokens), labels=ring.shard(tokens), shift_labels=ring.next_tokens(tokens), use_cache=False
            ).loss.backward()
        losses.append([parameter.grad.clone() for parameter in parameters])
    return max(float((a - b).abs().max()) for a, b in zip(*losses, strict=True))


def test_gradient_checkpointing_runs_the_ring_again(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, checkpointed) == [0.0, 0.0]


def test_next_tokens_cross_the_borders_of_shares() -> None:
    ring = Ring(zigzag(6, 1))
    assert ring.next_tokens(torch.arange(6)[None]).tolist() == [[1, 2, 3, 4, 5, -100]]


# ------------------------------------------------------------------------------------------------------- refusals


def refusals(world: World) -> dict[str, str]:
    """What is said to inputs that cannot be shared out, by every rank before anything is exchanged."""
    model, tokens, ring = tiny_model("llama"), ids(), Ring.over(TOKENS)
    own = ring.inputs(tokens)
    padded = own["attention_mask"].clone()
    padded[0, :3] = 0
    wrong: dict[str, dict[str, Any]] = {
        "packed": {**own, "position_ids": own["position_ids"] % 5, "attention_mask": None, "use_cache": False},
        "padded": {**own, "attention_mask": padded},
        "short": {name: value[:, :-1] for name, value in own.items()},
    }
    said = {}
    with torch.no_grad():
        with sequence_parallel(ring, model):
            for name, inputs in wrong.items():
                with pytest.raises(UserError) as error:
                    model(**inputs)
                said[name] = str(error.value)
            cache = model(**own, use_cache=True).past_key_values
            longer = {**own, "attention_mask": torch.ones(2, 2 * padded.shape[1], dtype=torch.long)}
            with pytest.raises(UserError) as error:
                model(**longer, past_key_values=cache)
            said["cached"] = str(error.value)
        for name, act in {
            "lengths": lambda: Ring.over(TOKENS + world.rank),
            "chunks": lambda: Ring.over(3),
        }.items():
            with pytest.raises(UserError) as error:
                act()
            said[name] = str(error.value)
    return said


def test_what_cannot_be_shared_out_is_refused_on_every_rank(tmp_path: Path) -> None:
    for said in on_ranks(tmp_path, 2, refusals):
        assert "packed documents" in said["packed"]
        assert "padding" in said["padded"]
        assert "of 45 tokens and was given" in said["short"]
        assert "no KV cache" in said["cached"]
        assert "45 to 46 tokens" in said["lengths"]
        assert "3 tokens cannot be cut into 4 chunks" in said["chunks"]


def test_soft_caps_and_kernels_of_whole_sequences_are_refused() -> None:
    with pytest.raises(UserError, match="soft-capped"), sequence_parallel(Ring(zigzag(8, 1)), tiny_model("gemma2")):
        pass
    spec = describe(tiny_config("llama"))
    for kernel in ("sdpa", "flash_attention_2", "eager"):
        with pytest.raises(UserError, match=f"`{kernel}` cannot share one sequence"):
            registry.split_kernel(kernel, spec, "cpu")
    with pytest.raises(UserError, match="float32"):
        registry.split_kernel("auto", spec, "cuda", "float32")
    assert registry.split_kernel("blockwise", spec, "cpu").name == "ring"


def test_a_chunked_mask_is_seen_for_what_it_is_though_shares_are_shorter() -> None:
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    chunked = chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long))
    assert int(_window_mask(30, 1, 6, 6, mask_function=chunked, local_size=8)) == -1
    assert int(_window_mask(30, 1, 6, 6, mask_function=sliding_window_causal_mask_function(8), local_size=8)) == 8
