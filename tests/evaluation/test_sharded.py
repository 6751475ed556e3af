"""Documents scored by several processes together: the losses of one, in less memory."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from retrofit.errors import UserError
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.score import score
from retrofit.evaluation.scoring.sharded import mlps_in_rows
from retrofit.evaluation.scoring.windows import Windows
from retrofit.kernels.registry import KernelChoice
from retrofit.system.sequence_groups import require_groups, sequence_groups
from retrofit.system.world import ALONE, World
from tests.evaluation.test_dealt_out import DYNAMIC, documents
from tests.evaluation.test_score import document
from tests.kernels.test_blockwise import EXPRESSIBLE
from tests.ranks import on_ranks
from tests.tiny import tiny_model

MODELS = [("llama", {"num_key_value_heads": 2}), ("gemma3_text", {}), ("mixtral", {}), ("gpt_bigcode", {})]


def scored(world: World, ranks: int, partial: Path | None = None) -> list[TokenLosses]:
    """Whole documents by several models, a moving window, and an encoding that changes with the length."""
    how = {"world": world, "sequences": sequence_groups(world, ranks) if world.size > 1 else None, "logits_rows": 16}
    texts = documents()
    found = [score(tiny_model(family, **over), texts, partial=partial, **how) for family, over in MODELS[:1]]
    found += [score(tiny_model(family, **over), texts, **how) for family, over in MODELS[1:]]
    found.append(score(tiny_model("llama"), texts, windows=Windows(32, 8), known=found[0], **how))
    found.append(score(tiny_model("llama", **DYNAMIC, max_position_embeddings=64), texts, lengths=(32, 40), **how))
    return found


@pytest.mark.parametrize(("size", "ranks"), [(3, 3), (4, 2)])
def test_losses_are_those_of_one_process(size: int, ranks: int, tmp_path: Path) -> None:
    alone = scored(ALONE, 1)
    for found in on_ranks(tmp_path, size, scored, ranks, tmp_path / "kept"):
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.meta["kernel"] == "ring"
            for a, b in zip(ours.losses, theirs.losses, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        assert found[-1].by_length.keys() == alone[-1].by_length.keys()
    kept = [path.name for path in (tmp_path / "kept").glob("*.npy")]
    assert len(kept) == len(documents())


@pytest.mark.parametrize(("family", "over"), EXPRESSIBLE, ids=lambda value: str(value))
def test_an_mlp_sees_one_token_by_itself(family: str, over: dict) -> None:
    model, ids = tiny_model(family, **over), torch.arange(30)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        with mlps_in_rows(model, 7):
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)


def limited(world: World) -> str:
    """ "scored", or the error of a document in an address space with room for half of its keys and values."""
    model = tiny_model("llama", num_hidden_layers=16, max_position_embeddings=20000)
    text = document(16385, "long")
    sequences = sequence_groups(world, world.size) if world.size > 1 else None
    score(model, [text.cut(64)], world=world, sequences=sequences)  # what is loaded once is loaded
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    room = 16 * 16384 * 2 * 64 * 4 // 2
    resource.setrlimit(resource.RLIMIT_AS, (int(used.split()[1]) * 1024 + room, resource.RLIM_INFINITY))
    try:
        score(model, [text], world=world, sequences=sequences)
    except RuntimeError as error:
        return str(error)
    return "scored"


@pytest.mark.slow
def test_two_processes_score_what_one_has_no_memory_for(tmp_path: Path) -> None:
    assert "allocate" in on_ranks(tmp_path, 1, limited)[0]
    assert on_ranks(tmp_path, 2, limited, seconds=300) == ["scored", "scored"]


# ------------------------------------------------------------------------------------------------------- refusals


def refusals(world: World) -> list[str]:
    sequences, said = sequence_groups(world, 2), []
    for model, text, kernel in (
        (tiny_model("gemma2"), document(64), None),
        (tiny_model("llama"), document(64), KernelChoice("sdpa", "sdpa", "asked for")),
        (tiny_model("llama"), document(4), None),
    ):
        with pytest.raises(UserError) as error:
            score(model, [text], world=world, sequences=sequences, kernel=kernel)
        said.append(str(error.value))
    return said


def test_what_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    for capped, kernel, short in on_ranks(tmp_path, 2, refusals):
        assert "soft-capped" in capped
        assert "`sdpa` cannot share one sequence" in kernel
        assert "3 tokens cannot be cut into 4 chunks" in short


@pytest.mark.parametrize("size", [1, 3])
def test_processes_that_make_no_groups_are_refused_with_the_command(size: int) -> None:
    with pytest.raises(UserError, match="one sequence over 2 ranks") as error:
        require_groups(World(0, size), 2)
    assert "torchrun --nproc-per-node=2 -m retrofit evaluate" in error.value.fix
