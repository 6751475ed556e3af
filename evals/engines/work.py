"""The work folder of the matrix: checkpoints, references and rows, each made once and used again until it changes.

WORK/made/           models that cases are made of
WORK/cases/NAME/     the checkpoint of a case; NAME.error where none can be written
WORK/reference/      log-probabilities by transformers, and how far each control is from them
WORK/rows/ENGINE/    what one engine gave for one case
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.engines.cases import Case, build, controls, passage, window_of
from retrofit.checkpoint.provenance import digest
from retrofit.console import Progress
from retrofit.errors import UserError
from retrofit.publishing.engines.compare import Distance, distance, tells
from retrofit.publishing.engines.converter import Conversion, convert_all
from retrofit.publishing.engines.environments import Environment
from retrofit.publishing.engines.run import Request, Rows, Scored, score

AT_ONCE = 60
"""Requests of one process: what a kill loses."""
TO_GGUF = Path(__file__).with_name("to_gguf.py")
CACHE_BYTES = 1 << 30
"""What vLLM may take for its cache: enough for the real model's passage in float32."""
MAX_MESSAGE = 200
NEAR = 0.01
"""Nats: an engine that computes the same function in float32 is no further away."""


@dataclass(frozen=True)
class Reference:
    """What transformers computes here, and how far each control is from it."""

    rows: Rows
    controls: dict[str, Rows]
    version: str

    @property
    def control(self) -> float:
        """The nearest control: what it differs by shows that each of them would be seen."""
        return min(distance([self.rows], [rows]).largest for rows in self.controls.values())


class Work:
    """A work folder."""

    def __init__(self, root: Path, progress: Progress) -> None:
        self.root, self.progress = root, progress
        for name in ("made", "cases", "reference", "rows"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def folder(self, case: Case) -> Path:
        """The checkpoint of a case."""
        return self.root / "cases" / case.name

    def made(self, case: Case) -> str | None:
        """Write the checkpoint where it is not there; the reason where it cannot be written."""
        folder, refused = self.folder(case), self.root / "cases" / f"{case.name}.error"
        if refused.is_file():
            return refused.read_text()
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                build(case, folder, self.root / "made")
            except UserError as error:
                shutil.rmtree(folder, ignore_errors=True)
                refused.write_text(error.what)
                return error.what
        return None

    def references(self, cases: Sequence[Case], here: Environment) -> dict[Case, Reference]:
        """Of every case, computed where they are not kept."""
        missing = [case for case in cases if not self._reference(case).is_file()]
        for some in _batches(missing):
            asked = [
                (case, name, over) for case in some for name, over in [("", {}), *controls(self.folder(case)).items()]
            ]
            requests = [
                Request(self.folder(case), (passage(self.folder(case)),), window_of(self.folder(case)), None, over)
                for case, _, over in asked
            ]
            found = score(here, requests)
            for case in some:
                mine = {name: one for (other, name, _), one in zip(asked, found, strict=True) if other == case}
                errors = [one.error for one in mine.values() if one.error]
                assert not errors, f"{case.name}: {errors[0]}"
                self._keep(case, {name: one.rows[0] for name, one in mine.items()}, found[0].version)
        return {case: self._kept(case) for case in cases}

    def _reference(self, case: Case) -> Path:
        return self.root / "reference" / f"{case.name}-{self.key(case)}.npz"

    def key(self, case: Case) -> str:
        """Of the files of a case."""
        import hashlib

        found = digest(self.folder(case), everything=True)
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:10]

    def _keep(self, case: Case, rows: dict[str, Rows], version: str) -> None:
        arrays = {f"{name}|logprobs": one.logprobs for name, one in rows.items()}
        arrays |= {f"{name}|greedy": np.asarray(one.greedy) for name, one in rows.items()}
        np.savez(self._reference(case), version=version, **arrays)

    def _kept(self, case: Case) -> Reference:
        with np.load(self._reference(case)) as arrays:
            names = [name.removesuffix("|logprobs") for name in arrays.files if name.endswith("|logprobs")]
            rows = {
                name: Rows(None, arrays[f"{name}|logprobs"], tuple(arrays[f"{name}|greedy"].tolist())) for name in names
            }
            version = str(arrays["version"])
        return Reference(rows.pop(""), rows, version)

    def rows(
        self, name: str, cases: Sequence[Case], environments: Sequence[Environment], references: dict[Case, Reference]
    ) -> Iterator[dict[str, Any]]:
        """What the engine of an environment gives for every case, as rows of the table. environments: its own, and the
        converter's for llama.cpp."""
        place = self.root / "rows" / name
        place.mkdir(exist_ok=True)
        files = {case: place / f"{case.name}-{self.key(case)}.json" for case in cases}
        missing = [case for case in cases if not files[case].is_file()]
        self.progress.start(f"run {name}", len(missing), "checkpoints")
        for some in _batches(missing):
            for case, row in zip(some, self._tried(some, environments, references), strict=True):
                files[case].write_text(json.dumps(row))
            self.progress.advance(len(some))
        self.progress.finish()
        for case in cases:
            yield {**asdict(case), **_judged(json.loads(files[case].read_text()))}

    def _tried(
        self, cases: Sequence[Case], environments: Sequence[Environment], references: dict[Case, Reference]
    ) -> Iterator[dict[str, Any]]:
        for case, found in zip(cases, self._scored(cases, environments), strict=True):
            yield {"version": found.version, **measured(found, references[case])}

    def _scored(self, cases: Sequence[Case], environments: Sequence[Environment]) -> list[Scored]:
        environment, *converter = environments
        refused: dict[Case, str] = {}
        paths = {case: self.folder(case) for case in cases}
        if converter:
            paths = {case: self.root / "rows" / f"{case.name}.gguf" for case in cases}
            # llama.cpp looks up tokens of Phi-3's vocabulary where a model's name has `phi3` in it.
            files = [Conversion(self.folder(case), paths[case], "f32", "tiny") for case in cases]
            errors = convert_all(files, environment=converter[0], program=TO_GGUF)
            refused = {case: error for case, error in zip(cases, errors, strict=True) if error is not None}
        left = [case for case in cases if case not in refused]
        found = dict(zip(left, self._each(left, paths, environment), strict=True))
        version = next((one.version for one in found.values() if one.version), "")
        for path in paths.values():
            if path.suffix == ".gguf":
                path.unlink(missing_ok=True)
        return [
            Scored(version, error=f"the converter: {refused[case]}") if case in refused else found[case]
            for case in cases
        ]

    def _each(self, cases: Sequence[Case], paths: dict[Case, Path], environment: Environment) -> list[Scored]:
        """In one process; one by one where that died, so that the others have a result."""
        requests = [
            Request(paths[case], (passage(self.folder(case)),), window_of(self.folder(case)), cache_bytes=CACHE_BYTES)
            for case in cases
        ]
        if not requests:
            return []
        try:
            return score(environment, requests)
        except UserError as error:
            if len(cases) == 1:
                return [Scored("", error=error.what.splitlines()[-2].strip())]
            return [found for case in cases for found in self._each([case], paths, environment)]


def measured(found: Scored, reference: Reference) -> dict[str, Any]:
    """What is kept of one engine and case: the message of an error, or how far the engine is."""
    empty = dict.fromkeys(("difference", "mean", "greedy"))
    if found.error is not None:
        return {**empty, "control": _digits(reference.control), "message": _here(found.error)}
    far = distance([reference.rows], found.rows)
    if not math.isfinite(far.largest):
        return {**empty, "control": _digits(reference.control), "message": "a log-probability is not a finite number"}
    return {
        "difference": _digits(far.largest),
        "mean": _digits(far.mean),
        "greedy": _digits(far.greedy),
        "control": _digits(reference.control),
        "message": found.note or _computed(found, far, reference),
    }


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its verdict."""
    difference = row["difference"]
    if difference is None:
        return {**row, "verdict": "error"}
    if difference > NEAR:
        return {**row, "verdict": "differs"}
    return {**row, "verdict": "same" if tells(difference, row["control"]) else "proves nothing"}


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def _here(message: str) -> str:
    """A message without this machine's folders, addresses of objects and a library's advice."""
    message = re.sub(r"(/[\w.+-]+)+/", "", re.sub(r" at 0x[0-9a-f]+", "", message))
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"


def _computed(found: Scored, far: Distance, reference: Reference) -> str:
    """Which control the engine computes, where it is one of them."""
    for name, rows in reference.controls.items():
        near = distance([rows], found.rows).largest
        if near < NEAR and tells(near, far.largest):
            return name
    return ""


def _batches(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    for start in range(0, len(cases), AT_ONCE):
        yield cases[start : start + AT_ONCE]
