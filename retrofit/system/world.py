"""The processes that share the work of one command: how many there are, which one this is, and what they exchange.

`torchrun` and `accelerate launch` start every process with RANK, WORLD_SIZE and LOCAL_RANK set. Without them there is
one process, and everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from retrofit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for another one: rank 0 may calibrate, write or download for hours."""


@dataclass(frozen=True)
class World:
    """The processes of one command. rank: this one, from 0. local_rank: its number on this node, which is its GPU.

    control: the group for objects and for waiting (gloo); None where there is one process, or before `started`.
    node_size: processes on this node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: ProcessGroup | None = None
    node_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes, prints and asks the hub: rank 0."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Where this process computes. name: "cpu" or "cuda", which is the GPU of its own among those of the node."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def mine(self, items: Sequence[T]) -> list[T]:
        """The items this process works on: every size-th, beginning with the rank-th."""
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks; every process gets all of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def merged(self, parts: Sequence[T]) -> list[T]:
        """The results of all processes in the order of the items that `mine` dealt out."""
        dealt = self.gather(list(parts))
        return [dealt[index % self.size][index // self.size] for index in range(sum(map(len, dealt)))]

    def share(self, value: T) -> T:
        """The value of rank 0, in every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def only(self, work: Callable[[], T]) -> T:
        """What `work` gives in rank 0, which alone does it, in every process; the others wait. A UserError of it is
        raised in all of them."""
        return led(self, lambda others: work())

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in its own dtype and on its own device; returns it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier(group=self.control)


ALONE = World()

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
"""What launchers tell every process of its place, by which libraries know that there are several."""


class Others:
    """How rank 0 calls the other processes, which wait meanwhile, to a part of its work: see `led`."""

    def __init__(self, world: World, launched: Mapping[str, str]) -> None:
        self._world, self._launched = world, launched
        self.called = False

    @contextmanager
    def join(self, part: Any = None) -> Iterator[None]:
        """In the block every other process does `part`. An error that leaves the block ends this process, and with it
        the others, wherever they are in their part."""
        if self._world.size == 1:
            yield
            return
        self._world.share(_Message("part", part))
        self.called = True
        os.environ.update(self._launched)
        yield
        for name in self._launched:
            os.environ.pop(name, None)
        self.called = False


@dataclass(frozen=True)
class _Message:
    """From rank 0. kind: part (value: what to do), result, or error (value: what to raise)."""

    kind: str
    value: Any


def led(world: World, lead: Callable[[Others], T], part: Callable[[Any], object] = lambda part: None) -> T:
    """What `lead` returns on rank 0, in every process; it is done on rank 0, for which there is no launcher meanwhile.

    part: what the other processes do where `lead` calls them by `Others.join`; they wait otherwise, however long.
    A UserError of `lead` is raised in every process, unless the others are at work: see `join`.
    """
    if world.size == 1:
        return lead(Others(world, {}))
    while not world.main:
        message = world.share(_Message("", None))
        if message.kind == "error":
            raise message.value
        if message.kind == "result":
            return message.value
        part(message.value)
    launched = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    others = Others(world, launched)
    try:
        result = lead(others)
    except UserError as error:
        if not others.called:
            world.share(_Message("error", error))
        raise
    finally:
        os.environ.update(launched)
    world.share(_Message("result", result))
    return result


def from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """The world a launcher has described, not started yet; one process where there was no launcher.

    Raises: UserError for variables that contradict one another.
    """
    if "WORLD_SIZE" not in environment:
        return ALONE
    try:
        size, rank = int(environment["WORLD_SIZE"]), int(environment.get("RANK", "0"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        node_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        raise UserError(
            "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE have to be numbers",
            where="environment",
            fix="start with `torchrun --nproc-per-node=N -m retrofit ...`, or unset them",
        ) from error
    if not 0 <= rank < size or local_rank < 0 or node_size < 1:
        raise UserError(
            f"rank {rank} of {size} processes, local rank {local_rank}",
            where="environment",
            fix="start with `torchrun --nproc-per-node=N -m retrofit ...`, or unset RANK, WORLD_SIZE and LOCAL_RANK",
        )
    return World(rank, size, local_rank, node_size=node_size)


def started(world: World, device: str) -> World:
    """The world with its process groups: gloo for objects and CPU tensors, NCCL for tensors of a GPU.

    device: "cpu" or "cuda...", where this process computes. A group that is there already is used.
    """
    if world.size == 1 or world.control is not None:
        return world
    import torch
    import torch.distributed as dist

    cuda = device.startswith("cuda")
    if cuda:
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{world.local_rank + 1} or more processes were started on this node, and it has "
                f"{torch.cuda.device_count()} GPUs",
                where=f"rank {world.rank} of {world.size}",
                fix=f"start one for each GPU: --nproc-per-node={torch.cuda.device_count()}",
            )
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    return replace(world, control=dist.new_group(backend="gloo", timeout=PATIENCE))
