"""One message for a command of several processes, whichever of them fails first.

Processes have no order when one fails: the others are waiting for it, are ended by the launcher, or fail as well. The
first one marks the launcher's store, and prints; those that find the mark end without a word.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from retrofit.errors import PeerError
from retrofit.system.world import World

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# What gloo and NCCL say where a process that they exchange something with is gone.
_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|gloo/transport|ncclRemoteError|NCCL communicator")
_CONNECT = timedelta(seconds=10)
_MAIN_FIRST = 1.5  # seconds that rank 0 is given to print what every process has found


@contextmanager
def watched(world: World) -> Iterator[None]:
    """In the block, that another process has ended is a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _GONE.search(str(error)):
            raise
        raise PeerError(
            "another process of this command has ended: it was killed, or its node is gone",
            where=f"rank {world.rank} of {world.size}",
            fix="see what the launcher says of it (often memory has run out); the same command then goes on",
        ) from error


def first_to_fail(world: World) -> bool:
    """Whether this process is the one to print an error: the first that asks, and rank 0 before others."""
    if world.size == 1:
        return True
    store = _store()
    if store is None:
        return True
    mark = f"retrofit/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    waited = 0.0
    while not world.main and waited < _MAIN_FIRST:
        if store.add(mark, 0):
            return False
        time.sleep(0.1)
        waited += 0.1
    return store.add(mark, 1) == 1


def _store() -> TCPStore | None:
    """The store in which the processes have met, by a connection of its own; None where it is gone."""
    from torch.distributed import DistError, TCPStore

    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        return None
    try:
        return TCPStore(host, int(port), is_master=False, timeout=_CONNECT, wait_for_workers=False)
    except DistError:
        return None
