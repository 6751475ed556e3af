"""A conversion by several processes: the weights of one, and what a kill leaves is resumed by any number of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retrofit.console import Silent
from retrofit.kv_heads.calibrate.layerwise_pass import layerwise_pass
from retrofit.kv_heads.calibrate.moments import load, saved
from retrofit.kv_heads.convert import CalibrationText, ConvertReport, convert
from retrofit.system.world import ALONE, World
from tests.kv_heads.test_transfer import few_words
from tests.ranks import fail_after, on_ranks
from tests.tiny import save_tiny

PARTS = (3, 5)  # sequences of each kind: three batches of one, and three of two, two and one

pytestmark = pytest.mark.usefixtures("exact_products")


def text(parts: tuple[int, ...] = PARTS) -> CalibrationText:
    ids = torch.randint(0, 256, (sum(parts), 48), generator=torch.Generator().manual_seed(1))
    kinds = [kind for kind, count in zip("ab", parts, strict=False) for _ in range(count)]
    return CalibrationText(ids, tuple(kinds))


def converted(
    world: World,
    source: Path,
    folder: Path,
    repair: str = "o_proj",
    calibration: CalibrationText | None = None,
    stop: int | None = None,
) -> tuple[ConvertReport, list[str]]:
    """The report, and notes of this process. stop: after so many writes of a batch rank 0 fails."""
    out, notes = folder / "out", Silent()
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
    world.wait()
    if stop is not None and world.main:
        fail_after(stop)
    report = convert(
        source,
        out,
        kv_heads=2,
        repair=repair,
        text=calibration or text(),
        averaged_tokens=96,
        work=folder / "work",
        moments=folder / "moments",
        world=world,
        progress=notes,
    )
    return replace(report, seconds=0.0), notes.notes


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_conversion(one: Path, other: Path, first: ConvertReport, second: ConvertReport) -> None:
    """The same weights to the rounding of sums in float64, and the same decisions."""
    weights, others = tensors(one / "out"), tensors(other / "out")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=1e-6, msg=name)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.groups == b.groups
        assert a.keys_fitted == b.keys_fitted
        assert [o.accepted for o in a.repairs] == [o.accepted for o in b.repairs]
        for x, y in zip(a.repairs, b.repairs, strict=True):
            assert x.held_out_after == pytest.approx(y.held_out_after, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "over", "ranks"),
    [
        ("llama", {"attention_bias": True}, 2),
        ("qwen3", {}, 3),
        pytest.param("llama", {}, 3, marks=pytest.mark.slow),
        pytest.param("olmo2", {}, 2, marks=pytest.mark.slow),
        pytest.param("phi", {}, 4, marks=pytest.mark.slow),
    ],
)
def test_the_weights_are_those_of_one_process(family: str, over: dict, ranks: int, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family, **over)
    alone, _ = converted(ALONE, source, tmp_path / "one")
    found = on_ranks(tmp_path, ranks, converted, source, tmp_path / "many")
    assert all(report == found[0][0] for report, _ in found)
    assert_same_conversion(tmp_path / "one", tmp_path / "many", alone, found[0][0])
    for index in saved(tmp_path / "one" / "moments"):
        first, second = (load(tmp_path / name / "moments", index) for name in ("one", "many"))
        torch.testing.assert_close(second.key_KDKD, first.key_KDKD, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(second.averaged_KDKD, first.averaged_KDKD, rtol=1e-6, atol=1e-9)
        assert second.stream_quantiles == pytest.approx(first.stream_quantiles, rel=1e-6)
        assert (second.tokens, second.averaged_tokens) == (first.tokens, first.averaged_tokens)


def test_a_descent_takes_the_same_steps(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    alone, _ = converted(ALONE, source, tmp_path / "one", "transfer", few_words(12))
    found = on_ranks(tmp_path, 2, converted, source, tmp_path / "many", "transfer", few_words(12))
    assert any(outcome.name == "transfer" and outcome.accepted for layer in alone.layers for outcome in layer.repairs)
    assert_same_conversion(tmp_path / "one", tmp_path / "many", alone, found[0][0])


def test_processes_without_text_wait_for_the_others(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "qwen3")
    alone, _ = converted(ALONE, source, tmp_path / "one", calibration=text((2,)))
    found = on_ranks(tmp_path, 3, converted, source, tmp_path / "many", "o_proj", text((2,)))
    assert_same_conversion(tmp_path / "one", tmp_path / "many", alone, found[0][0])
    assert "2 batches of text for 3 processes: some have none to read" in found[0][1]


# Embeddings are two writes of each batch, of which a process has three or two, and a layer four.
@pytest.mark.parametrize(("before", "stop", "after"), [(2, 20, 3), (3, 14, 1)])
def test_a_stopped_calibration_is_resumed_by_another_number_of_processes(
    before: int, stop: int, after: int, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    alone, _ = converted(ALONE, source, tmp_path / "one")
    with pytest.raises(AssertionError, match="rank 0"):
        on_ranks(tmp_path, before, converted, source, tmp_path / "many", "o_proj", None, stop)
    if after == 1:
        found = [converted(ALONE, source, tmp_path / "many")]
    else:
        found = on_ranks(tmp_path, after, converted, source, tmp_path / "many")
    assert "calibration resumes after 1 of 2 layers" in found[0][1]
    assert_same_conversion(tmp_path / "one", tmp_path / "many", alone, found[0][0])


def test_one_process_reads_what_several_finished(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    on_ranks(tmp_path, 3, converted, source, tmp_path / "many")
    again, notes = converted(ALONE, source, tmp_path / "many")
    assert "calibration resumes after 2 of 2 layers" in notes
    assert again.layers


def pooled(world: World, source: Path, out: Path) -> ConvertReport:
    if world.main:
        out.mkdir()
    world.wait()
    return replace(convert(source, out, kv_heads=2, method="mean", world=world), seconds=0.0)


def test_pooling_is_written_by_one_process(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    first, second = on_ranks(tmp_path, 2, pooled, source, tmp_path / "out")
    assert first == second
    pooled(ALONE, source, tmp_path / "alone")
    assert all(torch.equal(a, tensors(tmp_path / "out")[n]) for n, a in tensors(tmp_path / "alone").items())


def surveyed(world: World, source: Path, moments: Path) -> torch.Tensor:
    scored = torch.randint(0, 256, (3, 4096), generator=torch.Generator().manual_seed(2))[:, :256]
    return layerwise_pass(source, scored.repeat(12, 1), measured=text(), moments=moments, world=world)


def test_a_pass_over_all_layers_is_dealt_out(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "qwen3")
    alone = surveyed(ALONE, source, tmp_path / "one")
    for losses_N in on_ranks(tmp_path, 2, surveyed, source, tmp_path / "many"):
        assert torch.equal(losses_N, alone)
    first, second = (load(tmp_path / name, 1) for name in ("one", "many"))
    torch.testing.assert_close(second.value_KDKD, first.value_KDKD, rtol=1e-6, atol=1e-9)
