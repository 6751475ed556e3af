"""Work dealt out to the processes of one command: what each of them does, and the results of all.

Whoever works on an item, its result is the same; so the results are those of one process, whatever their number. An
error is raised where it happens: the process ends, and its launcher ends the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from retrofit.system.world import World

Name = TypeVar("Name")
Result = TypeVar("Result")


def dealt(costs: Mapping[Name, float], processes: int) -> list[list[Name]]:
    """The items of each process, in the order of `costs`: the most expensive first, to the process with least so far.

    costs: of every item, in any unit. Processes beyond the number of items get none. The largest load is at most 4/3 of
    the best possible (Graham 1969, LPT). The same everywhere: ties go to the earlier item, and to the lower rank.
    """
    loads = [0.0] * processes
    owner: dict[Name, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] += costs[name]
    return [[name for name in costs if owner[name] == rank] for rank in range(processes)]


def own_share(costs: Mapping[Name, float], world: World) -> list[Name]:
    """The items that this process works on, as `dealt` has it."""
    return dealt(costs, world.size)[world.rank]


def collected(done: Mapping[Name, Result], world: World) -> dict[Name, Result]:
    """The results of all processes, in every process. done: those of this one."""
    found: dict[Name, Result] = {}
    for part in world.gather(dict(done)):
        found |= part
    return found
