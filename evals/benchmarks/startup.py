"""How long `retrofit --help` takes, in seconds and in times an empty Python. Writes results/startup.md.

python -m evals.benchmarks.startup
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
REPEATS = 15
LIMIT = 0.5
EMPTY = "python -c pass"
PROGRAMS = {
    EMPTY: [sys.executable, "-c", "pass"],
    "retrofit --help": [sys.executable, "-m", "retrofit", "--help"],
    "retrofit run --help": [sys.executable, "-m", "retrofit", "run", "--help"],
    "retrofit recipes list": [sys.executable, "-m", "retrofit", "recipes", "list"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def seconds(command: list[str]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure, write the table, and fail when help is slower than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of each command")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for command in PROGRAMS.values():
        seconds(command)  # the first run reads files that later ones find in memory
    # Taken in turns, so that a busy machine is unfair to none.
    rounds = [{name: seconds(command) for name, command in PROGRAMS.items()} for _ in range(options.repeats)]
    lines = [
        "# Start-up",
        "",
        f"`python -m evals.benchmarks.startup`, Python {platform.python_version()} on {platform.machine()}, "
        f"{options.repeats} runs each, in turns. The ratio is the median over the turns of a command's time by that of "
        f"`{EMPTY}` in the same turn.",
        "",
        "| command | median (s) | fastest (s) | slowest (s) | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in PROGRAMS:
        times = [one[name] for one in rounds]
        ratio = statistics.median(one[name] / one[EMPTY] for one in rounds)
        lines.append(
            f"| `{name}` | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} | {ratio:.1f} |"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "startup.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    median = statistics.median(one["retrofit --help"] for one in rounds)
    if median > LIMIT:
        sys.exit(f"retrofit --help takes {median:.2f} s, and {LIMIT} s were promised")


if __name__ == "__main__":
    main()
