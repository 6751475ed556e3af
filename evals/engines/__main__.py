"""Which engines compute what transformers computes, from checkpoints of every family and method.

    OMP_NUM_THREADS=1 python -m evals.engines

Makes an environment for every engine, the checkpoints, and runs each engine on each; writes results/engines.json and
.md. What --work holds is used again where the checkpoint is the same. --engine NAME (repeatable) runs some alone: the
rows of the others stay as they are in engines.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from evals.engines.cases import REAL, Case, cases
from evals.engines.table import COMMAND, render
from evals.engines.work import Work
from retrofit.console import PlainProgress
from retrofit.publishing.engines.environments import CONVERTER, Environment, made, require
from retrofit.publishing.engines.run import engine_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
ENGINES = (
    "transformers-4.51",
    "transformers-4.57",
    "transformers-5.9",
    "transformers-5.24",
    "vllm",
    "llama.cpp",
    "mlx",
    "ctranslate2",
)
REAL_IN = ("transformers-4.57", "vllm", "llama.cpp")
"""Engines that score the real model as well, which takes a minute in each. (mlx-lm on a CPU: not in 13 minutes.)"""


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="repeatable; all by default")
    parser.add_argument("--work", type=Path, default=Path("build/engines"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    progress = PlainProgress(sys.stderr)
    chosen = options.engine or ENGINES
    environments = {
        name: [made(one, progress=progress) for one in (name, *([CONVERTER] if name == "llama.cpp" else []))]
        for name in chosen
    }
    work = Work(options.work, progress)
    possible = [case for case in cases() if work.made(case) is None]
    here = require("transformers", make=False, command="")
    references = work.references(possible, here)
    path = options.out / "engines.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows: list[dict[str, Any]] = []
    for name in ENGINES:
        if name in environments:
            rows += _rows(work, name, environments[name], possible, references)
        else:
            rows += [row for row in before if row["environment"] == name]
    version = next(iter(references.values())).version
    table = {"command": COMMAND, "reference": version, "rows": rows}
    path.write_text(as_lines(table), encoding="utf-8")
    (options.out / "engines.md").write_text(render(table), encoding="utf-8")


def as_lines(table: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in table["rows"])
    head = json.dumps({key: value for key, value in table.items() if key != "rows"})
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def _rows(
    work: Work, name: str, environments: list[Environment], every: list[Case], references: dict[Case, Any]
) -> list[dict[str, Any]]:
    tried = [case for case in every if case.source != REAL or name in REAL_IN]
    found = list(work.rows(name, tried, environments, references))
    version = next(row["version"] for row in found if row["version"])  # of those whose process died too
    return [{"engine": engine_of(name), "environment": name, **row, "version": version} for row in found]


if __name__ == "__main__":
    main()
