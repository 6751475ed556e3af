"""Run a script of this package in a fresh, isolated Python process: within limits, and never longer than its parent.

The script is given its job as JSON and answers with JSON, both through pipes, so nothing has to be cleaned up after a
kill. What it must not do without end or without bound (read a foreign tokenizer, render a foreign template) ends with a
`FreshError`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrofit.escape import visible

CHILD = Path(__file__).with_name("fresh_child.py")
SHOWN_LINES = 12
# What may leak a setting of this process into the fresh one; the token has no business there either.
_DROPPED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "PYTHONPATH", "PYTHONSTARTUP")
_SET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# By default it computes on the CPU: a GPU's driver reserves more address space than any limit allows.
_ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}


class FreshError(Exception):
    """The process did not give a result. The text says why, in one line or several."""


def run_fresh(
    script: Path, job: Mapping[str, Any], *, seconds: float, memory: int | None, cwd: Path, python: Path | None = None
) -> dict[str, Any]:
    """What `main(job)` of `script` returns, called in a process started with `-I`, offline, in the folder `cwd`.

    seconds: the time it may take. memory: bytes of data that it may hold besides what Python and torch need to start
    (Linux enforces it); it sees no GPU then. None: without a limit, and with the GPUs that this process may use.
    python: the interpreter of another environment. The process ends when this one does, however that ends.

    Raises FreshError when it takes longer, fails or is killed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _DROPPED} | _SET
    environment |= {} if memory is None else _ON_CPU
    # The process watches one end of this pipe: the other end is closed when this process is gone.
    watched, held = os.pipe()
    command = [
        str(python or sys.executable),
        "-I",
        str(CHILD),
        str(script),
        str(os.getpid()),
        str(watched),
        str(-1 if memory is None else memory),
    ]
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=seconds,
            pass_fds=(watched,),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FreshError(f"it did not finish in {seconds:.0f} s") from None
    finally:
        os.close(watched)
        os.close(held)
    if done.returncode:
        lines = [visible(line) for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        limit = "" if memory is None else f"; it may hold {memory / 2**30:.1f} GiB"
        ended = f"it ended with code {done.returncode}{limit}"
        raise FreshError("\n  ".join([*lines[-SHOWN_LINES:], ended]))
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result
