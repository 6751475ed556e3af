"""What the programs share that work again and again, each time killed at another moment."""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any


def dying(event: str, limit: str, function: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but its n-th call, if `limit` says so, does half the work and dies."""
    where, _, lives = limit.partition(":")
    left = int(lives) if where == event else 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            half(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return called


def half_a_tensor(file: Any, view: memoryview) -> None:
    file.write(view[: len(view) // 2])


def nothing(*_: Any, **__: Any) -> None:
    pass


def settle() -> None:
    """After a first piece of work in this process: forks share what it imported, and do not look it through."""
    gc.collect()
    gc.freeze()


def hunted(attempt: Callable[[str], None], limits: list[str]) -> None:
    """Attempts that die at each of `limits`, and one that does not. Each is a fork of this process."""
    settle()
    for limit in [*limits, "never"]:
        if (child := os.fork()) == 0:
            code = 1
            try:
                attempt(limit)
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed if limit != "never" else status == 0, f"{limit}: status {status}"
