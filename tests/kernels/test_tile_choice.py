"""Which back end computes a tile on a GPU, and that each is called as it wants to be. Nothing here runs on a GPU: fake
tensors check the schemas of PyTorch's operators, and stand-ins the order and layout of what packages are given."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels import blockwise, tile_choice
from retrofit.kernels.tile_backends import BACKENDS, CUDNN, FLASH, FLASH_3, FLASH_4, Card, TileBackend
from retrofit.kernels.tile_choice import FEW_QUERIES, Shape, TileChoice, Trial, plain, run_trial, select

HOPPER = Card("H100", (9, 0), 91002, 132)
SHAPE = Shape(torch.bfloat16, 128, 32, 8)
CPU = torch.device("cpu")
ON_CPU = TileBackend("the CPU's", None, {}, blockwise.block, blockwise.block_backward)
PACKAGES = ("flash-attn-4", "flash-attn-3")


def choose(
    trials: dict[str, Trial | Exception] | None = None,
    *,
    card: Card = HOPPER,
    shape: Shape = SHAPE,
    packages: tuple[str, ...] = (),
) -> TileChoice:
    """trials: by the name of a back end; the others are right and take one second."""

    def attempt(backend: TileBackend, shape: Shape) -> Trial:
        trial = (trials or {}).get(backend.name, Trial(0.01, 1.0))
        if isinstance(trial, Exception):
            raise trial
        return trial

    return select(card, shape, attempt, installed=packages.__contains__)


def test_the_fastest_is_taken_and_the_reason_says_how_fast_all_are() -> None:
    choice = choose({CUDNN.name: Trial(0.01, 0.004), FLASH.name: Trial(0.01, 0.007)})
    assert choice.backend is CUDNN
    assert choice.few is FLASH
    assert "cuDNN 4 ms" in choice.reason
    assert "FlashAttention 2 7 ms" in choice.reason
    assert "flash-attn-4 is not installed" in choice.reason
    assert choose({FLASH.name: Trial(0.01, 0.5)}).backend is FLASH


def test_less_than_a_tenth_faster_changes_nothing() -> None:
    assert choose({FLASH.name: Trial(0.01, 0.95)}).backend is CUDNN


@pytest.mark.parametrize(("name", "backend"), [(FLASH_4.name, FLASH_4), (FLASH_3.name, FLASH_3)])
def test_packages_are_taken_where_they_are_installed_and_faster(name: str, backend: TileBackend) -> None:
    assert choose({name: Trial(0.01, 0.5)}, packages=PACKAGES).backend is backend
    assert choose({name: Trial(0.01, 0.5)}).backend is CUDNN


@pytest.mark.parametrize("error", [0.5, math.nan, math.inf])
def test_a_back_end_that_is_wrong_is_not_taken(error: float) -> None:
    choice = choose({CUDNN.name: Trial(error, 0.001)})
    assert choice.backend is FLASH
    assert "cuDNN: its results are wrong" in choice.reason


@pytest.mark.parametrize("error", [RuntimeError("no valid plan\nmore"), ImportError("broken"), AssertionError()])
def test_a_back_end_that_fails_is_not_taken_and_the_reason_says_so(error: Exception) -> None:
    choice = choose({CUDNN.name: error})
    assert choice.backend is FLASH
    assert "cuDNN: it failed" in choice.reason
    assert "more" not in choice.reason


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (HOPPER, CUDNN),
        (replace(HOPPER, cudnn=None), FLASH),
        (replace(HOPPER, cudnn=90300), FLASH),
        (replace(HOPPER, capability=(10, 0)), CUDNN),
        (replace(HOPPER, capability=(8, 0)), FLASH),
        (replace(HOPPER, capability=(8, 9)), FLASH),
        (replace(HOPPER, capability=(12, 0)), FLASH),
    ],
)
def test_what_a_card_has(card: Card, expected: TileBackend) -> None:
    assert choose(card=card).backend is expected


def test_a_head_dim_that_the_fastest_does_not_have() -> None:
    blackwell = replace(HOPPER, capability=(10, 0))
    assert choose(card=blackwell, shape=replace(SHAPE, head_dim=256)).backend is FLASH
    assert choose(shape=replace(SHAPE, head_dim=256)).backend is CUDNN


@pytest.mark.parametrize(
    ("card", "shape", "reason"),
    [
        (HOPPER, replace(SHAPE, dtype=torch.float32), "has no float32"),
        (HOPPER, replace(SHAPE, head_dim=512), "up to 256"),
        (HOPPER, replace(SHAPE, head_dim=20), "multiples of 8"),
        (replace(HOPPER, capability=(7, 5)), SHAPE, "capability 7.5"),
    ],
)
def test_nothing_right_is_refused_with_every_reason(card: Card, shape: Shape, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        choose(card=card, shape=shape)
    assert all(backend.name in str(error.value) for backend in BACKENDS)


def test_few_queries_go_to_the_kernel_that_divides_the_keys() -> None:
    choice = choose()
    assert choice.for_tile(512, 4096) is CUDNN
    assert choice.for_tile(FEW_QUERIES - 1, 4096) is FLASH
    assert choice.for_tile(512, 1) is FLASH
    assert choose({FLASH.name: RuntimeError()}).for_tile(1, 4096) is CUDNN


def test_keys_are_cut_where_queries_leave_processors_idle() -> None:
    choice = choose()
    assert choice.parts(1, 32, 512, 130_560) == 3
    assert choice.parts(1, 8, 512, 130_560) == 9
    assert choice.parts(1, 8, 512, 2048) == 2
    assert choice.parts(1, 32, 8192, 130_560) == 1
    assert choice.parts(1, 8, 1, 130_560) == 1, "FlashAttention 2 does it by itself"


# ------------------------------------------------------------------------------------- trials and the reference


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_attention_and_its_gradients(causal: bool) -> None:
    q, k, v, grad = (torch.randn(1, heads, 9, 16) for heads in (6, 2, 2, 6))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3, enable_gqa=True)
    grads = torch.autograd.grad(expected, inputs, grad)
    out, lse, *found = plain(q, k, v, grad, causal, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, blockwise.block(q, k, v, causal, 0.3)[1], rtol=0, atol=1e-5)
    for ours, theirs in zip(found, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_trial_passes_what_is_right_without_gradients_too() -> None:
    with torch.inference_mode():
        trial = run_trial(ON_CPU, Shape(torch.float32, 16, 6, 2), CPU, tokens=32)
    assert trial.error < 1e-5
    assert trial.seconds > 0


@pytest.mark.parametrize("wrong", ["lse", "gradient", "nan"])
def test_a_trial_finds_what_is_wrong(wrong: str) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = blockwise.block(q, k, v, causal, scale)
        return out, lse / math.log(2) if wrong == "lse" else lse  # FlashAttention's base 2, for example

    def backward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = blockwise.block_backward(*args)  # type: ignore[arg-type]
        return dq, dk * {"gradient": 0.5, "nan": math.nan}.get(wrong, 1.0), dv

    trial = run_trial(replace(ON_CPU, forward=forward, backward=backward), Shape(torch.float32, 16, 6, 2), CPU, 32)
    assert not trial.error <= tile_choice.TOLERANCE


# ------------------------------------------------------------------------------------- how they are called


@pytest.mark.parametrize("backend", [CUDNN, FLASH], ids=lambda backend: backend.name)
def test_calls_of_pytorchs_operators_fit_their_schemas(backend: TileBackend) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(1, 6, 128, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
        out, lse = backend.forward(q, k, k, False, 0.125)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert lse.dtype == torch.float32
        grads = backend.backward(torch.empty_like(out), q, k, k, out, lse, False, 0.125)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


def by_tokens(*tensors: Tensor) -> list[Tensor]:
    """[B, H, T, D] <-> [B, T, H, D]."""
    return [x.transpose(1, 2) for x in tensors]


def stand_in_3() -> ModuleType:
    """`flash_attn_interface` with the signatures of FlashAttention 3, over the CPU's kernel."""
    module = ModuleType("flash_attn_interface")

    def forward(q, k, v, *, softmax_scale, causal, num_splits):  # type: ignore[no-untyped-def]
        out, lse = blockwise.block(*by_tokens(q, k, v), causal, softmax_scale)
        return out.transpose(1, 2), lse, None, None

    def backward(  # type: ignore[no-untyped-def]
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_q, max_k, dq, dk, dv,
        softmax_scale, is_causal,
    ):  # fmt: skip
        assert cu_seqlens_q is max_k is None
        dout, q, k, v, out = by_tokens(dout, q, k, v, out)
        grads = blockwise.block_backward(dout, q, k, v, out, softmax_lse, is_causal, softmax_scale)
        for target, grad in zip((dq, dk, dv), by_tokens(*grads), strict=True):
            target.copy_(grad)

    module._flash_attn_forward, module._flash_attn_backward = forward, backward  # type: ignore[attr-defined]
    return module


def stand_in_4() -> ModuleType:
    """`flash_attn.cute.interface` with the signatures of FlashAttention 4, over the CPU's kernel."""
    module = ModuleType("flash_attn.cute.interface")

    def forward(q, k, v, *, softmax_scale, causal, return_lse, num_splits):  # type: ignore[no-untyped-def]
        assert return_lse
        out, lse = blockwise.block(*by_tokens(q, k, v), causal, softmax_scale)
        return out.transpose(1, 2), lse, None, None

    def backward(q, k, v, out, dout, lse, softmax_scale, causal):  # type: ignore[no-untyped-def]
        q, k, v, out, dout = by_tokens(q, k, v, out, dout)
        return tuple(by_tokens(*blockwise.block_backward(dout, q, k, v, out, lse, causal, softmax_scale)))

    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(("backend", "module"), [(FLASH_3, stand_in_3()), (FLASH_4, stand_in_4())])
def test_packages_get_their_layout_and_order(
    backend: TileBackend, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert run_trial(backend, Shape(torch.float32, 16, 6, 2), CPU, tokens=32).error < 1e-5
