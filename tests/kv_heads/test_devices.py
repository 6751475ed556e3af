"""A calibrated conversion puts everything where it computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from retrofit.kv_heads.convert import CalibrationText, ConvertReport, convert
from tests.kv_heads.test_calibrate import text
from tests.pretend_gpu import pretend_gpu
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a product change its last digits, and what is read ahead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def converted(source: Path, out: Path, calibration: CalibrationText, repair: str, device: str) -> ConvertReport:
    out.mkdir()
    return convert(source, out, kv_heads=2, text=calibration, repair=repair, averaged_tokens=96, device=device)


@pytest.mark.parametrize(("family", "repair"), [("llama", "transfer"), ("qwen3", "o_proj")])
def test_a_gpu_converts_as_the_cpu_does(
    family: str, repair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", family)
    plain = converted(source, tmp_path / "cpu", text(), repair, "cpu")
    monkeypatch.setattr("retrofit.kv_heads.calibrate.layerwise.product_dtype", lambda device: None)
    with pretend_gpu(monkeypatch) as device:
        found = converted(source, tmp_path / "gpu", text(), repair, device)
    for one, other in zip(found.layers, plain.layers, strict=True):
        assert one.keys == pytest.approx(other.keys, rel=1e-5)
        assert one.values == pytest.approx(other.values, rel=1e-5)
        assert [repair.accepted for repair in one.repairs] == [repair.accepted for repair in other.repairs]
