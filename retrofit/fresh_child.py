"""The first lines of a fresh process: it binds itself to its parent and to its limits, then calls a script's `main`.

Run by `fresh.py` as a file (`python -I fresh_child.py SCRIPT PARENT PIPE MEMORY`, -1 for no limit), never imported: the
script may have to show that it works without this package.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
import threading
from typing import Any

_PR_SET_PDEATHSIG = 1
_START = 2 << 30  # bytes of data of Python and torch with its modules, and 64 MiB for the stack and heap of each thread
_THREAD = 64 << 20


def die_with_parent(parent: int, pipe: int) -> None:
    """End this process when `parent` ends: Linux sends a signal, and everywhere the pipe that it held is closed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limit_memory(nbytes: int) -> None:
    """Let this process hold `nbytes` of data besides what it starts with; systems that cannot limit it do not."""
    limit = nbytes + _START + _THREAD * (os.cpu_count() or 1)
    try:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ValueError, OSError):
        pass


def main() -> None:
    """Set up, read the job, answer."""
    script, parent, pipe, memory = sys.argv[1], *map(int, sys.argv[2:5])
    die_with_parent(parent, pipe)
    if memory >= 0:
        limit_memory(memory)
    # What libraries print goes to stderr; stdout is for the answer.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.argv = [script]
    job: Any = json.load(sys.stdin)
    result = runpy.run_path(script)["main"](job)
    with answer:
        answer.write(json.dumps(result).encode())


if __name__ == "__main__":
    main()
