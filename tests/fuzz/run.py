"""Coverage-guided search for inputs that break a parser: `python -m tests.fuzz.run TARGET SECONDS [FOLDER]`.

What breaks it is written to FOLDER (by default `runs/fuzz/TARGET`), one input for each place that raised; the search
goes on. An input that takes longer than `SLOW` seconds is a finding too. Needs the `fuzz` extra (atheris).
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

import atheris

with atheris.instrument_imports(include=["retrofit"]):
    from tests.fuzz.targets import TARGETS

SLOW = 10


class SlowError(Exception):
    """An input took too long."""


def _slow(number: int, frame: FrameType | None) -> None:
    raise SlowError


def main() -> None:
    """See the module's docstring."""
    name, seconds = sys.argv[1], int(sys.argv[2])
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path("runs/fuzz") / name
    (folder / "seeds").mkdir(parents=True, exist_ok=True)
    found: set[str] = set()
    end = time.monotonic() + seconds
    tried = 0

    def one(data: bytes) -> None:
        nonlocal tried
        tried += 1
        signal.alarm(SLOW)
        try:
            TARGETS[name](data)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what this program looks for)
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{type(error).__name__} at " + " < ".join(f"{f.filename}:{f.lineno}" for f in frames[-3:])
            if where not in found:
                found.add(where)
                path = folder / f"{hashlib.sha256(data).hexdigest()[:12]}.bin"
                path.write_bytes(data)
                sys.stderr.write(f"FOUND {path}: {where}: {str(error)[:200]}\n")
        finally:
            signal.alarm(0)
        if time.monotonic() > end:
            sys.stderr.write(f"{name}: {tried:,} inputs in {seconds} s, {len(found)} faults\n")
            sys.stderr.flush()
            os._exit(1 if found else 0)

    TARGETS[name](b"")  # what is imported and made once counts for no input
    signal.signal(signal.SIGALRM, _slow)
    options = [
        sys.argv[0],
        f"-artifact_prefix={folder}/",
        f"-max_total_time={seconds + 60}",
        "-rss_limit_mb=6000",
        "-max_len=4096",
        "-verbosity=0",
    ]
    atheris.Setup([*options, str(folder / "seeds")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
