"""Run a function in several processes that form a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.system.world import World, from_environment, started
from tests.children.sitecustomize import BFLOAT16

# One server imports the heavy packages once; every rank is a fork of it, in which no thread has run yet.
_SERVER = multiprocessing.get_context("forkserver")
_HEAVY = (
    "transformers.models.llama.modeling_llama",
    "retrofit.kv_heads.calibrate.layerwise",
    "retrofit.recovery.train",
    "tests.tiny",
)
_SERVER.set_forkserver_preload(["torch.distributed", *_HEAVY])


def on_ranks(folder: Path, size: int, function: Callable[..., Any], *values: Any, seconds: float = 120) -> list[Any]:
    """What `function(world, *values)` returns on each of `size` processes, in the order of ranks.

    function, values and results are pickled: a function of a module, and no lambda. folder: where the processes meet.
    Raises AssertionError with the traceback of the first rank that fails.
    """
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    meeting.touch()
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = _SERVER.Pipe(duplex=False)
        machine = (torch.get_num_threads(), os.environ[BFLOAT16])
        process = _SERVER.Process(
            target=_work, args=(theirs, meeting, rank, size, machine, function, values), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    until = time.monotonic() + seconds
    try:
        waiting = dict(enumerate(pipes))
        while waiting:
            ready = wait(list(waiting.values()), max(0, until - time.monotonic()))
            assert ready, f"ranks {list(waiting)} of {size} did not answer in {seconds} s"
            for rank, pipe in list(waiting.items()):
                if pipe not in ready:
                    continue
                del waiting[rank]
                try:
                    answer = pipe.recv_bytes()
                except EOFError:  # it was killed: what the others make of it is the answer
                    continue
                ok, results[rank] = pickle.loads(answer)
                assert ok, f"rank {rank} of {size}:\n{results[rank]}"
        assert len(results) == size, f"only ranks {sorted(results)} of {size} answered"
        return [results[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.join(1 if len(results) == size else 0)
            if process.is_alive():
                process.kill()


def _work(
    pipe: Connection,
    meeting: Path,
    rank: int,
    size: int,
    machine: tuple[int, str],
    function: Callable[..., Any],
    values: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    threads, os.environ[BFLOAT16] = machine  # the test's, whose own numbers are compared: the server's may be others
    torch.set_num_threads(threads)
    every = str(size)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": every, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": every}
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        world: World = started(from_environment(), "cpu")
        # As plain bytes: a connection would hand over tensors in memory that ends with this process.
        pipe.send_bytes(pickle.dumps((True, function(world, *values))))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  the test that waits has to see whatever it was
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def fail_after(count: int) -> None:
    """The count-th tensor of a layerwise pass interrupts it, in a process that ends with that: nothing is put back."""
    write, left = DiskTensors.write, [count]

    def failing(self: DiskTensors, index: int, tensor: torch.Tensor) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        write(self, index, tensor)

    DiskTensors.write = failing  # type: ignore[method-assign]
