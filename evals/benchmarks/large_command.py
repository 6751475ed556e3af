"""`retrofit convert --method mean` on a random checkpoint beside `cp -r`, by number of threads.

Unlike `evals.benchmarks.large`, this times the whole command as a person types it: imports, the check of every weight,
digests of source and result, and the conversion. Copy and conversion take turns; the page cache holds the source.

    python -m evals.benchmarks.large_command [--layers 11] [--threads 1 2] [--rounds 3] [--place DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from evals.benchmarks import large

NAME = "large-command"
IMPORTS = "retrofit.workflow.command, retrofit.kv_heads.convert, transformers.modeling_utils"


def timed(command: list[str], threads: int) -> tuple[float, float]:
    """Seconds of a process with so many threads: on the clock, and of processors."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def measure(place: Path, threads: list[int], rounds: int) -> dict[str, Any]:
    """Seconds by round: of a copy, and of the command with each number of threads."""
    source, out = place / "source", place / "out"
    large.make(source)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    convert = [sys.executable, "-m", "retrofit", "convert", str(source), "--kv-heads", str(large.KV_HEADS)]
    convert += ["--method", "mean", "--out", str(out)]
    commands = {"cp -r": (["cp", "-r", str(source), str(out)], 1)}
    commands |= {f"mean, {count} threads": (convert, count) for count in threads}
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    starting = timed(
        [
            sys.executable,
            "-c",
            "import retrofit.workflow.command, retrofit.kv_heads.convert, transformers.modeling_utils",
        ],
        1,
    )
    for round_ in range(rounds + 1):  # the first is not counted
        for name, (command, count) in commands.items():
            os.sync()
            seconds = timed(command, count)
            shutil.rmtree(out)
            if round_:
                rows[name].append(seconds)
    return {"bytes": nbytes, "seconds": rows, "starting": starting}


def markdown(result: dict[str, Any], machine: dict[str, Any], command: str) -> str:
    """The result as a table."""
    rows = result["seconds"]
    lines = [
        "# The whole command on a large checkpoint",
        "",
        f"`{command}` on {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python "
        f"{machine['python']}, torch {machine['torch']}, {time.strftime('%Y-%m-%d')}; load average of the machine "
        f"{machine['load']}: other work shared its cores.",
        "",
        f"A random checkpoint of {result['bytes'] / 1e9:.2f} GB in the page cache. The conversion is the command as "
        f"typed: imports ({result['starting'][0]:.1f} s alone, {result['starting'][1]:.1f} s of a processor), every "
        "weight checked, source and result hashed, files waited for until they are on the disk, which `cp -r` does "
        "not do.",
        "",
        "| | median, s | rounds, s | seconds of processors | times `cp -r` |",
        "|---|---:|---|---:|---:|",
    ]
    copy = statistics.median(wall for wall, _ in rows["cp -r"])
    for name, rounds in rows.items():
        median, busy = statistics.median(wall for wall, _ in rounds), statistics.median(cpu for _, cpu in rounds)
        each = ", ".join(f"{wall:.1f}" for wall, _ in rounds)
        lines.append(f"| {name} | {median:.1f} | {each} | {busy:.1f} | {median / copy:.1f} |")
    worked = [
        f"{statistics.median(cpu for _, cpu in rounds) - (name != 'cp -r') * result['starting'][1]:.1f} s for `{name}`"
        for name, rounds in rows.items()
    ]
    lines += [
        "",
        f"Seconds of processors without the imports, which other work does not lengthen: {', '.join(worked)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, help="folder for the checkpoints; default: a temporary one")
    parser.add_argument("--out", type=Path, default=large.RESULTS)
    options = parser.parse_args()
    from evals.benchmarks.scoring import machine

    large.CONFIG["num_hidden_layers"] = options.layers
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        result = measure(Path(place), options.threads, options.rounds)
    command = " ".join(["python -m evals.benchmarks.large_command", *sys.argv[1:]])
    text = markdown(result, {**machine(1), "load": load}, command)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
