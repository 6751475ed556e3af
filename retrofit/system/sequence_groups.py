"""Processes in groups that share one sequence each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from retrofit.errors import UserError
from retrofit.system.world import PATIENCE, World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SequenceGroups:
    """The processes of a command in groups of neighbours. world: the groups as if each were one process, which work is
    dealt out to. ranks: in each. first: whether this process is the first of its group. group: its process group."""

    world: World
    ranks: int
    first: bool
    group: ProcessGroup


def require_groups(world: World, ranks: int, command: str = "evaluate") -> None:
    """Raises UserError where the processes of a command do not make groups of `ranks`."""
    if world.size % ranks == 0:
        return
    started = "one process" if world.size == 1 else f"{world.size} processes"
    option = f" --sequence-parallel {ranks}" if command == "evaluate" else ""
    raise UserError(
        f"one sequence over {ranks} ranks, and {started}: no groups of {ranks}",
        where="--sequence-parallel" if option else f"the sequence parallelism of a recipe, in `retrofit {command}`",
        fix=f"start with `torchrun --nproc-per-node={ranks} -m retrofit {command} ...{option}`, or another multiple of "
        f"{ranks} processes",
    )


def sequence_groups(world: World, ranks: int, command: str = "evaluate") -> SequenceGroups:
    """Groups of `ranks` neighbouring processes; every process of a started world calls this.

    Neighbours are on one node as long as `ranks` divides the processes of a node, where links are fast.

    Raises: UserError as `require_groups`.
    """
    import torch.distributed as dist

    require_groups(world, ranks, command)
    own = world.rank // ranks
    groups = [
        dist.new_group(list(range(start, start + ranks)), timeout=PATIENCE) for start in range(0, world.size, ranks)
    ]
    return SequenceGroups(World(own, world.size // ranks), ranks, world.rank % ranks == 0, groups[own])
