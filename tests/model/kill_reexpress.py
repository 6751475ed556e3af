"""Re-expresses one model undisturbed, then again and again, each time killed at another moment, until an attempt ends.

`python -m tests.model.kill_reexpress SOURCE CALM HUNTED WHAT tensor:5 close:1`: WHAT is `alone`, or the number of KV
heads that the model is converted to afterwards. The undisturbed result is in CALM; of those in HUNTED the first attempt
gets SIGKILL in the middle of its fifth write of weights. Prints what the last attempt was told as JSON. Each result has
its cache beside it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch

import retrofit
from retrofit.checkpoint import rewrite as rewriting
from retrofit.checkpoint import write
from retrofit.console import Silent
from retrofit.model import reexpress
from retrofit.pipeline import operations
from tests.killing import dying, half_a_tensor, hunted, nothing

SHARD = "60KB"
writing = importlib.import_module("retrofit.model.reexpress.write")  # the package has a function of that name


def mortal(limit: str) -> None:
    """Small shards; and death at `limit`."""
    for function in (writing.write, reexpress.reexpress, operations.convert):
        assert "max_shard_size" in function.__kwdefaults__
        function.__kwdefaults__["max_shard_size"] = SHARD
    write.write_all = dying("tensor", limit, write.write_all, half_a_tensor)
    write.ShardWriter.close = dying("close", limit, write.ShardWriter.close, nothing)  # type: ignore[method-assign]
    writing.write_config = dying("config", limit, writing.write_config, nothing)
    rewriting.write_config = dying("converted", limit, rewriting.write_config, nothing)


def attempt(source: str, out: Path, what: str, limit: str) -> None:
    """`retrofit convert`, from Python."""
    mortal(limit)
    os.environ["RETROFIT_CACHE"] = f"{out}.cache"
    notes = Silent()
    asked = {"reexpress_only": True} if what == "alone" else {"kv_heads": int(what), "method": "mean"}
    try:
        retrofit.convert(source, out=out, progress=notes, **asked)
    finally:
        Path(f"{out}.said").write_text(json.dumps(notes.notes))


def main() -> None:
    """See the module's docstring."""
    source, calm, out, what, *limits = sys.argv[1:]
    torch.set_num_threads(1)
    attempt(source, Path(calm), what, "never")
    hunted(lambda limit: attempt(source, Path(out), what, limit), limits)
    sys.stdout.write(Path(f"{out}.said").read_text())


if __name__ == "__main__":
    main()
