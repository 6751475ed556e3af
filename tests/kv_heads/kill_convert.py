"""Converts one model undisturbed, then again and again, each time killed at another moment, until an attempt ends.

`python -m tests.kv_heads.kill_convert SOURCE CALM HUNTED METHOD stream:5 tensor:2`: the undisturbed conversion is in
CALM. Of those in HUNTED the first attempt gets SIGKILL in the middle of its fifth write to a residual stream, the next
in the middle of its second write of weights. Prints what the last was told, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from retrofit.checkpoint import rewrite as rewriting
from retrofit.checkpoint import write
from retrofit.checkpoint.staging import staged
from retrofit.console import Silent
from retrofit.kv_heads import disk
from retrofit.kv_heads.calibrate import residuals
from retrofit.kv_heads.convert import CalibrationText, convert
from tests.killing import dying, half_a_tensor, hunted, nothing


def half_a_stream(self: disk.DiskTensors, index: int, tensor: torch.Tensor) -> None:
    with self.path.open("r+b") as file:
        file.seek(self._offsets[index])
        file.write(bytes(tensor.numel() * 2))


def mortal(limit: str) -> None:
    disk.DiskTensors.write = dying("stream", limit, disk.DiskTensors.write, half_a_stream)  # type: ignore[method-assign]
    residuals.WorkFolder._commit = dying("commit", limit, residuals.WorkFolder._commit, nothing)  # type: ignore[method-assign]
    residuals.WorkFolder.copy_moments = dying("copy", limit, residuals.WorkFolder.copy_moments, nothing)  # type: ignore[method-assign]
    write.write_all = dying("tensor", limit, write.write_all, half_a_tensor)
    write.ShardWriter.close = dying("close", limit, write.ShardWriter.close, nothing)  # type: ignore[method-assign]
    rewriting.write_config = dying("config", limit, rewriting.write_config, nothing)


def attempt(source: Path, out: Path, method: str, limit: str) -> None:
    """One conversion, as the step `convert` runs it."""
    mortal(limit)
    notes, work = Silent(), Path(f"{out}.work")
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
        Path(f"{out}.said").write_text(json.dumps(notes.notes))


def main() -> None:
    """See the module's docstring."""
    source, calm, out, method, *limits = sys.argv[1:]
    torch.set_num_threads(1)
    attempt(Path(source), Path(calm), method, "never")
    hunted(lambda limit: attempt(Path(source), Path(out), method, limit), limits)
    sys.stdout.write(Path(f"{out}.said").read_text())


if __name__ == "__main__":
    main()
