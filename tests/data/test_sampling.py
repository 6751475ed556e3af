"""Sampling: tokens follow the model's distribution, the nucleus is that of a plain sort, the cache changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrofit.data import sampling
from retrofit.data.sampling import draw, nucleus, random_numbers, sample_batch
from retrofit.model.families import describe
from tests.pretend_gpu import pretend_gpu
from tests.tiny import FAMILIES, tiny_model


def reference(model: object, start: list[int], uniform_T: Tensor, temperature: float, top_p: float) -> list[int]:
    """Token by token, the whole text read again each time: float64, a full sort, a plain cumulative sum."""
    ids = list(start)
    for token, number in enumerate(uniform_T.tolist(), 1):
        if token < len(start):
            continue
        logits = model(torch.tensor([ids])).logits[0, -1]  # type: ignore[operator]
        p_V = (logits.double() / temperature).softmax(-1) * plain_nucleus(logits, temperature, top_p)
        order = torch.arange(len(p_V)) if top_p == 1 else p_V.argsort(descending=True, stable=True)
        ends = p_V[order].cumsum(0)
        ids.append(int(order[int((ends <= number * ends[-1]).sum())]))
    return ids[1:]


def plain_nucleus(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    p_V = (logits_V.double() / temperature).softmax(-1)
    order = p_V.argsort(descending=True, stable=True)
    before = p_V[order].cumsum(0) - p_V[order]
    kept = torch.zeros_like(p_V, dtype=torch.bool)
    kept[order[before < top_p]] = True
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_whole_text_read_again(family: str) -> None:
    model = tiny_model(family)
    starts = [[1], [1, 40, 41, 42]]
    uniform_BT = torch.stack([random_numbers(f"{family} {row}", 12) for row in range(2)])
    drawn = sample_batch(model, describe(model.config), starts, uniform_BT)
    with torch.inference_mode():
        expected = [reference(model, start, row_T, 1.0, 1.0) for start, row_T in zip(starts, uniform_BT, strict=True)]
    assert drawn.tolist() == expected


@pytest.mark.parametrize("window", [5, 16, 64])
def test_a_cache_that_grows_keeps_windows_exact(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "GROW", 8)
    model = tiny_model("mistral", sliding_window=window)
    uniform_BT = random_numbers("grows", 30)[None]
    drawn = sample_batch(model, describe(model.config), [[1, 30, 31]], uniform_BT, temperature=0.8, top_p=0.9)
    with torch.inference_mode():
        assert drawn[0].tolist() == reference(model, [1, 30, 31], uniform_BT[0], 0.8, 0.9)


def test_a_gpu_draws_what_the_cpu_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    uniform_BT = torch.stack([random_numbers(f"row {row}", 12) for row in range(2)])
    monkeypatch.setattr(sampling, "no_graph", lambda *_: "for a GPU that is none")

    def drawn(device: str) -> list[list[int]]:
        model = tiny_model("llama").to(device)
        starts = [[1], [1, 40, 41]]
        ids_BT = sample_batch(model, describe(model.config), starts, uniform_BT, temperature=0.8, top_p=0.9)
        return ids_BT.tolist()

    expected = drawn("cpu")
    with pretend_gpu(monkeypatch) as device:
        assert drawn(device) == expected


def test_a_prompt_longer_than_the_sample_is_cut() -> None:
    model = tiny_model("llama")
    drawn = sample_batch(model, describe(model.config), [[1, *range(30, 40)]], torch.rand(1, 4))
    assert drawn.tolist() == [[30, 31, 32, 33]]


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_tokens_are_drawn_by_their_probability(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_V, numbers = 2 * torch.randn(vocabulary, generator=generator), 20_000
    uniform_B1 = (torch.arange(numbers)[:, None] + 0.5) / numbers  # a fine grid: no noise of drawing
    drawn = draw(logits_V.expand(numbers, -1), uniform_B1, temperature=0.7)
    found = torch.bincount(drawn[:, 0], minlength=vocabulary) / numbers
    assert torch.allclose(found, (logits_V / 0.7).softmax(-1), atol=1.1 / numbers)


@pytest.mark.parametrize("device", ["packed", "sorted"])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_plain_sort(top_p: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "sorted":  # as on a GPU
        monkeypatch.setattr(sampling, "_packed", lambda weights, _: (weights, torch.arange(700).expand(5, -1)))
    logits_BV = 3 * torch.randn(5, 700, generator=torch.Generator().manual_seed(3))
    weights_BN, columns_BN = nucleus(logits_BV.exp(), top_p)
    kept_BV = torch.zeros_like(logits_BV).scatter_add_(1, columns_BN, (weights_BN > 0).float()) > 0
    expected = torch.stack([plain_nucleus(row, 1.0, top_p) for row in logits_BV])
    assert torch.equal(kept_BV, expected)


class _Replay:
    """Stands for a CUDA graph: the step itself."""

    def __init__(self, sampler: sampling.Sampler) -> None:
        self.replay = sampler.advance


@pytest.mark.parametrize("captured", [True, False])
def test_a_graph_and_the_loop_that_stands_in_for_it_write_the_same(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, uniform_BT = tiny_model("llama"), random_numbers("graph", 12)[None]
    spec = describe(model.config)
    expected = sample_batch(model, spec, [[1]], uniform_BT)

    def capture(self: sampling.Sampler) -> None:
        self.step()
        if not captured:
            raise RuntimeError("a step waits for the host\nin line 2")
        self.reset()
        self._graph = _Replay(self)  # type: ignore[assignment]

    monkeypatch.setattr(sampling, "no_graph", lambda *_: None)
    monkeypatch.setattr(sampling, "GROW", 12)  # of a GPU: all slots from the beginning
    monkeypatch.setattr(sampling.Sampler, "capture", capture)
    notes: list[str] = []
    assert torch.equal(sample_batch(model, spec, [[1]], uniform_BT, note=notes.append), expected)
    assert notes == ([] if captured else ["samples are written without a CUDA graph: a step waits for the host"])


def test_nothing_impossible_is_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).repeat(2, 1)
    drawn = draw(logits, torch.tensor([[0.0], [1 - 2**-24]]))
    assert drawn.tolist() == [[1], [3]]


def test_random_numbers_depend_on_their_key_alone() -> None:
    assert torch.equal(random_numbers("a", 4), random_numbers("a", 6)[:4])
    assert not torch.equal(random_numbers("a", 4), random_numbers("b", 4))
