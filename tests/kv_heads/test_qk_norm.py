"""Keys through a norm: exact where a norm allows it, never worse than mean pooling, and what stock modules compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.moments import MomentSums
from retrofit.kv_heads.convert import CalibrationText, convert
from retrofit.kv_heads.merge.joint import calibrated_maps, rotary_indices
from retrofit.kv_heads.merge.qk_norm import ScoreError, fit_keys, project, queries_and_keys
from retrofit.kv_heads.merge.weights import LayerWeights, read_layer, write_layer
from retrofit.model.families import describe
from retrofit.model.spec import LayerAttention
from tests.kv_heads.test_convert import logits, run, text
from tests.tiny import save_tiny, tiny_model

NORMED: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma3_text": {},
    "olmo2": {},
    "olmoe": {},
    "stablelm": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True},
}
PHASES = ("qwen3", "gemma3_text", "olmo2", "olmoe")  # a layer norm's mean does not turn with a pair


def layer_of(family: str, edit: Callable[[LayerWeights, LayerAttention], None] | None = None) -> tuple[Any, Any, Any]:
    """A tiny model, its first layer and that layer's weights; `edit` changes the weights of every layer in place."""
    model = tiny_model(family, **NORMED[family])
    layers = describe(model.config).layers
    state = dict(model.named_parameters())
    for layer in layers if edit else ():
        weights = read_layer(lambda name: state[name].detach().clone(), layer)
        edit(weights, layer)  # type: ignore[misc]
        with torch.no_grad():
            for name, tensor in write_layer(weights, layer).items():
                state[name].copy_(tensor)
    return model, layers[0], read_layer(lambda name: state[name].detach().clone(), layers[0])


def twins(phases: bool) -> Callable[[LayerWeights, LayerAttention], None]:
    """Makes KV heads 0 and 2, 1 and 3 the same but for what a norm allows: a scale of the raw head, and phases of pairs
    whose two dims have one norm weight."""
    generator = torch.Generator().manual_seed(3)

    def edit(weights: LayerWeights, layer: LayerAttention) -> None:
        x, y, _ = rotary_indices(layer.rope, layer.head_dim)
        for name in ("q_norm_HD", "k_norm_KD"):  # shared weights are one row, seen from every head
            object.__setattr__(weights, name, getattr(weights, name).clone())
        assert weights.q_norm_HD is not None
        assert weights.k_norm_KD is not None
        for norm in (weights.q_norm_HD, weights.k_norm_KD):
            if phases:
                norm[:, y] = norm[:, x]
        scale = 1.0 if layer.qk_norm == "full" else 1.7
        for old, new in ((0, 2), (1, 3)):
            angle = torch.rand(len(x), generator=generator) * 6.28 * phases
            a = torch.polar(torch.full_like(angle, scale), angle)[:, None]
            weights.k_norm_KD[new] = weights.k_norm_KD[old]
            weights.k_KDC[new] = scale * weights.k_KDC[old]
            z = a * torch.complex(weights.k_KDC[old][x], weights.k_KDC[old][y])
            weights.k_KDC[new][x], weights.k_KDC[new][y] = z.real, z.imag
            weights.v_KDC[new] = weights.v_KDC[old]
            for bias, factor in ((weights.k_bias_KD, scale), (weights.v_bias_KD, 1.0)):
                if bias is not None:
                    bias[new] = factor * bias[old]

    return edit


def stock(model: Any, family: str, a_TC: torch.Tensor, heads: tuple[int, int], d: int) -> tuple[torch.Tensor, ...]:
    """Queries and keys before RoPE by the model's own modules, [T, H, D]."""
    attention = model.get_submodule("model.layers.0.self_attn")
    out = []
    for side, count in zip("qk", heads, strict=True):
        y = getattr(attention, f"{side}_proj")(a_TC)
        if family in ("olmo2", "olmoe"):
            y = getattr(attention, f"{side}_norm")(y).unflatten(-1, (count, d))
        elif family == "stablelm":
            y = getattr(attention, f"{side}_layernorm")(y.unflatten(-1, (count, d)).transpose(0, 1)[None])[0].transpose(
                0, 1
            )
        else:
            y = getattr(attention, f"{side}_norm")(y.unflatten(-1, (count, d)))
        out.append(y)
    return tuple(out)


@pytest.mark.parametrize("family", NORMED)
def test_queries_and_keys_are_those_of_the_stock_modules(family: str) -> None:
    model, layer, weights = layer_of(family)
    a = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = stock(model, family, a, (4, 4), 16)
    for got, expected in zip(queries_and_keys(a, weights, layer), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("family", NORMED)
def test_heads_equal_up_to_what_a_norm_allows_merge_without_loss(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family, **NORMED[family])
    layer_of(family, twins(family in PHASES))[0].save_pretrained(source)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    want = logits(source, ids)
    tolerance = 2e-3 * float(want.abs().max())
    out = run(source, tmp_path / "out", kv_heads=2, repair="none", text=text(16))
    assert torch.allclose(logits(out, ids), want, atol=tolerance)
    mean = run(source, tmp_path / "mean", kv_heads=2, method="mean")
    assert not torch.allclose(logits(mean, ids), want, atol=5 * tolerance)


def inputs(fitted: int, held_out: int) -> Callable[[], Iterator[tuple[bool, torch.Tensor]]]:
    """Two chunks to fit on and one held out, of so many tokens."""

    def chunks() -> Iterator[tuple[bool, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        mix = torch.randn(64, 64, generator=generator)
        for held, tokens in ((False, fitted), (True, held_out), (False, fitted)):
            yield held, torch.randn(tokens, 64, generator=generator) @ mix / 8

    return chunks


def fit(
    family: str, tokens: int, edit: Callable[[LayerWeights, LayerAttention], None] | None = None
) -> tuple[Any, ...]:
    _, layer, weights = layer_of(family, edit)
    chunks = inputs(tokens, 60)
    sums = MomentSums(4)
    for held_out, a in chunks():
        if not held_out:
            sums.add(*queries_and_keys(a, weights, layer), project(a, weights.v_KDC, weights.v_bias_KD))
    groups = ((0, 2), (1, 3))
    maps, _ = calibrated_maps(sums.finish(0), weights, groups, layer.rope)
    return layer, weights.reorder((0, 2, 1, 3)), fit_keys(weights, maps, groups, layer, chunks), chunks


@pytest.mark.parametrize("family", NORMED)
def test_fitted_keys_beat_pooled_ones_and_their_error_is_that_of_the_written_weights(family: str) -> None:
    layer, weights, result, chunks = fit(family, 400)
    assert result.accepted
    assert result.lost == result.fitted < 0.9 * result.pooled
    a = next(a for held_out, a in chunks() if held_out)
    x, y, rest = rotary_indices(layer.rope, layer.head_dim)
    q, k = (z.double() for z in queries_and_keys(a, weights, layer))
    q2, k2 = (z.double() for z in queries_and_keys(a, result.weights, layer))
    error = whole = 0.0
    for h in range(4):  # every query against every key, written out
        for part in range(len(x)):
            pair = [
                torch.complex(z[:, i, x[part]], z[:, i, y[part]]) for z, i in ((q, h), (k, h), (q2, h), (k2, h // 2))
            ]
            before, after = torch.outer(pair[0].conj(), pair[1]), torch.outer(pair[2].conj(), pair[3])
            error, whole = (
                error + float((after - before).abs().square().mean()),
                whole + float(before.abs().square().mean()),
            )
        if len(rest):
            centred, centred2 = (z[..., rest] - z[..., rest].mean(0) for z in (k, k2))
            before, after = q[:, h][:, rest] @ centred[:, h].T, q2[:, h][:, rest] @ centred2[:, h // 2].T
            error, whole = (
                error + 2 * float((after - before).square().mean()),
                whole + 2 * float(before.square().mean()),
            )
    assert result.lost == pytest.approx(error / whole, rel=1e-4)


def test_pooled_keys_stay_where_a_fit_to_little_text_is_worse() -> None:
    def equal(weights: LayerWeights, layer: LayerAttention) -> None:
        weights.k_KDC[2:] = weights.k_KDC[:2]

    _, weights, result, _ = fit("qwen3", 3, equal)
    assert not result.accepted
    assert result.lost == result.pooled < 1e-6
    assert torch.equal(result.weights.q_HDC, weights.q_HDC)


def test_sums_do_not_depend_on_the_chunks() -> None:
    _, layer, weights = layer_of("qwen3")
    a = torch.randn(50, 64, generator=torch.Generator().manual_seed(5))
    original, other = queries_and_keys(a, weights, layer), queries_and_keys(a.flip(0), weights, layer)
    whole, parts = ScoreError(layer), ScoreError(layer)
    whole.add(original, other)
    for rows in (slice(0, 13), slice(13, 50)):
        parts.add(tuple(z[rows] for z in original), tuple(z[rows] for z in other))  # type: ignore[arg-type]
    assert whole.share() == pytest.approx(parts.share(), rel=1e-5)
    same = ScoreError(layer)
    same.add(original, original)
    assert same.share() == pytest.approx(0, abs=1e-6)


def test_reports_say_whether_keys_were_fitted(tmp_path: Path) -> None:
    source, out = save_tiny(tmp_path / "source", "qwen3"), tmp_path / "out"
    out.mkdir()
    report = convert(source, out, kv_heads=2, text=text(16))
    for layer in report.layers:
        assert layer.keys_fitted is not None
        assert layer.keys is not None
        assert layer.keys > 0
    pooled = [layer.index for layer in report.layers if not layer.keys_fitted]
    assert any("mean-pooled" in note for note in report.notes) == bool(pooled)


def test_too_little_text_to_hold_some_out_is_a_user_error(tmp_path: Path) -> None:
    source, out = save_tiny(tmp_path / "source", "qwen3"), tmp_path / "out"
    out.mkdir()
    one = CalibrationText(torch.zeros(1, 32, dtype=torch.long), ("a",))
    with pytest.raises(UserError, match="too little calibration text to check fitted keys"):
        convert(source, out, kv_heads=2, repair="none", text=one)
