"""What makes a folder one that can be published: a card, the proof in a fresh process, and a record of both. For the
`final/` of a run, and for a folder that is certified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.provenance import digest, versions
from retrofit.console import jsonable
from retrofit.evaluation.result import EvaluationResult
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.model.folder import ModelFolder
from retrofit.publishing.card import render_card
from retrofit.publishing.card_input import CardInput
from retrofit.publishing.engines.trial import EngineTrial, try_engines
from retrofit.publishing.gate import GateResult
from retrofit.publishing.reload import ReloadReport, reload_and_score, tolerance_of
from retrofit.recipe.schema import Publish
from retrofit.report.data import RunData
from retrofit.workflow.artifact import Artifact
from retrofit.workflow.card import Changes, card_input
from retrofit.workflow.gguf import write_gguf
from retrofit.workflow.public import public_recipe, public_texts

if TYPE_CHECKING:
    from retrofit.workflow.context import ModelContext


@dataclass(frozen=True)
class Proven:
    """What a card says, its text, what the fresh process found that ran its lines, and what other engines gave."""

    card: CardInput
    text: str
    reload: ReloadReport
    engines: tuple[EngineTrial, ...] = ()


def prove(
    context: ModelContext,
    artifact: Artifact,
    folder: Path,
    section: Publish,
    data: RunData,
    changes: Changes,
    losses: TokenLosses,
    *,
    chart: str | None = None,
) -> Proven:
    """Make the card of `folder`, a copy of `artifact` or itself, load the folder in a fresh process, and try it in the
    engines of `section`. losses: of it.

    Nothing is written. Raises UserError for a value that the card lacks, where the losses are not reproduced, and for
    an engine that cannot load the folder.
    """
    allowed = tolerance_of(str(losses.meta.get("dtype")))
    card = card_input(context, artifact, folder, section, data, changes, allowed, chart=chart)
    render_card(card)  # what it lacks is reported before the work
    reload = reload_and_score(
        folder,
        context.documents,
        losses,
        tokens=section.reload_tokens,
        snippet=card.snippet,
        progress=context.progress,
    )
    trials: tuple[EngineTrial, ...] = ()
    if section.engines:
        trials = try_engines(
            folder,
            section.engines,
            context.documents,
            config=artifact.model.config,
            spec=artifact.model.spec,
            original=card.native_length,
            tokens=section.engine_tokens,
            make=section.make_environments,
            progress=context.progress,
        )
        card = replace(card, engines=trials)
    return Proven(card, render_card(card), reload, trials)


def with_gguf(context: ModelContext, folder: Path, section: Publish, proven: Proven, out: Path | None = None) -> Proven:
    """The same with the GGUF files of `folder` that the section asks for, which are written into `out`, by default the
    folder itself, and stand in the card then."""
    if not section.gguf:
        return proven
    report = write_gguf(context, ModelFolder(folder), out or folder, section, proven.card.title)
    card = replace(proven.card, gguf=report)
    return replace(proven, card=card, text=render_card(card))


def record_of(
    context: ModelContext,
    artifact: Artifact,
    folder: Path,
    proven: Proven,
    evaluated: EvaluationResult,
    gate: tuple[GateResult, ...],
) -> Mapping[str, Any]:
    """retrofit.json of the folder, whose other files are all there but the card."""
    reload = {key: value for key, value in asdict(proven.reload).items() if key != "seconds"}
    return {
        "name": proven.card.title,
        "source": artifact.provenance.source,
        "recipe": public_recipe(context.recipe, context.source).model_dump(mode="json"),
        "steps": public_texts(artifact.provenance.steps),
        "metrics": dict(evaluated.metrics),
        "seen": jsonable(evaluated.models[-1].seen),
        "effective_length": jsonable(evaluated.models[-1].effective),
        "gate": jsonable(gate),
        "reload": jsonable(reload),
        **({"engines": jsonable(proven.engines)} if proven.engines else {}),
        **({"gguf": jsonable(proven.card.gguf)} if proven.card.gguf else {}),
        "versions": versions(),
        "files": digest(folder, everything=True),
    }
