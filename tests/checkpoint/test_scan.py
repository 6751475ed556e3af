"""One pass over weight files: extremes and digests, with one thread and with several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from retrofit.checkpoint import scan as scanning
from retrofit.checkpoint import threads
from retrofit.checkpoint.provenance import sha256, sha256_of
from retrofit.checkpoint.read import DTYPES, Checkpoint
from retrofit.checkpoint.rewrite import rewrite
from retrofit.checkpoint.scan import scan
from retrofit.checkpoint.threads import ahead, each_alone, thread_count
from retrofit.errors import UserError


@pytest.fixture(params=[1, 3])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


def sharded(folder: Path) -> Checkpoint:
    """Three shards of different dtypes, tensors of several pieces and none."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shards = {
        "model-00001-of-00003.safetensors": {"a": torch.randn(300, 70, generator=generator).bfloat16()},
        "model-00002-of-00003.safetensors": {
            "b": torch.randn(50, 33, generator=generator),
            "empty": torch.zeros(0, 4),
            "ids": torch.arange(10),
        },
        "model-00003-of-00003.safetensors": {
            "c": torch.randn(7, generator=generator).double(),
            "d": torch.randn(99, generator=generator).to(torch.float8_e4m3fn),
        },
    }
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
        weight_map.update(dict.fromkeys(tensors, shard))
    import json

    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("hashed", [False, True])
def test_extremes_and_digests_are_those_of_the_whole_files(
    tmp_path: Path, torch_threads: int, hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "PIECE_BYTES", 4096)
    monkeypatch.setattr(scanning, "RUN_BYTES", 5000)
    checkpoint = sharded(tmp_path / "m")
    digested = checkpoint.shards[:2] if hashed else ()
    found = scan(checkpoint.folder, checkpoint.entries, DTYPES, checkpoint.names, digested)
    assert found.digests == {shard: sha256(checkpoint.folder / shard) for shard in digested}
    assert found.extremes.keys() == {"a", "b", "c", "d"}
    for name, extremes in found.extremes.items():
        tensor = checkpoint.tensor(name)
        tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        assert extremes.dtype == tensor.dtype
        assert torch.equal(extremes, torch.stack(torch.aminmax(tensor)))
    assert torch.get_num_threads() == torch_threads


def test_a_nan_in_any_piece_is_seen(tmp_path: Path, torch_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "PIECE_BYTES", 64)
    for place in (0, 100, 999):
        values = torch.zeros(1000)
        values[place] = torch.nan
        folder = tmp_path / str(place)
        folder.mkdir()
        save_file({"one": torch.ones(3), "two": values}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        with pytest.raises(UserError, match="`two` holds 1 values"):
            Checkpoint.open(folder).require_finite()


def test_a_file_that_became_shorter_is_named(tmp_path: Path, torch_threads: int) -> None:
    checkpoint = sharded(tmp_path / "m")
    path = checkpoint.folder / checkpoint.shards[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="became shorter"):
        checkpoint.require_finite(digested=checkpoint.shards)


def test_bytes_written_do_not_depend_on_threads(tmp_path: Path) -> None:
    checkpoint, usual, written = sharded(tmp_path / "m"), torch.get_num_threads(), []

    def rule(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [(name, tensor * 2), (f"{name}.again", tensor)]

    for count in (1, 3):
        out = tmp_path / str(count)
        out.mkdir()
        torch.set_num_threads(count)
        try:
            for resume in (False, True):
                rewrite(
                    checkpoint,
                    out,
                    {"b": rule, "ids": None},
                    made={"c": lambda: torch.ones(9)},
                    config={},
                    dtype=torch.float16,
                    max_shard_size=9000,
                    resume=resume,
                )
        finally:
            torch.set_num_threads(usual)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]
    assert len(written[0]) > 3


def test_several_digests_are_those_of_each_file(tmp_path: Path, torch_threads: int) -> None:
    paths = [tmp_path / str(n) for n in range(5)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([n]) * (n * 100_000))
    assert sha256_of(paths) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_the_first_error_in_order_is_raised(torch_threads: int) -> None:
    def work(item: int) -> int:
        if item:
            raise ValueError(str(item))
        return item

    with pytest.raises(ValueError, match="1"):
        each_alone(work, [0, 1, 2])
    assert torch.get_num_threads() == torch_threads
    with pytest.raises(ValueError, match="1"):
        list(ahead(work, [0, 1, 2], torch_threads))


def test_no_more_than_asked_are_begun_ahead() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = ahead(work, range(10), 3)
    assert next(results) == 0
    assert len(begun) <= 3
    assert list(results) == list(range(1, 10))


def test_threads_without_torch_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(threads.sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_count() == 3
    assert thread_count(2) == 2
