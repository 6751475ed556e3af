"""A folder tried in the engines that people serve it with: its recorded documents, scored past its original window.

What an engine gives is compared with transformers in float32, and with a control: the same folder with its scaling
ignored (its base, where it has none). An engine that cannot load the folder is an error with the engine's message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.checkpoint.staging import beside
from retrofit.context.engines import releases
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.publishing.engines.compare import Distance, distance
from retrofit.publishing.engines.controls import controls_of
from retrofit.publishing.engines.converter import convert
from retrofit.publishing.engines.environments import CONVERTER, Environment, find, require
from retrofit.publishing.engines.run import Passage, Request, Scored, engine_of, score

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from retrofit.console import Progress
    from retrofit.data.documents import Document
    from retrofit.model.spec import AttentionSpec

BEYOND = 256
"""Tokens past the original window that are scored by default."""
DOCUMENTS = 2
ENDS, SPREAD = 8, 8
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class EngineTrial:
    """What one engine gave for one folder.

    largest, mean: |difference of log-probabilities| from transformers, in nats; greedy: share of positions with the
    same most probable token; control: the largest difference of a model with its `control_name`. notes: how the engine
    has to be started, and whether its release is one that the table of engines knows.
    """

    engine: str
    version: str
    largest: float
    mean: float
    greedy: float
    positions: int
    tokens: int
    control: float
    control_name: str
    reference: str
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """What `require` calls the largest difference."""
        return f"engine@{self.engine}"


def environments_of(engine: str) -> tuple[str, ...]:
    """Names of the environments that an engine needs."""
    return (engine, CONVERTER) if engine == "llama.cpp" else (engine,)


def require_engines(names: Sequence[str], *, make: bool, command: str) -> None:
    """UserError where an engine is not there and none is to be made. command: with which one is made. Makes nothing."""
    for name in (needed for engine in names for needed in environments_of(engine)):
        if not make:
            require(name, make=False, command=command)


def try_engines(
    folder: Path,
    names: Sequence[str],
    documents: Sequence[Document],
    *,
    config: PretrainedConfig,
    spec: AttentionSpec,
    original: int,
    tokens: int | None = None,
    make: bool = False,
    progress: Progress | None = None,
) -> tuple[EngineTrial, ...]:
    """Score the longest documents in each engine. original: the window before any extension; tokens: of a document, by
    default `BEYOND` more than that. make: environments are made where there are none.

    Raises UserError for an engine that is not there, and for one that cannot load the folder.
    """
    window = int(spec.max_position_embeddings)
    passages = passages_of(documents, original, window, tokens)
    environments = {name: [_environment(one, make, progress) for one in environments_of(name)] for name in names}
    needs = spec.kv_cache_bytes(1 + max(len(one.input_ids) for one in passages), 4)
    request = Request(folder, passages, window, cache_bytes=CACHE_BYTES + 2 * needs)
    if progress:
        progress.start("score in transformers, and the controls", None, "")
    controls = controls_of(config.get_text_config())
    here = Environment("transformers", _environment("transformers", False, None).python, False)
    asked = [Request(folder, passages, window, None, over) for over in ({}, *controls.values())]
    reference, *others = score(here, asked)
    for one in (reference, *others):
        if one.error is not None:
            raise _refused(folder, "transformers", one)
    far = {name: distance(reference.rows, one.rows) for name, one in zip(controls, others, strict=True)}
    nearest = min(far, key=lambda name: far[name].largest)
    read = max(len(one.input_ids) for one in passages)
    within = [f"within the original context length alone, {read:,} tokens"] if read <= original < window else []
    trials = []
    for name, found in environments.items():
        if progress:
            progress.start(f"score in {name}", None, "")
        scored = _scored(folder, request, name, found)
        trials.append(_trial(name, scored, reference, passages, (nearest, far[nearest]), within))
    if progress:
        progress.finish()
        for trial in trials:
            for note in trial.notes:
                progress.note(f"{trial.engine} {trial.version}: {note}")
    return tuple(trials)


def metrics_of(trials: Sequence[EngineTrial]) -> Mapping[str, float]:
    """The largest differences, under the names that `require` has for them."""
    return {trial.metric: trial.largest for trial in trials}


def passages_of(
    documents: Sequence[Document], original: int, window: int, tokens: int | None = None
) -> tuple[Passage, ...]:
    """The longest documents up to so many tokens; positions at their first and last tokens, around the end of the
    original window, and spread between. Nothing is scored at the last position of the window: engines need room for
    the token that follows."""
    most = min(window - 1, tokens or original + BEYOND)
    longest = sorted(documents, key=lambda one: -len(one.input_ids))[:DOCUMENTS]
    found = []
    for document in longest:
        ids = tuple(document.input_ids[:most].tolist())
        last = len(ids) - 1
        spread = {round(last * part / SPREAD) for part in range(SPREAD)}
        at = {*range(ENDS), original - 1, original, original + 1, *spread, *range(last - ENDS + 1, last + 1)}
        found.append(Passage(ids, tuple(sorted(position for position in at if 0 <= position <= last))))
    return tuple(found)


def _scored(folder: Path, request: Request, name: str, environments: Sequence[Environment]) -> Scored:
    environment, *converter = environments
    if not converter:
        [scored] = score(environment, [request])
    else:
        with beside(folder, "gguf") as place:
            path = place / "model.gguf"
            convert(folder, path, "f32", environment=converter[0], name=folder.name)
            [scored] = score(environment, [_at(request, path)])
    if scored.error is not None:
        raise _refused(folder, name, scored)
    return scored


def _at(request: Request, path: Path) -> Request:
    return Request(path, request.passages, request.window, cache_bytes=request.cache_bytes)


def _trial(
    name: str,
    scored: Scored,
    reference: Scored,
    passages: Sequence[Passage],
    control: tuple[str, Distance],
    more: Sequence[str],
) -> EngineTrial:
    far = distance(reference.rows, scored.rows)
    known = [version for engine, version in releases() if engine == engine_of(name)]
    notes = [*([scored.note] if scored.note else []), *more]
    if scored.version not in known:
        notes.append(f"the table of engines knows {', '.join(known) or 'no release of it'}, not this one")
    return EngineTrial(
        engine=name,
        version=scored.version,
        largest=far.largest if math.isfinite(far.largest) else math.inf,
        mean=far.mean,
        greedy=far.greedy,
        positions=far.positions,
        tokens=max(len(one.input_ids) for one in passages),
        control=control[1].largest,
        control_name=control[0],
        reference=reference.version,
        notes=tuple(notes),
    )


def _environment(name: str, make: bool, progress: Progress | None) -> Environment:
    return find(name) or require(name, make=make, command="add --make-environment", progress=progress)


def _refused(folder: Path, name: str, scored: Scored) -> UserError:
    return UserError(
        f"{name} {scored.version} cannot load and score this folder: {shown(scored.error)}",
        where=shown(folder),
        fix="retrofit inspect says which engines compute such a model, and with which method",
    )
