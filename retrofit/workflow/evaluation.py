"""The evaluate step: token losses of every model of the run on the same documents, and the numbers made from them.

The losses of each model are a piece of their own in the journal: a changed recovery does not score the original again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrofit.checkpoint.staging import staged
from retrofit.console import jsonable
from retrofit.data.documents import Document, documents_digest
from retrofit.evaluation.long_context import NATIVE, conclude, passes_of
from retrofit.evaluation.metrics.context_use import LongContext
from retrofit.evaluation.metrics.effective import short_context
from retrofit.evaluation.metrics.perplexity import table
from retrofit.evaluation.metrics.required import metrics
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.reader import varying
from retrofit.evaluation.tasks.answers import TaskAnswers
from retrofit.model.load import load_config
from retrofit.recipe.schema import Evaluate
from retrofit.workflow import operations
from retrofit.workflow.plan import FOLDERS
from retrofit.workflow.runner import Runner, State
from retrofit.workflow.tasks import ask_run, shown

LOSSES = "losses"
METRICS = "metrics.json"


def evaluate(runner: Runner, states: Mapping[str, State], section: Evaluate) -> Mapping[str, Any]:
    """Score every model of the run. states: by label, the original first. Returns the result of the step:

    {"models": {label: {"rows", "kernel", "cost", "long_context", "kv_bytes_per_token", ...}}, "proof": ...,
    "metrics": {...}, "short_context": {label: rows of what it lost against the original within the native length},
    "tasks": {"scores": {label: rows}, "changes": {label: rows against the original}}}
    """
    documents = runner.prepared.documents
    scored = {label: _score(runner, label, state, section, documents) for label, state in states.items()}
    answers = ask_run(runner, states, section)
    *_, last = states.values()

    def work(path: Path) -> Mapping[str, Any]:
        result = _summary(runner, states, section, scored, answers)
        with staged(path, overwrite=True) as folder:
            (folder / METRICS).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return result

    config = {
        **section.model_dump(mode="json"),
        "kernel": runner.prepared.kernel.name,
        "seed": runner.prepared.recipe.seed,
        "window": runner.prepared.plan.positions[1],
    }
    inputs = {
        "losses": {label: runner.entries[f"evaluate:{label}"].digests for label in states},
        "checkpoint": last.identity,
        "documents": documents_digest(documents),
        "tasks": [
            runner.entries[f"evaluate:{label}:{task}"].digests for label, found in answers.items() for task in found
        ],
    }
    return runner.step("evaluate", FOLDERS["evaluate"], config, inputs, work).result


def losses_file(folder: Path, label: str) -> Path:
    """Where a run keeps the token losses of one of its models."""
    return folder / LOSSES / f"{label}.npz"


def _score(
    runner: Runner, label: str, state: State, section: Evaluate, documents: Sequence[Document]
) -> Mapping[str, Any]:
    prepared = runner.prepared

    def work(path: Path) -> Mapping[str, Any]:
        losses, kernel, measured = operations.score_folder(
            state.path,
            documents,
            section,
            label=label,
            kernel=prepared.recipe.kernel,
            device=prepared.device,
            native=native,
            seed=prepared.recipe.seed,
            continuation_tokens=section.continuation_tokens,
            identity=state.identity,
            partial=partial,
            progress=runner.progress,
        )
        save_losses(losses, path)
        for name, scored in measured.passes.items():
            save_losses(scored, pass_file(path, name))
        answers = {"defined": measured.defined, "needle": measured.needle, "ruler": measured.ruler}
        return {**kernel, "answers": jsonable(answers), "continuations": jsonable(measured.continuations)}

    native = prepared.plan.positions[0]
    config = {
        "chunk": section.chunk,
        "continuation_tokens": section.continuation_tokens,
        "dtype": section.dtype,
        "kernel": prepared.kernel.name,
        "kernel_asked_for": prepared.kernel.requested != "auto",
        "device": prepared.device,
        **_further_reading(section, native, prepared.recipe.seed, varying(load_config(state.path)) is not None),
    }
    inputs = {"checkpoint": state.identity, "documents": documents_digest(documents)}
    file = f"{LOSSES}/{label}.npz"
    also = tuple(str(pass_file(Path(file), name)) for name in passes_of(section, native))
    scratch = f"{file}.scored"
    partial = runner.folder / scratch
    entry = runner.step(f"evaluate:{label}", file, config, inputs, work, also=also, scratch=(scratch,))
    runner.drop(scratch)  # not before the journal knows of the losses
    return entry.result


def _further_reading(section: Evaluate, native: int, seed: int, varies: bool) -> dict[str, object]:
    """What decides what is read besides whole documents; empty when nothing is.

    varies: the position encoding changes with the length, so that each is a pass of its own.
    """
    found: dict[str, object] = {"lengths": section.lengths} if varies or section.definitions else {}
    if passes_of(section, native):
        found |= {"passes": passes_of(section, native), "native": native}
    if NATIVE in passes_of(section, native):
        found |= {"ends": [n for n in section.lengths if n > native], "tail": section.tail}
    if section.definitions:
        found |= {"definitions": section.definitions, "stride": section.stride}
    if section.needle or section.ruler:
        found |= {**section.model_dump(mode="json", include={"needle", "ruler"}), "seed": seed}
    return found


def pass_file(losses: Path, name: str) -> Path:
    """Where the losses of the same documents with another context lie: `original.native.npz` beside `original.npz`."""
    return losses.with_name(f"{losses.stem}.{name}.npz")


def save_losses(losses: TokenLosses, path: Path) -> None:
    """Write token losses so that a kill leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    losses.save(partial)
    partial.replace(path)


def _conclusion(
    runner: Runner, label: str, losses: Mapping[str, TokenLosses], section: Evaluate, answers: Mapping[str, Any]
) -> LongContext:
    """What the stored arrays and answers of one model say about its use of context."""
    native = runner.prepared.plan.positions[0]

    def further(label: str) -> dict[str, TokenLosses]:
        file = losses_file(runner.folder, label)
        return {name: TokenLosses.load(pass_file(file, name)) for name in passes_of(section, native)}

    first = next(iter(losses))
    before = further(first).get(NATIVE)
    needle = answers["needle"]
    scores = {int(length): score for length, score in needle["scores"].items()} if needle else None
    return conclude(
        losses[label],
        further(label),
        section,
        native,
        needle=scores,
        original=None if before is None else (losses[first], before),
        seed=runner.prepared.recipe.seed,
    )


def _summary(
    runner: Runner,
    states: Mapping[str, State],
    section: Evaluate,
    scored: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Mapping[str, TaskAnswers]],
) -> dict[str, Any]:
    prepared = runner.prepared
    losses = {label: TokenLosses.load(losses_file(runner.folder, label)) for label in states}
    seed = prepared.recipe.seed
    costs = operations.run_costs(
        {label: state.path for label, state in states.items()},
        section,
        kernel=prepared.recipe.kernel,
        device=prepared.device,
        seed=seed,
    )
    models: dict[str, Any] = {}
    for label, state in states.items():
        rows = table(losses[label], section.lengths, tail=section.tail, resamples=section.resamples, seed=seed)
        per_token, by_length, heads = operations.kv_bytes(state.path, (*section.lengths, prepared.plan.positions[1]))
        models[label] = {
            "rows": [asdict(row) for row in rows],
            "kv_heads": heads,
            "kv_bytes_per_token": per_token,
            "kv_cache_bytes": by_length,
            "cost": costs[label],
            "long_context": {
                **operations.facts(_conclusion(runner, label, losses, section, scored[label]["answers"])),
                **scored[label]["answers"],
            },
            **{key: value for key, value in scored[label].items() if key != "answers"},
        }
    *_, last = states.values()
    proof = operations.prove_kernel(
        last.path, prepared.documents[0], kernel=prepared.recipe.kernel, device=prepared.device
    )
    first, *_, final = (*models.values(), *models.values())
    numbers = metrics(
        losses,
        section.lengths,
        section.tail,
        kv_bytes=(first["kv_bytes_per_token"], final["kv_bytes_per_token"]),
        kernel_max_diff=proof.max_difference,
        effective_length=(final["long_context"]["effective"] or {}).get("length"),
        tasks=list(answers.values()),
    )
    original, native = losses[next(iter(states))], prepared.plan.positions[0]
    regressions = {
        label: short_context(original, scored, section.lengths, native, resamples=section.resamples, seed=seed)
        for label, scored in losses.items()
        if scored is not original
    }
    result = jsonable(
        {
            "models": models,
            "proof": proof,
            "metrics": numbers,
            "short_context": regressions,
            "tasks": shown(answers, section, seed),
        }
    )
    assert isinstance(result, dict)
    return result
