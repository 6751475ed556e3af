"""`final/`: the checkpoint that can be published, with its card, proven in a fresh process before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.copying import copy_file
from retrofit.checkpoint.provenance import sha256, write_provenance
from retrofit.checkpoint.side_files import copy_side_files
from retrofit.checkpoint.staging import staged
from retrofit.console import jsonable
from retrofit.data.documents import documents_digest
from retrofit.errors import UserError
from retrofit.evaluation.files import losses_file
from retrofit.evaluation.result import EvaluationResult
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.model.folder import ModelFolder
from retrofit.publishing.card_input import require_usable_identity
from retrofit.publishing.engines.trial import EngineTrial, metrics_of, require_engines
from retrofit.publishing.gate import GateResult, enforce
from retrofit.publishing.gguf.writing import LLAMA_CPP, GgufReport
from retrofit.publishing.reload import ReloadReport, nothing_to_compare
from retrofit.publishing.requirements import snippet_of, terms_of
from retrofit.recipe.schema import Publish as Section
from retrofit.recipe.schema import Recipe
from retrofit.report.charts.figures import card_picture
from retrofit.system.resume import ResumeKey
from retrofit.workflow.artifact import Artifact, from_json
from retrofit.workflow.card import changes_of
from retrofit.workflow.checks import require_within
from retrofit.workflow.engines import check_engines, engine_bytes, engine_seconds
from retrofit.workflow.estimate.cost import BASE_BYTES, Cost, CostModel
from retrofit.workflow.gate import engine_gate, gate_of
from retrofit.workflow.gguf import check_gguf, gguf_bytes, gguf_seconds, published_config
from retrofit.workflow.journal import CARD, FINAL
from retrofit.workflow.proven import Proven, prove, record_of, with_gguf
from retrofit.workflow.reporting import run_data
from retrofit.workflow.step import Inputs, Place, Step

if TYPE_CHECKING:
    from retrofit.workflow.context import ModelContext

CHART = "perplexity.png"


@dataclass(frozen=True)
class PublishReport:
    """What was proven of `final/`. card: sha256 of its card, which people may edit; engines: what others gave; gguf: of
    its files for llama.cpp."""

    gate: tuple[GateResult, ...]
    reload: ReloadReport
    card: str
    engines: tuple[EngineTrial, ...] = ()
    gguf: GgufReport | None = None


class Publish(Step):
    """Write `final/` of a run whose requirements are met."""

    name = "publish"
    version = "3"
    gated = True
    section: Section

    def __init__(self, recipe: Recipe, section: Section) -> None:
        super().__init__(recipe, section)

    def check(self, context: ModelContext) -> Iterable[str]:
        """Every engine knows the architecture, as far as the table of engines says."""
        section = self.section
        if section.engine_tokens is not None:
            require_within(section.engine_tokens, context.claimed, "publish.engine_tokens", extendable=False)
        asked = {"publish.engines": section.engines, "publish.gguf": (LLAMA_CPP,) * bool(section.gguf)}
        for where, names in asked.items():
            if names:
                make = section.make_environments
                yield from check_engines(names, published_config(context), where=where, make=make)

    def check_here(self, context: ModelContext) -> Iterable[str]:
        """The card can be written, and something is measured that a fresh process can measure again."""
        from retrofit.model.frequencies import varying

        recipe, section, source = self.recipe, self.section, context.source
        require_engines(section.engines, make=section.make_environments, command="publish.make_environments: true")
        if recipe.evaluate is None:
            raise UserError(
                "nothing is published without measurements",
                where="publish",
                fix="keep `evaluate`, or add publish: null",
            )
        terms, base = terms_of(section, source), section.base_model or source.base_model
        require_usable_identity(terms.license, base, terms.name, terms.link)
        extension, encoded = recipe.context, context.config
        if extension and not extension.searches:  # what is searched for does not change with the length
            from retrofit.context import rope

            encoded = rope.extend(
                context.config,
                length=extension.length,
                factor=extension.factor,
                method=str(extension.method),
                settings=extension.settings,
                held=context.held_scale(context.model.path),
            )
        varies = varying(encoded.get_text_config())
        if varies and min(recipe.evaluate.lengths) > varies[1]:
            raise nothing_to_compare(*varies)
        missing = {"base model": (base, "--base-model ORG/NAME"), "license": (terms.license, "--license ID")}
        return [
            f"the {what} is not known and is left out of the card; `retrofit publish` asks for it ({option})"
            for what, (value, option) in missing.items()
            if not value
        ]

    def check_data(self, context: ModelContext, *, weights: bool, sample: bool) -> Iterable[str]:
        snippet_of(context.tokenizer, context.config, context.model.path)
        return check_gguf(context, self.section, weights=weights, work=sample)

    @property
    def needs_tokens(self) -> bool:
        return True

    def estimate(self, model: CostModel) -> Cost:
        evaluated, section = self.recipe.evaluate, self.section
        tokens = section.reload_tokens * len(evaluated.text if evaluated else ())
        seconds = 15 + model.seconds(tokens, section.reload_tokens)
        does = "check the gate, write the card, load the folder in a fresh process and compare its losses"
        if section.engines:
            does += f"; score documents in {', '.join(section.engines)}"
        if section.gguf:
            does += f"; write {', '.join(section.gguf)} and read them in llama.cpp"
        if (section.engines or section.gguf) and section.make_environments:
            does += " (environments that are made first: not in the time)"
        weights = model.facts.weight_bytes
        files, trial = gguf_bytes(section, model, self.recipe.dtype), engine_bytes(section, model)
        peak = BASE_BYTES + (4 if section.engines or section.gguf else 2) * weights
        seconds += engine_seconds(section, model) + gguf_seconds(section, model, tokens)
        return Cost(self.name, does, peak, weights + max(files, trial), seconds)

    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        settings = {**self.section.model_dump(mode="json"), "recipe": self.recipe.model_dump(mode="json")}
        read = {
            "checkpoint": inputs.digests,
            "evaluation": jsonable(inputs.reports.get("evaluate")),
            "documents": documents_digest(context.documents),
        }
        return ResumeKey(self.name, self.version, settings, read)

    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> PublishReport:
        """Raises UserError when a fresh process does not reproduce the recorded losses, or an engine cannot load the
        checkpoint, and GateError when one is too far away; there is no `final/` then."""
        assert place.run is not None
        final, gate = place.run / FINAL, gate_of(self.recipe, inputs.reports["evaluate"])
        with staged(final, overwrite=True) as folder:
            gate, proven = self._write_final(context, inputs, place.run, folder, gate)
        gguf = proven.card.gguf
        more = (("engines", proven.engines), *([("gguf", gguf)] if gguf else []))
        with place.staged() as folder:
            for name, value in (("gate", gate), ("reload", proven.reload), *more):
                text = json.dumps(jsonable(value), indent=2)
                (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
        return PublishReport(gate, proven.reload, sha256(final / CARD), proven.engines, gguf)

    def also(self, context: ModelContext, inputs: Inputs) -> tuple[str, ...]:
        return (FINAL,)

    def restored(self, stored: Mapping[str, Any]) -> PublishReport:
        return from_json(PublishReport, stored)

    def _write_final(
        self, context: ModelContext, inputs: Inputs, run: Path, folder: Path, gate: tuple[GateResult, ...]
    ) -> tuple[tuple[GateResult, ...], Proven]:
        artifact: Artifact = inputs.current
        evaluated: EvaluationResult = inputs.reports["evaluate"]
        copy_checkpoint(artifact.model, folder, self.section.max_shard_size, link=self.recipe.link)
        data = run_data(context, inputs)
        picture = card_picture(data)
        if picture is not None:
            (folder / CHART).write_bytes(picture.png)
        losses = TokenLosses.load(losses_file(run, inputs.label))
        changes, chart = changes_of(self.recipe, data), CHART if picture else None
        proven = prove(context, artifact, folder, self.section, data, changes, losses, chart=chart)
        of_engines = engine_gate(self.recipe, metrics_of(proven.engines))
        enforce(of_engines, where="require", kept=[f"the checkpoint that was refused, whole: {artifact.path}"])
        gate += of_engines
        proven = with_gguf(context, folder, self.section, proven)
        write_provenance(folder, record_of(context, artifact, folder, proven, evaluated, gate))
        (folder / CARD).write_text(proven.text, encoding="utf-8")
        return gate, proven


def copy_checkpoint(source: ModelFolder, folder: Path, max_shard_size: str, *, link: bool) -> None:
    """The checkpoint in another folder, larger files cut. link: hard links where the disk allows them."""
    from retrofit.checkpoint.rewrite import rewrite
    from retrofit.checkpoint.write import parse_size, write_config
    from retrofit.context.names import portable

    checkpoint = source.checkpoint
    config = write_config(folder, portable(checkpoint.config))
    copy_side_files(source.path, folder)
    limit = parse_size(max_shard_size)
    if (
        any((source.path / shard).stat().st_size > limit + (1 << 20) for shard in checkpoint.shards)
        and len(checkpoint.names) > 1
    ):
        rewrite(checkpoint, folder, {}, config=config, max_shard_size=max_shard_size)
        return
    for name in checkpoint.files.names:
        copy_file(source.path / name, folder / name, link=link)
