"""One message for a command of several processes, whichever of them fails first.

Processes have no order when one fails: the others are waiting for it, are ended by the launcher, or fail as well. The
first one marks the launcher's store, and prints; those that find the mark end without a word.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.errors import PeerError
from retrofit.system.world import World

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# What gloo and NCCL say where a process that they exchange something with is gone.
_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|gloo/transport|ncclRemoteError|NCCL communicator")
_CONNECT = timedelta(seconds=10)
_POLL = 0.1  # seconds
_MAIN_FIRST = 1.5  # seconds that rank 0 is given to print what every process has found


@contextmanager
def watched(world: World) -> Iterator[None]:
    """In the block, that another process has ended is a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _GONE.search(str(error)):
            raise
        raise _gone(world) from error


def meet(world: World) -> None:
    """Return when every process has come here. Raises PeerError where one has failed on its way.

    Process groups wait in C++, where no signal of a launcher is heard; this wait ends when it is asked to.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else there is no store before rank 0 makes it
        return
    store = _store()
    if store is None:
        raise _gone(world)
    store.add(_key("here"), 1)
    while store.add(_key("here"), 0) < world.size:
        if store.add(_key("failed"), 0):
            raise _gone(world)
        time.sleep(_POLL)


def first_to_fail(world: World) -> bool:
    """Whether this process is the one to print an error: the first that asks, and rank 0 before others.

    To be asked once, by a process that then ends: it does not hear SIGTERM any more, by which launchers end the others
    of one that has failed.
    """
    if world.size == 1:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store = _store()
    if store is None:
        return True
    until = time.monotonic() + (0 if world.main else _MAIN_FIRST)
    while time.monotonic() < until:
        if store.add(_key("failed"), 0):
            return False
        time.sleep(_POLL)
    return store.add(_key("failed"), 1) == 1


def tell_launcher(message: str) -> None:
    """Give torchrun, where it started this process, the message for its own report of what failed."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": report}), encoding="utf-8")


def _gone(world: World) -> PeerError:
    return PeerError(
        "another process of this command has ended: it was killed, or its node is gone",
        fix="see what the launcher says of it (often memory has run out); the same command then resumes",
    )


def _key(what: str) -> str:
    """In the store, which outlives a restart of the processes by torchrun."""
    return f"retrofit/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


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
