"""Tasks of lm-evaluation-harness in a run and in `retrofit evaluate`: each task of each model is kept for itself."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.evaluation.tasks.answers import TaskAnswers, answers_file, changes, from_file, to_file
from retrofit.evaluation.tasks.harness import Asked, Harness, ask
from retrofit.model.load import load_config
from retrofit.recipe.schema import Evaluate
from retrofit.workflow import operations

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.workflow.runner import Runner, State


def ask_run(runner: Runner, states: Mapping[str, State], section: Evaluate) -> dict[str, dict[str, TaskAnswers]]:
    """Ask every model of a run every task that is not done. Returns answers by model and task, {} without tasks."""
    harness, prepared = runner.prepared.harness, runner.prepared
    if harness is None:
        return {}
    answers: dict[str, dict[str, TaskAnswers]] = {label: {} for label in states}
    for label, state in states.items():
        reader = _Reader(state.path, section, prepared.recipe.kernel, prepared.device, prepared.plan.positions[0])
        for asked in harness.tasks:
            config = {
                **key_of(harness, asked, section),
                "kernel": prepared.kernel.name,
                "device": prepared.device,
                "length": reader.length,
            }

            def work(path: Path, asked: Asked = asked, reader: _Reader = reader) -> Mapping[str, Any]:
                found = reader.ask(harness, asked, runner.progress)
                to_file({asked.name: found}, path)
                return {"scores": [asdict(row) for row in found.rows()]}

            file = answers_file(runner.folder, label, asked.name)
            runner.step(
                f"evaluate:{label}:{asked.name}",
                str(file.relative_to(runner.folder)),
                config,
                {"checkpoint": state.identity},
                work,
            )
            answers[label] |= from_file(file)
        reader.close()
    return answers


def ask_folder(
    folder: Path,
    harness: Harness,
    section: Evaluate,
    *,
    kernel: str,
    device: str,
    length: int,
    identity: Mapping[str, str],
    partial: Path | None,
    progress: Progress | None,
) -> dict[str, TaskAnswers]:
    """Ask a checkpoint folder every task. identity: its digests. partial: where finished tasks are kept meanwhile."""
    reader = _Reader(folder, section, kernel, device, length)
    found: dict[str, TaskAnswers] = {}
    for asked in harness.tasks:
        about = [key_of(harness, asked, section), kernel, device, length, dict(identity)]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        file = answers_file(partial, "model", asked.name) if partial else None
        kept = from_file(file).get(asked.name) if file and file.is_file() else None
        if kept is not None and kept.key == key:
            found[asked.name] = kept
            if progress:
                progress.note(f"task {asked.name}: done before, kept")
            continue
        found[asked.name] = replace(reader.ask(harness, asked, progress), key=key)
        if file:
            to_file({asked.name: found[asked.name]}, file)
    reader.close()
    return found


def key_of(harness: Harness, asked: Asked, section: Evaluate) -> dict[str, Any]:
    """What decides about the answers beside the model."""
    assert section.tasks
    how = section.tasks.model_dump(mode="json", include={"fewshot", "limit", "batch_size"})
    return {**how, "task": asked.name, "digest": asked.digest, "harness": harness.version, "dtype": section.dtype}


def shown(answers: Mapping[str, Mapping[str, TaskAnswers]], section: Evaluate, seed: int) -> dict[str, Any]:
    """For the result of a run: {"scores": {label: rows}, "changes": {label: rows against the first model}}."""
    labels = list(answers)
    first = answers[labels[0]] if labels else {}
    return {
        "scores": {label: [row for one in found.values() for row in one.rows()] for label, found in answers.items()},
        "changes": {
            label: [
                row
                for name, one in answers[label].items()
                for row in changes(first[name], one, resamples=section.resamples, seed=seed)
            ]
            for label in labels[1:]
        },
    }


class _Reader:
    """A checkpoint folder that is loaded when the first task is asked, and given back by `close`."""

    def __init__(self, folder: Path, section: Evaluate, kernel: str, device: str, length: int) -> None:
        self.section = section
        self.length = min(length, load_config(folder).get_text_config().max_position_embeddings)
        self._load: Callable[[], Any] = lambda: operations.ready(folder, section, kernel, device)
        self._loaded: Any = None

    def ask(self, harness: Harness, asked: Asked, progress: Progress | None) -> TaskAnswers:
        assert self.section.tasks
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer, _ = self._loaded
        return ask(
            harness,
            asked,
            model,
            tokenizer,
            self.section.tasks,
            length=self.length,
            resamples=self.section.resamples,
            progress=progress,
        )

    def close(self) -> None:
        self._loaded = None
        gc.collect()
