"""Hugging Face folders as GGUF files, by llama.cpp's own converter in an environment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retrofit.checkpoint.staging import require_free_space
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.fresh import FreshError, run_fresh
from retrofit.publishing.engines.environments import Environment

OutType = Literal["f32", "f16", "bf16", "q8_0"]
PROGRAM = Path(__file__).with_name("programs") / "to_gguf.py"
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
"""Of a weight in each type."""
START_SECONDS = 300.0
SLOW_BYTES = 10e6  # a second, on a machine that this is tried on
ROOM = 4 << 30  # bytes of data besides a shard


@dataclass(frozen=True)
class Conversion:
    """A folder to convert, and the file to write. name: what the file calls the model. check: everything but the
    weights is read and nothing is written: whether the converter knows architecture, tokenizer and tensors."""

    folder: Path
    out: Path
    outtype: OutType
    name: str
    check: bool = False


def convert(
    folder: Path, out: Path, outtype: OutType, *, environment: Environment, name: str, program: Path | None = None
) -> None:
    """Write the checkpoint `folder` as the GGUF file `out`. environment: of the converter.

    Raises UserError with the converter's message where it cannot: an architecture or a tokenizer that it does not know.
    """
    [error] = convert_all([Conversion(folder, out, outtype, name)], environment=environment, program=program)
    if error is not None:
        raise refused(error, folder)


def refused(error: str, folder: Path) -> UserError:
    """The error for a folder that the converter cannot write. error: its own words."""
    return UserError(
        f"llama.cpp's converter cannot write this folder as GGUF: {shown(error)}",
        where=shown(folder),
        fix="leave GGUF out: these are the converter's own words for what it does not know",
    )


def convert_all(
    files: Sequence[Conversion], *, environment: Environment, program: Path | None = None
) -> list[str | None]:
    """Write each GGUF file in one process; of each that failed, the converter's message. A file that is written is
    whole.

    program: the script that calls the converter. Raises UserError when the process itself fails.
    """
    stored = [sum(path.stat().st_size for path in one.folder.glob("*.safetensors")) for one in files]
    for one, nbytes in zip(files, stored, strict=True):
        require_free_space(one.out.parent, 0 if one.check else int(nbytes * BYTES[one.outtype] / 2))
    listed = [
        {
            "folder": str(one.folder.absolute()),
            "out": str(one.out.absolute()),
            "outtype": one.outtype,
            "name": one.name,
            "check": one.check,
        }
        for one in files
    ]
    try:
        done = run_fresh(
            program or PROGRAM,
            {"files": listed},
            seconds=START_SECONDS + 10 * len(files) + sum(stored) / SLOW_BYTES,
            memory=ROOM + 4 * max(stored, default=0),
            cwd=files[0].out.absolute().parent,
            python=environment.python,
        )
    except FreshError as error:
        raise UserError(
            f"llama.cpp's converter did not run:\n  {error}",
            where=str(environment.python),
            fix="remove that environment's folder, so that it is made again",
        ) from None
    return [one.get("error") for one in done["results"]]
