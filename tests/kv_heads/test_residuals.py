"""The work folder of a calibration: what is written is read, and what is torn or foreign is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from retrofit.errors import UserError
from retrofit.kv_heads import disk
from retrofit.kv_heads.calibrate.moments import MomentsSource
from retrofit.kv_heads.calibrate.residuals import Shapes, WorkFolder
from retrofit.kv_heads.disk import STATE, require_room
from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.kv_heads.repair.outcome import LayerReport, RepairOutcome

SHAPES = Shapes.of([(2, 5), (1, 5)], 4, 6)
REPORT = LayerReport(0, ((0, 2), (1, 3)), 0.5, None, 0.25, (RepairOutcome("o_proj", True, 0.2, 0.1),))


def opened(folder: Path, said: list[str], key: str = "k", repairs: bool = True) -> WorkFolder:
    return WorkFolder(folder, key, SHAPES, layers=2, repairs=repairs, say=said.append)


def one_layer(folder: Path) -> list[torch.Tensor]:
    """A folder whose first layer is done; the streams that enter the second."""
    work = opened(folder, [])
    tensors = [torch.randn(shape) for shape in SHAPES.hidden]
    for layer in (0, 1):
        for name in ("original", "converted"):
            for i, tensor in enumerate(tensors):
                work.stream(name, layer).write(i, tensor + layer)
        if layer == 0:
            work.started()
    work.finish_layer(REPORT, {"k": torch.ones(3, dtype=torch.bfloat16)})
    return [tensor + 1 for tensor in tensors]


def test_tensors_come_back_in_any_order(tmp_path: Path) -> None:
    file = DiskTensors(tmp_path / "x", [(2, 3), (4,), (1, 1, 2)])
    file.create()
    assert (tmp_path / "x").stat().st_size == file.nbytes == 4 * (6 + 4 + 2)
    tensors = [torch.randn(2, 3), torch.randn(4).double(), torch.randn(2, 1, 1).transpose(0, 2)]
    for i in (2, 0, 1):
        file.write(i, tensors[i])
    for i in (1, 2, 0):
        assert torch.equal(file.read(i), tensors[i].float())
    assert file.whole(file.checksums)
    with (tmp_path / "x").open("r+b") as raw:
        raw.seek(20)
        raw.write(b"\x01\x02")
    assert not file.whole(file.checksums)


@pytest.mark.parametrize("written", [True, False])
def test_what_is_kept_in_memory_is_read_from_there_and_written_by_a_thread(tmp_path: Path, written: bool) -> None:
    file = DiskTensors(tmp_path / "x", [(2, 3), (4,)])
    file.keep("cpu", written=written)
    file.create()
    tensors = [torch.randn(2, 3), torch.randn(4)]
    for i, tensor in enumerate(tensors):
        file.write(i, tensor)
    given = tensors[0].clone()
    tensors[0].zero_()
    assert torch.equal(file.read(0), given)
    file.read(0).zero_()
    assert torch.equal(file.read(0), given), "memory of its own"
    file.settle()
    assert file.whole(file.checksums) == written
    file.forget()
    assert torch.equal(file.read(0), given if written else torch.zeros(2, 3))


def test_a_write_that_failed_is_raised_where_it_is_settled(tmp_path: Path) -> None:
    file = DiskTensors(tmp_path / "x", [(4,)])
    file.keep("cpu", written=True)
    file.write(0, torch.ones(4))  # no file was made
    with pytest.raises(FileNotFoundError):
        file.settle()


def test_streams_in_memory_leave_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one_layer(tmp_path / "disk")
    monkeypatch.setattr(disk, "stream_place", lambda device, nbytes: "host")
    torch.manual_seed(0)
    streams = one_layer(tmp_path / "memory")
    for name in (STATE, "original-1", "converted-1"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    work = opened(tmp_path / "memory", [])
    assert work.resumed_from == 1
    assert all(torch.equal(work.stream("original", 1).read(i), x) for i, x in enumerate(streams))


def test_a_file_is_made_where_the_system_reserves_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # as on macOS
    file = DiskTensors(tmp_path / "x", [(2, 3), (4,)])
    file.create()
    assert (tmp_path / "x").stat().st_size == file.nbytes
    file.write(1, torch.ones(4))
    assert torch.equal(file.read(0), torch.zeros(2, 3))
    assert torch.equal(file.read(1), torch.ones(4))


def test_a_layer_that_is_done_is_gone_on_from(tmp_path: Path) -> None:
    streams = one_layer(tmp_path / "w")
    said: list[str] = []
    work = opened(tmp_path / "w", said)
    assert work.layers_done == work.resumed_from == 1
    assert not said
    assert work.reports() == [REPORT]
    assert work.tensor_names() == {"k": 0}
    assert torch.equal(work.tensor(0, "k"), torch.ones(3, dtype=torch.bfloat16))
    for name in ("original", "converted"):
        assert all(torch.equal(work.stream(name, 1).read(i), x) for i, x in enumerate(streams))
    work.finish_layer(LayerReport(1, REPORT.groups), {"v": torch.zeros(1)})
    work.drop_streams()
    left = {path.name for path in (tmp_path / "w").iterdir()}
    assert left == {STATE, "layer-000.safetensors", "layer-001.safetensors"}
    assert opened(tmp_path / "w", said).layers_done == 2 and not said, "what is left to do reads no stream"


def torn(folder: Path) -> None:
    path = folder / "converted-1"
    path.write_bytes(path.read_bytes()[:-4])


def changed(folder: Path) -> None:
    path = folder / "original-1"
    path.write_bytes(bytes(path.stat().st_size))


def without_a_layer(folder: Path) -> None:
    (folder / "layer-000.safetensors").unlink()


def half_a_state(folder: Path) -> None:
    (folder / STATE).write_text((folder / STATE).read_text()[:20])


def no_state(folder: Path) -> None:
    (folder / STATE).unlink()


@pytest.mark.parametrize("harm", [torn, changed, without_a_layer, half_a_state, no_state])
def test_a_damaged_folder_is_started_again_and_announced(harm: object, tmp_path: Path) -> None:
    one_layer(tmp_path / "w")
    harm(tmp_path / "w")  # type: ignore[operator]
    said: list[str] = []
    work = opened(tmp_path / "w", said)
    assert work.resumed_from is None
    assert work.layers_done == 0
    assert len(said) == 1
    assert "started again" in said[0]
    assert str(tmp_path / "w") in said[0]
    assert not (tmp_path / "w" / "layer-000.safetensors").exists()


def test_a_folder_of_another_conversion_is_started_again_and_announced(tmp_path: Path) -> None:
    one_layer(tmp_path / "w")
    said: list[str] = []
    assert opened(tmp_path / "w", said, key="other").resumed_from is None
    assert "belongs to another model, text or conversion" in said[0]


def test_no_room_is_found_before_any_work_and_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    require_room(tmp_path / "new" / "w", 1000)
    with pytest.raises(UserError, match=r"\(1001 bytes\) needed") as caught:
        require_room(tmp_path / "new" / "w", 1001)
    assert str(tmp_path / "new" / "w") in str(caught.value)
    assert "convert.calibration.tokens" in str(caught.value)
    with pytest.raises(UserError, match="no room for the residual streams"):
        opened(tmp_path / "w", [])
    assert not (tmp_path / "w").exists()


def test_moments_get_a_place_of_their_own(tmp_path: Path) -> None:
    work = opened(tmp_path / "w", [])
    work.moments.mkdir()
    (work.moments / "layer-000.safetensors").write_bytes(b"moments")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "layer-009.safetensors").write_bytes(b"of another run")
    with pytest.raises(UserError, match="something else than moments"):
        work.copy_moments(tmp_path / "kept", MomentsSource({}, "original"))
    MomentsSource({}, "original").write(tmp_path / "kept")
    work.copy_moments(tmp_path / "kept", MomentsSource({"config.json": "abc"}, "converted to 2 KV heads"))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["layer-000.safetensors", "moments.json"]
    assert MomentsSource.of(tmp_path / "kept", {"config.json": "abc"}).stream == "converted to 2 KV heads"
    with pytest.raises(UserError, match="of other weights"):
        MomentsSource.of(tmp_path / "kept", {"config.json": "xyz"})
