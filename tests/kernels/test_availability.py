"""What `doctor` says about kernels, for machines that are made up here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retrofit.kernels.availability import HUB_KERNELS, KernelStatus, Machine, available, machine_here

NONE = Machine()
HOPPER = Machine(capability=(9, 0))
AMPERE = Machine(capability=(8, 0))
PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3", "flash_attention_4": "flash-attn-4"}


def status(name: str, machine: Machine) -> KernelStatus:
    return next(status for status in available(machine) if status.name == name)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("machine", [NONE, HOPPER])
@pytest.mark.parametrize("package", [False, True])
def test_flash_attention_needs_a_package_and_a_gpu(name: str, machine: Machine, package: bool) -> None:
    found = status(name, replace(machine, versions={PACKAGES[name]: "4.0.0"} if package else {}))
    assert found.available == (machine is HOPPER and package)
    assert bool(found.install) == (not package)
    assert ("no CUDA device" in found.reason) == (machine is NONE)
    assert (f"{PACKAGES[name]} 4.0.0" in found.reason) == found.available


def test_a_card_that_is_too_old_is_named() -> None:
    found = status("flash_attention_4", replace(AMPERE, versions={"flash-attn-4": "4.0.0"}))
    assert not found.available
    assert "8.0" in found.reason
    assert "9.0" in found.reason


@pytest.mark.parametrize("name", PACKAGES)
def test_the_hub_stands_in_for_a_package(name: str) -> None:
    machine = replace(HOPPER, versions={"kernels": "0.13.0"})
    found = status(name, machine)
    assert found.available
    assert found.implementation in HUB_KERNELS
    assert "is not installed" in found.reason
    assert "downloaded from the hub" in found.reason
    assert "in the cache" in status(name, replace(machine, cached=frozenset(HUB_KERNELS))).reason


def test_without_the_hub_a_kernel_has_to_be_in_the_cache() -> None:
    machine = replace(HOPPER, versions={"kernels": "0.13.0"}, offline=True)
    assert not status("flash_attention_2", machine).available
    assert "HF_HUB_OFFLINE" in status("flash_attention_2", machine).reason
    assert status("flash_attention_2", replace(machine, cached=frozenset(HUB_KERNELS))).available


@pytest.mark.parametrize("name", HUB_KERNELS)
def test_kernels_of_the_hub_say_what_is_missing(name: str) -> None:
    found = status(name, NONE)
    assert not found.available
    assert "package kernels is not installed" in found.reason
    assert "no CUDA device" in found.reason
    assert "kernels" in str(found.install)


@pytest.mark.parametrize(
    ("machine", "runs"), [(NONE, False), (Machine(compiler=True), True), (HOPPER, True), (Machine(mps=True), False)]
)
def test_flex_attention_needs_a_gpu_or_a_compiler(machine: Machine, runs: bool) -> None:
    assert status("flex_attention", machine).available == runs


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "models--kernels-community--flash-attn2").mkdir()
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    machine = machine_here()
    assert machine.cached == {"kernels-community/flash-attn2"}
    assert not machine.compiler
    assert machine.capability is None, "the tests show torch no GPU"
