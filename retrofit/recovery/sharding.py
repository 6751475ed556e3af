"""The weights of student and teacher split over processes by torch's FSDP2, and what both share split once.

Each decoder layer is one unit: gathered when it computes, given up afterwards (Zhao et al. 2023, arXiv:2304.11277). The
embeddings, the last norm and the head are the unit of the whole model. Where the teacher's modules are the student's
own, the student's unit is gathered for the teacher's layer as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from retrofit.recovery.layout import Layout
from retrofit.recovery.student_teacher import StudentTeacher, body
from retrofit.system.world import World

if TYPE_CHECKING:
    from accelerate import ParallelismConfig
    from peft import PeftModel
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")


def parallelism(layout: Layout) -> ParallelismConfig:
    """The layout as accelerate has it."""
    from accelerate import ParallelismConfig

    return ParallelismConfig(
        dp_replicate_size=layout.replicas, dp_shard_size=layout.shard, cp_size=layout.sequence, tp_size=1, sp_size=1
    )


def weights_mesh(config: ParallelismConfig, device: str) -> DeviceMesh:
    """The processes over which weights are split, of each replica; made by all of them together."""
    mesh: Any = config.get_device_mesh(torch.device(device).type)
    return cast("DeviceMesh", mesh[tuple(config.fsdp_dim_names)])


def in_turn(world: World, work: Callable[[], Result]) -> Result:
    """What `work` gives in every process, done one after the other on each node.

    A model is read into host memory before it is split, and a node need not hold as many copies as it has processes.
    """
    results: list[Result] = []
    for turn in range(max(world.gather(world.local_rank)) + 1):
        if turn == world.local_rank:
            results.append(work())
        world.wait()
    return results[0]


def split(model: PeftModel, pair: StudentTeacher, mesh: DeviceMesh, device: str) -> None:
    """Split the student with its adapters and its teacher over `mesh`; each process is left with its part on `device`.

    They may be in host memory, whence they go to the device unit by unit. The engine finds a model that it need not
    wrap any more.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layers = list(cast(nn.ModuleList, pair.student.get_submodule(pair.spec.layers_path)))
    lenders = {} if pair.teacher is None else lend(pair.teacher, pair.student, layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(cast(nn.Module, model), mesh=mesh)
    model._is_accelerate_prepared = True  # type: ignore[assignment]
    if pair.teacher is None:
        return
    assert pair.teacher_spec is not None
    students = set(model.parameters())  # those of its modules that the teacher has now
    path = pair.teacher_spec.layers_path
    for number, unit in enumerate(cast(nn.ModuleList, pair.teacher.get_submodule(path))):
        inside = f"{path}.{number}."
        wanted = {index for name, index in lenders.items() if name.startswith(inside) and index is not None}
        _gather_around(unit, [layers[index] for index in sorted(wanted)])
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=students)
    root = body(pair.teacher)
    root.register_forward_pre_hook(partial(_unshard, [model]))  # until the student has computed as well
    fully_shard(root, mesh=mesh, ignored_params=students)
    for parameter in pair.teacher.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)  # a head of its own, which is not split


def split_again(model: nn.Module) -> None:
    """Give up what a forward pass without a backward pass leaves gathered: the unit of the whole model."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def lend(teacher: nn.Module, student: nn.Module, layers: list[nn.Module]) -> dict[str, int | None]:
    """Let every module of the teacher whose parameters lie in the student's storage be the student's module.

    {name of such a module in the teacher: index of the student's layer that it belongs to; None outside of layers}.
    """
    where = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    known = {
        (type(module), *_storage(module)): module for module in student.modules() if any(True for _ in _own(module))
    }
    lenders: dict[str, int | None] = {}
    for name, module in list(teacher.named_modules(remove_duplicate=False)):
        if not any(True for _ in _own(module)):
            continue
        twin = known.get((type(module), *_storage(module)))
        if twin is not None and not any(True for _ in module.children()):
            parent, _, attribute = name.rpartition(".")
            setattr(teacher.get_submodule(parent), attribute, twin)
            lenders[name] = where.get(id(twin))
    return lenders


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _storage(module: nn.Module) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in _own(module))


def _gather_around(unit: nn.Module, lenders: list[nn.Module]) -> None:
    """Gather the units that lend modules to `unit` while it computes."""
    if lenders:
        unit.register_forward_pre_hook(partial(_unshard, lenders))
        unit.register_forward_hook(partial(_reshard, lenders))


def _unshard(units: list[Any], *_: Any) -> None:
    for unit in units:
        unit.unshard()


def _reshard(units: list[Any], *_: Any) -> None:
    for unit in units:
        unit.reshard()
