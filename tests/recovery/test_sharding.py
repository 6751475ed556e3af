"""Each process holds its part of the weights, and what student and teacher share once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from retrofit.recipe.schema import Adapter, Recover
from retrofit.recovery.layout import Layout
from retrofit.recovery.sharding import in_turn, parallelism, split, weights_mesh
from retrofit.recovery.student_teacher import StudentTeacher, hidden_states, load_student_teacher
from retrofit.recovery.train import student_with_adapters
from retrofit.system.world import World
from tests.ranks import on_ranks
from tests.tiny import save_tiny

IDS = torch.arange(24).view(2, 12)


def load(student: Path, teacher: Path) -> tuple[StudentTeacher, torch.nn.Module]:
    pair = load_student_teacher(student, teacher, device="cpu", dtype=torch.float32, kernel="sdpa")
    return pair, student_with_adapters(pair, Recover(adapter=Adapter(rank=4, alpha=8)), seed=0)


def held(pair: StudentTeacher, model: torch.nn.Module) -> int:
    """Bytes of the parameters of both models, each storage once."""
    assert pair.teacher is not None
    storages: dict[int, int] = {}
    for parameter in (*model.parameters(), *pair.teacher.parameters()):
        local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def halves(world: World, student: Path, teacher: Path) -> tuple[int, Tensor, Tensor]:
    layout = Layout(world.rank, 1, world.size, 1, True)
    mesh = weights_mesh(parallelism(layout), "cpu")

    def work() -> tuple[StudentTeacher, torch.nn.Module]:
        pair, model = load(student, teacher)
        split(model, pair, mesh, "cpu")  # type: ignore[arg-type]
        return pair, model

    pair, model = in_turn(world, work)
    nbytes = held(pair, model)
    assert pair.teacher is not None
    with torch.no_grad():
        taught = hidden_states(pair.teacher, IDS)
        own = model(input_ids=IDS)
    return nbytes, taught, own


def test_two_processes_hold_half_each_and_compute_the_same(tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", "llama", num_key_value_heads=2)
    student = save_tiny(tmp_path / "student", "llama", num_key_value_heads=2)
    changed = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        changed.model.layers[1].self_attn.k_proj.weight.mul_(2)
    changed.save_pretrained(student)
    pair, model = load(student, teacher)
    whole = held(pair, model)
    assert pair.teacher is not None
    with torch.no_grad():
        expected = hidden_states(pair.teacher, IDS), model(input_ids=IDS)
    for nbytes, *found in on_ranks(tmp_path, 2, halves, student, teacher):
        assert nbytes <= 0.51 * whole
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
