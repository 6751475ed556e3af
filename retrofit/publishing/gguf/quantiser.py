"""Quantise a GGUF file with llama.cpp's own function, in an environment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.fresh import FreshError, run_fresh
from retrofit.publishing.engines.environments import QUANTISER, Environment
from retrofit.publishing.gguf.kinds import FTYPES
from retrofit.recipe.values import GgufType

PROGRAM = Path(__file__).with_name("programs") / "quantise.py"
START_SECONDS = 300.0
SLOW_BYTES = 1e6  # a second, on a machine that this is tried on
ROOM = 2 << 30  # bytes of data besides the largest tensor in float32
__all__ = ["QUANTISER", "quantise"]


def quantise(
    source: Path,
    outs: Sequence[tuple[GgufType, Path]],
    *,
    environment: Environment,
    threads: int,
) -> str:
    """Write `source`, a GGUF file of floating-point weights, in each of the types; returns the package's release.

    threads: of the process. Raises UserError with llama.cpp's last words when it fails; no file is half-written then.
    """
    files = [{"kind": FTYPES[kind], "out": str(out.absolute())} for kind, out in outs]
    job = {"source": str(source.absolute()), "files": files, "threads": threads}
    nbytes = source.stat().st_size
    try:
        done = run_fresh(
            PROGRAM,
            job,
            seconds=START_SECONDS + len(outs) * nbytes / SLOW_BYTES,
            memory=ROOM + 2 * nbytes,
            cwd=source.absolute().parent,
            python=environment.python,
        )
        error = done.get("error")
    except FreshError as failed:
        error = f"\n  {failed}"
    if error:
        for _, out in outs:
            out.unlink(missing_ok=True)
        raise UserError(
            f"llama.cpp's quantiser failed: {error}",
            where=shown(source.name),
            fix="ask for f16, bf16 or q8_0, which the converter writes by itself",
        )
    return str(done["version"])
