"""Which kernel a model gets, and why it does not get another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.kernels import registry
from retrofit.kernels.availability import Machine, available
from retrofit.kernels.registry import KERNELS, KernelChoice, apply, choose, scoring_kernel
from retrofit.model.families import describe
from retrofit.model.spec import AttentionSpec
from tests.tiny import tiny_config, tiny_model


def test_flex_attention_on_a_cpu_says_that_it_compiles_and_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    llama = describe(tiny_config("llama"))
    assert "compiles it first" in choose("flex_attention", llama, "cpu").reason
    assert "compiles it first" in next(one for one in available() if one.name == "flex_attention").reason
    with pytest.raises(UserError, match="cannot train"):
        choose("flex_attention", llama, "cpu", training=True)


def test_every_kernel_has_a_status() -> None:
    statuses = {status.name: status for status in available()}
    assert tuple(statuses) == (*KERNELS, "products")  # listed, not offered
    assert "training on a CPU" in statuses["products"].reason
    assert statuses["sdpa"].available
    assert statuses["blockwise"].available
    assert not statuses["flash_attention_2"].available, "the tests show torch no GPU"


def test_auto_on_a_cpu() -> None:
    llama, gemma2 = describe(tiny_config("llama")), describe(tiny_config("gemma2"))
    windows = describe(tiny_config("mistral", sliding_window=16))
    assert choose("auto", llama, "cpu").name == "blockwise"
    assert choose("auto", llama, "cpu", training=True).name == "sdpa"
    assert choose("auto", windows, "cpu", training=True).name == "blockwise"
    capped = choose("auto", gemma2, "cpu")
    assert capped.name == "eager"
    assert capped.requested == "auto"
    assert capped.reason


def test_training_on_a_cpu_takes_products_where_it_helps_only() -> None:
    llama, gemma2 = describe(tiny_config("llama")), describe(tiny_config("gemma2"))
    windows = describe(tiny_config("mistral", sliding_window=16))
    for spec in (llama, windows):
        choice = choose("auto", spec, "cpu", training=True, dtype="bfloat16")
        assert (choice.requested, choice.name) == ("auto", "products")
        assert "matrix products" in choice.reason
        assert choose("auto", spec, "cpu", training=True, dtype="float32").name != "products"
        assert choose("auto", spec, "cpu", dtype="bfloat16").name == "blockwise"
        assert choose("auto", spec, "cuda", training=True, dtype="bfloat16").name != "products"
    assert choose("auto", gemma2, "cpu", training=True, dtype="bfloat16").name == "eager"
    assert choose("sdpa", llama, "cpu", training=True, dtype="bfloat16").name == "sdpa"


def test_products_is_not_to_be_asked_for_nor_named_as_a_way_out() -> None:
    llama = describe(tiny_config("llama"))
    with pytest.raises(UserError, match="not a kernel") as unknown:
        choose("products", llama, "cpu", training=True, dtype="bfloat16")
    with pytest.raises(UserError, match="flash_attention_2") as missing:
        choose("flash_attention_2", llama, "cpu", training=True, dtype="bfloat16")
    assert "products" not in f"{unknown.value.fix} {missing.value.fix}"
    assert "auto" in str(missing.value.fix)


@pytest.mark.parametrize(
    ("family", "device", "training", "reason"),
    [
        ("llama", "cpu", True, None),
        ("llama", "cpu", False, "for training"),
        ("llama", "cuda:0", True, "for CPUs"),
        ("gemma2", "cpu", True, "soft-capped"),
    ],
)
def test_what_products_cannot_run(family: str, device: str, training: bool, reason: str | None) -> None:
    objection = registry._objection("products", describe(tiny_config(family)), device, training, "bfloat16")
    assert (objection is None) == (reason is None)
    assert (reason or "") in (objection or "")


HOPPER = Machine(capability=(9, 0))


@pytest.mark.parametrize("release", [2, 3, 4])
def test_auto_on_cuda_follows_what_is_installed_and_the_dtype(release: int) -> None:
    llama = describe(tiny_config("llama"))
    package = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}[release]
    machine = replace(HOPPER, versions={package: "1.0"})
    assert choose("auto", llama, "cuda", dtype="bfloat16", machine=HOPPER).name == "sdpa"
    assert choose("auto", llama, "cuda", dtype="bfloat16", machine=machine).name == f"flash_attention_{release}"
    assert choose("auto", llama, "cuda", dtype="float32", machine=machine).name == "sdpa"
    with pytest.raises(UserError, match="float32"):
        choose("blockwise", llama, "cuda", dtype="float32")


@pytest.mark.parametrize("head_dim", [20, 512])
def test_blockwise_on_cuda_refuses_head_dims_without_a_kernel(head_dim: int) -> None:
    spec = describe(tiny_config("llama"))
    odd = replace(spec, layers=tuple(replace(layer, head_dim=head_dim) for layer in spec.layers))
    with pytest.raises(UserError, match="head dim"):
        choose("blockwise", odd, "cuda", dtype="bfloat16", machine=HOPPER)


def with_sinks(**over: Any) -> AttentionSpec:
    spec = describe(tiny_config("llama", **over))
    return replace(spec, layers=tuple(replace(layer, sinks="sinks") for layer in spec.layers))


@pytest.mark.parametrize(
    ("kernel", "training", "reason"),
    [
        ("eager", True, None),
        ("blockwise", True, None),
        ("flex_attention", True, None),
        ("sdpa", False, "it has attention sinks"),
        ("flash_attention_2", False, "it has attention sinks"),
        ("flash_attention_3", False, "it has attention sinks"),  # of its package; the build of vLLM has them
        ("flash_attention_4", False, None),
        ("flash_attention_4", True, "no gradient"),
        ("kernels-community/flash-attn3", False, "it has attention sinks"),
        ("kernels-community/vllm-flash-attn3", False, None),
        ("kernels-community/vllm-flash-attn3", True, "no gradient"),
    ],
)
def test_which_kernels_express_sinks_on_cuda(kernel: str, training: bool, reason: str | None) -> None:
    versions = {name: "1.0" for name in ("flash-attn", "flash-attn-3", "flash-attn-4", "kernels")}
    given = with_sinks(), "cuda", training, "bfloat16", replace(HOPPER, versions=versions)
    objection = registry._objection(kernel, *given)
    assert (objection is None) == (reason is None)
    assert (reason or "") in (objection or "")


def test_flash_attention_3_of_the_hub_expresses_sinks_and_4_of_the_hub_is_not_what_models_with_sinks_take() -> None:
    machine = replace(HOPPER, versions={"kernels": "0.13.0"})
    choice = choose("flash_attention_3", with_sinks(), "cuda", dtype="bfloat16", machine=machine)
    assert choice.name == "kernels-community/vllm-flash-attn3"
    with pytest.raises(UserError, match="sinks"):
        choose("flash_attention_4", with_sinks(), "cuda", dtype="bfloat16", machine=machine)


def test_auto_with_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    sinks = with_sinks()
    assert choose("auto", sinks, "cpu").name == "blockwise"
    assert choose("auto", sinks, "cpu", training=True, dtype="float32").name == "blockwise"
    assert choose("auto", sinks, "cpu", training=True, dtype="bfloat16").name == "products"
    for training in (False, True):
        on_cuda = choose("auto", sinks, "cuda", training=training, dtype="bfloat16", machine=HOPPER)
        assert on_cuda.name == "blockwise"
        assert "sinks" in on_cuda.reason
        assert choose("auto", sinks, "mps", training=training, machine=Machine(mps=True)).name == "eager"
    assert choose("auto", sinks, "cuda", dtype="float32", machine=HOPPER).name == "flex_attention"
    assert registry.split_kernel("auto", sinks, "cpu").name == "ring"
    with pytest.raises(UserError, match="on CUDA only"):
        choose("flex_attention", sinks, "cpu", machine=Machine(compiler=True))


def test_soft_capped_scores_are_compiled_on_cuda() -> None:
    gemma2 = describe(tiny_config("gemma2"))
    assert choose("auto", gemma2, "cuda", dtype="bfloat16", machine=HOPPER).name == "flex_attention"
    assert choose("auto", gemma2, "cuda", training=True, dtype="bfloat16", machine=HOPPER).name == "flex_attention"


def test_a_kernel_of_the_hub_stands_in_for_a_package_where_a_person_asks_for_it() -> None:
    llama, machine = describe(tiny_config("llama")), replace(HOPPER, versions={"kernels": "0.13.0"})
    choice = choose("flash_attention_2", llama, "cuda", dtype="bfloat16", machine=machine)
    assert (choice.requested, choice.name) == ("flash_attention_2", "kernels-community/flash-attn2")
    assert "flash-attn is not installed" in choice.reason
    assert "hub" in choice.reason
    asked = choose("kernels-community/flash-attn3", llama, "cuda", dtype="bfloat16", machine=machine)
    assert asked.name == "kernels-community/flash-attn3"
    assert choose("auto", llama, "cuda", dtype="bfloat16", machine=machine).name == "sdpa"
    with pytest.raises(UserError, match="on CUDA"):
        choose("kernels-community/flash-attn3", llama, "cpu", machine=machine)


def test_a_kernel_of_the_hub_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def fails(name: str) -> None:
        raise ValueError("no build for this torch")

    monkeypatch.setattr(model, "set_attn_implementation", fails)
    with pytest.raises(UserError, match="no build for this torch") as error:
        apply(model, KernelChoice("flash_attention_2", "kernels-community/flash-attn2", "test"))
    assert "kernel: auto" in str(error.value.fix)


def test_auto_on_mps() -> None:
    llama, gemma2 = describe(tiny_config("llama")), describe(tiny_config("gemma2"))
    machine = Machine(mps=True, compiler=True)
    for training in (False, True):
        assert choose("auto", llama, "mps", training=training, machine=machine).name == "sdpa"
        assert choose("auto", gemma2, "mps", training=training, machine=machine).name == "eager"
    for kernel, reason in (("blockwise", "MPS"), ("flex_attention", "MPS"), ("flash_attention_2", "no CUDA device")):
        with pytest.raises(UserError, match=reason):
            choose(kernel, llama, "mps", machine=machine)


@pytest.mark.parametrize("kernel", ["blockwise", "sdpa"])
def test_what_is_asked_for_and_impossible_is_refused(kernel: str) -> None:
    with pytest.raises(UserError, match="soft-capped") as error:
        choose(kernel, describe(tiny_config("gemma2")), "cpu")
    assert "eager" in str(error.value.fix)


def test_unknown_and_missing_kernels_are_refused() -> None:
    llama = describe(tiny_config("llama"))
    with pytest.raises(UserError, match="not a kernel"):
        choose("flash", llama, "cpu")
    with pytest.raises(UserError, match="flash_attention_2"):
        choose("flash_attention_2", llama, "cpu")


def test_scoring_kernel_falls_back_and_says_why() -> None:
    assert scoring_kernel(tiny_model("gemma3_text")).name == "blockwise"
    capped = scoring_kernel(tiny_model("gemma2"))
    assert capped.name == "eager"
    assert "soft-capped" in capped.reason


def test_apply_refuses_a_class_that_would_only_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UserError, match="does not let"):
        apply(model, KernelChoice("sdpa", "sdpa", "test"))
