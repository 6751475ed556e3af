"""Converts one model again and again, each time killed at another moment, until one attempt ends by itself.

`python -m tests.kv_heads.kill_convert SOURCE OUT METHOD stream:5 tensor:2`: the first attempt gets SIGKILL in the
middle of its fifth write to a residual stream, the next in the middle of its second write of weights. An attempt is a
fork of this process, so imports are paid once. Prints where the attempts ended and what the last was told, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retrofit.checkpoint import rewrite as rewriting
from retrofit.checkpoint import write
from retrofit.checkpoint.place import staged
from retrofit.kv_heads import averaged, baselines, calibrate, disk, moments, residuals  # noqa: F401 - imported once
from retrofit.kv_heads.convert import CalibrationText, convert


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


def half_a_stream(self: disk.DiskTensors, index: int, tensor: torch.Tensor) -> None:
    with self.path.open("r+b") as file:
        file.seek(self._offsets[index])
        file.write(bytes(tensor.numel() * 2))


def half_a_tensor(file: Any, view: memoryview) -> None:
    file.write(view[: len(view) // 2])


def nothing(*_: Any, **__: Any) -> None:
    pass


def mortal(limit: str) -> None:
    disk.DiskTensors.write = dying("stream", limit, disk.DiskTensors.write, half_a_stream)  # type: ignore[method-assign]
    residuals.WorkFolder._commit = dying("commit", limit, residuals.WorkFolder._commit, nothing)  # type: ignore[method-assign]
    residuals.WorkFolder.copy_moments = dying("copy", limit, residuals.WorkFolder.copy_moments, nothing)  # type: ignore[method-assign]
    write.write_all = dying("tensor", limit, write.write_all, half_a_tensor)
    write.ShardWriter.close = dying("close", limit, write.ShardWriter.close, nothing)  # type: ignore[method-assign]
    rewriting.write_config = dying("config", limit, rewriting.write_config, nothing)


class Notes:
    """A Progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, task: str, total: int | None, unit: str) -> None: ...

    def advance(self, n: int, **fields: float | str) -> None: ...

    def finish(self) -> None: ...

    def note(self, text: str) -> None:
        self.said.append(text)


def attempt(source: Path, out: Path, method: str, limit: str) -> None:
    """One conversion, as `operations.convert` runs it."""
    mortal(limit)
    notes, work = Notes(), Path(f"{out}.work")
    ids = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))
    text = CalibrationText(ids, tuple("ab"[i % 2] for i in range(12)))
    try:
        with staged(out, keep=work / "checkpoint") as folder:
            convert(
                source,
                folder,
                kv_heads=2,
                method=method,  # type: ignore[arg-type]
                text=text,
                max_shard_size="60KB",
                work=work,
                moments=None if method == "mean" else Path(f"{out}.moments"),
                progress=notes,
            )
    finally:
        Path(f"{out}.said").write_text(json.dumps(notes.said))


def hunted(attempt: Callable[[str], None], limits: list[str]) -> list[str]:
    """Attempts that die at each of `limits`, and one that does not; says which there were."""
    for limit in (told := [*limits, "never"]):
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
    return told


def main() -> None:
    """See the module's docstring."""
    source, out, method, *limits = sys.argv[1:]
    torch.set_num_threads(1)
    told = hunted(lambda limit: attempt(Path(source), Path(out), method, limit), limits)
    sys.stdout.write(json.dumps([told, json.loads(Path(f"{out}.said").read_text())]))


if __name__ == "__main__":
    main()
