"""What differs by device: a CPU keeps its numbers, a GPU gets those that fill it. Nothing here needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.system import device
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("name", "gpu"), [("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", True), ("mps:0", True)]
)
def test_what_counts_as_a_gpu(name: str, gpu: bool) -> None:
    assert device.is_gpu(name) == gpu


def test_losses_are_read_every_step_on_a_cpu_and_in_groups_on_a_gpu() -> None:
    assert device.steps_between_readings("cpu") == 1
    assert device.steps_between_readings("cuda:0") > 1


@pytest.mark.parametrize(("fits", "expected"), [(12, 12), (11, 6), (5, 4), (1, 1)])
def test_the_micro_batch_is_the_largest_divisor_that_fits(fits: int, expected: int) -> None:
    def attempt(rows: int) -> None:
        if rows > fits:
            raise torch.OutOfMemoryError

    assert device.micro_batch(12, attempt, "mps") == expected


def test_mps_says_out_of_memory_in_words_and_other_errors_are_not_swallowed() -> None:
    def attempt(rows: int) -> None:
        if rows > 2:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        device.micro_batch(4, attempt, "mps")


def test_a_cpu_takes_all_rows_without_trying() -> None:
    def never(rows: int) -> None:
        raise AssertionError

    assert device.micro_batch(12, never, "cpu") == 12


def test_a_row_that_does_not_fit_is_refused() -> None:
    def attempt(rows: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="one row") as error:
        device.micro_batch(4, attempt, "mps")
    assert "gradient_checkpointing" in str(error.value.fix)


SPEC = describe(tiny_config("llama"))
GIB = 1 << 30
LLAMA_8B = replace(
    SPEC,
    hidden_size=4096,
    mlp=replace(SPEC.mlp, width=14_336),
    layers=tuple(replace(layer, query_heads=32, kv_heads=8, head_dim=128) for layer in SPEC.layers),
)


def test_a_cpu_keeps_its_sizes() -> None:
    assert device.forward_tokens("cpu", SPEC) == 512
    assert device.logit_rows("cpu", 128_256) == 256
    assert device.calibration_tokens("cpu", SPEC, 8192) == 8192
    assert device.stream_place("cpu", 1) == "disk"
    assert device.algebra_device("cpu", 8192) == "cpu"
    assert device.chunks_between_readings("cpu") == 1
    assert device.logits_at_a_time("cpu", 512, 128_256, 262_144) == 2


def test_a_gpu_gets_sizes_that_fill_it_and_no_more() -> None:
    assert device.forward_tokens("cuda", LLAMA_8B, memory=80 * GIB) == 8192
    assert device.forward_tokens("cuda", LLAMA_8B, memory=4 * GIB) == 2048
    assert device.forward_tokens("cuda", LLAMA_8B, memory=0) == 512
    assert device.calibration_tokens("cuda:1", LLAMA_8B, 8192, memory=80 * GIB) == 16_384
    assert device.logit_rows("cuda", 128_256, memory=80 * GIB) == 512
    assert device.logit_rows("cuda", 49_152, memory=80 * GIB) == 2048
    assert device.logits_at_a_time("cuda", 512, 128_256, 262_144) == 512
    assert device.chunks_between_readings("mps") > 1


@pytest.mark.parametrize(
    ("nbytes", "place"), [(20 * GIB, "device"), (21 * GIB, "host"), (100 * GIB, "host"), (101 * GIB, "disk")]
)
def test_streams_lie_where_they_fit(nbytes: int, place: str) -> None:
    assert device.stream_place("cuda", nbytes, memory=80 * GIB, host=400 * GIB) == place


def test_wide_matrices_are_decomposed_where_that_is_faster() -> None:
    fast, slow = {"cuda": 0.1, "cpu": 1.0}, {"cuda": 2.0, "cpu": 1.0}
    assert device.algebra_device("cuda", 4096, fast.__getitem__) == "cuda"
    assert device.algebra_device("cuda", 4096, slow.__getitem__) == "cpu"
    assert device.algebra_device("cuda", 1000, fast.__getitem__) == "cpu"
    assert device.algebra_device("mps", 4096, fast.__getitem__) == "cpu"
    assert device.eigen_seconds("cpu", width=128) > 0


def test_as_many_samples_are_written_together_as_their_cache_allows() -> None:
    small = describe(tiny_config("llama"))
    wide = replace(small, layers=tuple(replace(layer, kv_heads=512, head_dim=128) for layer in small.layers))
    per_sample = wide.kv_cache_bytes(512, 2)
    assert device.sampled_sequences("cpu", small, 512, 2) == 64
    assert device.sampled_sequences("cpu", wide, 512, 2) == 8
    assert device.sampled_sequences("cuda:0", small, 512, 2, memory=80 << 30) == 512
    assert device.sampled_sequences("cuda:0", wide, 512, 2, memory=4 * 65 * per_sample) == 64
    assert device.sampled_sequences("cuda:0", wide, 512, 2, memory=1 << 20) == 32
