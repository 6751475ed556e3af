"""Sizes that fit, who stands where, which engine carries a row, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.recipe.schema import Distribute, Recover
from retrofit.recovery.layout import layout_of, ulysses_note
from retrofit.system.world import ALONE, World
from tests.tiny import tiny_config

SPEC = describe(tiny_config("llama", num_key_value_heads=2))
WINDOWS = describe(tiny_config("mistral", sliding_window=16))


def recipe(shard: Any = "auto", sequence: int = 1, **over: Any) -> Recover:
    given = {"batch_size": 8, "sequence_length": 64, "tokens": 4096, **over}
    return Recover(distribute=Distribute(shard=shard, sequence=sequence), **given)


def layout(of: Recover, size: int, rank: int = 0, *, spec=SPEC, device="cpu", fits=True, **environment: str):
    world = ALONE if size == 1 else World(rank, size)
    return layout_of(of, world, spec, device, fits=fits, environment=environment)


def test_one_process_is_left_alone() -> None:
    found = layout(recipe(), 1)
    assert (found.size, found.sharded, found.engine, found.notes) == (1, False, None, ())


def test_processes_read_different_rows_unless_they_share_them() -> None:
    places = [layout(recipe(shard=2, sequence=2), 8, rank) for rank in range(8)]
    assert {(one.replicas, one.shard, one.sequence, one.sharded) for one in places} == {(2, 2, 2, True)}
    assert [one.data_rank for one in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [one.sequence_rank for one in places] == [0, 1] * 4


@pytest.mark.parametrize(("fits", "shard"), [(True, 1), (False, 4)])
def test_weights_are_split_where_they_do_not_fit(fits, shard) -> None:
    found = layout(recipe(), 4, fits=fits)
    assert found.shard == shard
    assert found.sharded is not fits
    assert "fit" in found.notes[0]


@pytest.mark.parametrize(
    ("spec", "device", "engine", "reason"),
    [(SPEC, "cuda", "torch", "CUDA"), (SPEC, "cpu", "ring", "needs CUDA"), (WINDOWS, "cuda", "ring", "windows")],
)
def test_the_engine_is_torchs_where_it_can_express_the_model(spec, device, engine, reason) -> None:
    found = layout(recipe(sequence=2), 2, spec=spec, device=device)
    assert found.engine == engine
    assert reason in found.notes[1]
    assert found.sharded == (engine == "torch")


def test_a_student_that_writes_has_the_ring() -> None:
    found = layout(recipe(sequence=2, on_policy=0.5), 2, device="cuda")
    assert found.engine == "ring"
    assert "on_policy" in found.notes[1]


def test_whole_weights_are_asked_for_beside_shared_rows() -> None:
    found = layout(recipe(shard=1, sequence=2), 4, device="cuda")
    assert (found.engine, found.sharded) == ("ring", False)


def test_a_configuration_of_accelerate_goes_first() -> None:
    sizes = {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_CP_SIZE": "2"}
    found = layout(recipe(shard=4), 4, ACCELERATE_USE_PARALLELISM_CONFIG="true", **sizes)
    assert (found.shard, found.sequence) == (2, 2)
    assert any("accelerate" in note for note in found.notes)
    assert layout(recipe(), 4, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2").shard == 4


@pytest.mark.parametrize(
    ("of", "size", "environment", "words"),
    [
        (recipe(shard=4), 1, {}, "this is one"),
        (recipe(sequence=2), 1, {}, "this is one"),
        (recipe(shard=3), 4, {}, "does not divide 4"),
        (recipe(shard=2, sequence=4), 4, {}, "does not divide 4"),
        (recipe(batch_size=3), 4, {}, "3 rows for 4 processes"),
        (recipe(sequence=2, sequence_length=16, batch_size=1), 4, {}, "1 row for 2 groups"),
        (recipe(sequence=16, sequence_length=16), 16, {}, "two chunks for each of 16"),
        (recipe(sequence=2, document_masking=True), 2, {}, "mask"),
        (recipe(sequence=2, sequence_engine="torch"), 2, {}, "needs CUDA"),
        (recipe(), 2, {"ACCELERATE_USE_DEEPSPEED": "true"}, "Deepspeed"),
        (recipe(), 2, {"ACCELERATE_USE_FSDP": "true"}, "FSDP2"),
        (recipe(), 2, {"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "on the GPUs"),
    ],
)
def test_what_does_not_fit_is_refused(of, size, environment, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        layout(of, size, **environment)
    assert caught.value.fix


def test_a_missing_launcher_is_named_with_its_command() -> None:
    with pytest.raises(UserError) as caught:
        layout(recipe(shard=2, sequence=2), 1)
    assert "torchrun --nproc-per-node=4 -m retrofit" in str(caught.value.fix)


def test_splitting_heads_is_capped_by_the_kv_heads() -> None:
    assert ulysses_note(SPEC, 1) is None
    assert "up to 2 processes" in str(ulysses_note(SPEC, 2))
    assert "2 copies of each of 2 KV heads" in str(ulysses_note(SPEC, 4))
    assert "could not be split over 3" in str(ulysses_note(SPEC, 3))
