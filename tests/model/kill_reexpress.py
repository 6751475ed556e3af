"""Re-expresses models undisturbed, then again and again, each time killed at another moment, until an attempt ends.

`python -m tests.model.kill_reexpress SOURCE CALM HUNTED WHAT tensor:5 close:1`: WHAT is `alone`, or the number of KV
heads that the model is converted to afterwards. The undisturbed result is in CALM; of those in HUNTED the first attempt
gets SIGKILL in the middle of its fifth write of weights. Each result has its cache beside it, and what its last attempt
was told, as JSON in HUNTED.said. More models follow after `--`.
"""

from __future__ import annotations

import importlib
import itertools
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
from retrofit.workflow.steps import convert
from tests.killing import dying, half_a_tensor, hunted, nothing

SHARD = "60KB"
writing = importlib.import_module("retrofit.model.reexpress.write")  # the package has a function of that name


def mortal(limit: str) -> None:
    """Small shards; and death at `limit`."""
    for function in (writing.write, reexpress.reexpress):
        assert "max_shard_size" in function.__kwdefaults__
        function.__kwdefaults__["max_shard_size"] = SHARD
    convert.shard_size = lambda recipe: SHARD
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


def one(source: str, calm: str, out: str, what: str, *limits: str) -> None:
    """The undisturbed attempt, and those that are killed."""
    attempt(source, Path(calm), what, "never")
    hunted(lambda limit: attempt(source, Path(out), what, limit), list(limits))


def main() -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    for separated, words in itertools.groupby(sys.argv[1:], lambda word: word == "--"):
        if not separated:
            one(*words)


if __name__ == "__main__":
    main()
