"""Token losses of every model on the same documents, and the numbers made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.console import jsonable
from retrofit.data.documents import documents_digest
from retrofit.data.identity import require_distinct
from retrofit.errors import UserError
from retrofit.escape import shell_word
from retrofit.evaluation.files import losses_file, pass_file, save_losses
from retrofit.evaluation.long_context import longest_prompt, native_length, passes_of, reading_settings
from retrofit.evaluation.metrics.context_use import LongContext
from retrofit.evaluation.metrics.required import metrics
from retrofit.evaluation.result import EvaluationResult
from retrofit.evaluation.tasks.answers import answers_file, samples_file, to_file
from retrofit.evaluation.tasks.within import within_window
from retrofit.model.cache_dtype import AUTO, require_storable
from retrofit.recipe.resolve import is_relative
from retrofit.recipe.schema import Evaluate as Section
from retrofit.recipe.schema import Recipe, TextSource
from retrofit.system.resume import VERSION, ResumeKey
from retrofit.workflow.artifact import Artifact
from retrofit.workflow.checks import require_within
from retrofit.workflow.estimate.cost import Cost, CostModel
from retrofit.workflow.estimate.evaluation import evaluation_cost
from retrofit.workflow.gate import check_require
from retrofit.workflow.questions import (
    Questions,
    check_tasks,
    harness_of,
    require_chat_template,
    require_positions_of_tasks,
)
from retrofit.workflow.step import Inputs, Pieces, Place, Step

if TYPE_CHECKING:
    from retrofit.evaluation.folders import Scored
    from retrofit.evaluation.summary import Kept
    from retrofit.workflow.context import ModelContext

METRICS = "metrics.json"
_LONGER = 3
"""Samples can become so many times longer when they are read again, at most: a byte that is no text becomes three."""


class Evaluate(Step):
    """Score every model of a run. The losses of each are kept for themselves: a changed recovery does not score the
    original again."""

    name = "evaluate"
    version = str(VERSION)
    section: Section

    def __init__(self, recipe: Recipe, section: Section) -> None:
        super().__init__(recipe, section)

    @property
    def texts(self) -> tuple[TextSource, ...]:
        return self.section.text

    @property
    def distributed(self) -> bool:
        return True

    def check_options(self) -> Iterable[str]:
        require_distinct(self.section.text, "evaluate.text")
        if self.recipe.publish and self.section.kv_cache_dtype != AUTO:
            raise UserError(
                "what is published is what the checkpoint computes itself, not what an engine's KV cache makes of it",
                where="evaluate.kv_cache_dtype",
                fix="leave it out, or write publish: null; `retrofit evaluate FOLDER --kv-cache-dtype "
                f"{self.section.kv_cache_dtype}` measures the result",
            )
        if not is_relative(self.recipe):  # else when its lengths are known
            check_require(self.recipe)
        if self.section.tasks:
            from retrofit.evaluation.tasks.harness import require_harness

            require_harness()
        return ()

    def check(self, context: ModelContext) -> Iterable[str]:
        """What is evaluated fits the last model, and the original where its positions are learned."""
        from retrofit.evaluation.scoring.reader import require_positions

        check_require(self.recipe)
        require_storable(context.spec, self.section.kv_cache_dtype, "evaluate.kv_cache_dtype")
        section, longest = self.section, longest_prompt(self.section)
        if context.alone and longest > context.native:
            if not context.allow_extrapolation:
                raise UserError(
                    f"{longest} tokens are more than the {context.native} positions of the model",
                    where="--lengths",
                    fix=f"extend it: retrofit extend {shell_word(context.source.requested)} --length {longest} "
                    "--out DIR, or add --allow-extrapolation to see it break",
                )
            context.note(f"{longest:,} tokens lie beyond the model's {context.native:,} positions")
        elif not context.allow_extrapolation:
            require_within(longest, context.claimed, "evaluate.lengths")
            # The original is asked no test that its window does not hold; its perplexity is measured at every length.
            scored = max(section.lengths)
            require_positions(context.spec.learned_positions, scored, "evaluate.lengths, for the original model")
        if context.spec.learned_positions and section.cost_lengths and section.decode_tokens >= context.native:
            raise UserError(
                f"{section.decode_tokens} decoded tokens have no place in {context.native} positions",
                where="evaluate.decode_tokens",
                fix=f"use fewer than {context.native}, or cost_lengths: []",
            )
        if section.tasks:
            context.note(
                "opening the tasks of lm-evaluation-harness; those that make their own prompts take their time"
            )
        context.harness = harness_of(self.recipe, context.model)
        return ()

    def check_here(self, context: ModelContext) -> Iterable[str]:
        context.require_kernel(self.section.dtype)
        if self.section.sequence_parallel > 1:
            read = min(self.section.lengths) - 1  # the last token is predicted, not read
            context.require_splittable("evaluate.sequence_parallel", self.section.sequence_parallel, read)
        written = self.recipe.dtype
        if self.recipe.convert and self.section.dtype == "auto" and written != "auto" and context.device != "cpu":
            context.require_kernel(written)
        if context.harness is not None or self.section.common_knowledge:
            check_tasks(self.recipe, context.harness, context.config, context.kernel.name)
        return ()

    def check_data(self, context: ModelContext, *, weights: bool, sample: bool) -> Iterable[str]:
        from retrofit.data.texts import OWN_SAMPLES
        from retrofit.evaluation.long_context import require_room

        require_room(self.section, context.tokenizer, self.recipe.seed)
        require_positions_of_tasks(self.section, context.spec.learned_positions, context.tokenizer)
        require_chat_template(self.section, context.tokenizer)
        longest, length = max(self.section.lengths), context.samples.length
        if any(source.source == OWN_SAMPLES for source in self.section.text) and longest > _LONGER * length:
            raise UserError(
                f"the model's own samples are {length} tokens long, and {longest} are measured",
                where="text source `self`",
                fix=f"shorten evaluate.lengths to {length}, or name another text",
            )
        return context.choose_documents(self.section, sample=sample)

    def estimate(self, model: CostModel) -> Cost:
        return evaluation_cost(self.recipe, self.section, model)

    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        settings = {
            **self.section.model_dump(mode="json", exclude={"sequence_parallel"}),
            "kernel": [context.kernel.requested, context.kernel.name],
            "device": context.device_kind,
            "seed": self.recipe.seed,
            "positions": [context.native, context.claimed],
        }
        read = {
            "checkpoints": {label: dict(artifact.digests) for label, artifact in self.measured(inputs).items()},
            "documents": documents_digest(context.documents),
            "seen": {label: context.seen_by(artifact) for label, artifact in self.measured(inputs).items()},
            "tasks": Questions.of(context, self.section).keys(),
        }
        return ResumeKey(self.name, self.version, settings, read)

    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> EvaluationResult | None:
        """The result, on rank 0: the others take part in what is read, and not in what is made of it."""
        assert place.pieces is not None
        models_of = self.measured(inputs)
        asked = {
            label: (self._scored(context, label, model, place.pieces), self._asked(context, label, model, place.pieces))
            for label, model in models_of.items()
        }
        if not context.world.main:
            return None
        from retrofit.workflow.stored import kept_in_run

        run, passes = place.pieces.folder, passes_of(self.section, context.native)
        kept = {label: kept_in_run(losses_file(run, label), passes, *one) for label, one in asked.items()}
        result = self.result(context, models_of, kept)
        with place.staged() as folder:
            text = json.dumps(jsonable(result), indent=2, ensure_ascii=False)
            (folder / METRICS).write_text(f"{text}\n", encoding="utf-8")
        return result

    def result(
        self, context: ModelContext, models: Mapping[str, Artifact], kept: Mapping[str, Kept]
    ) -> EvaluationResult:
        """The numbers of every model, by label and the original first, and of the last against it."""
        from retrofit.evaluation.folders import prove_kernel
        from retrofit.evaluation.summary import summary

        last = list(models.values())[-1]
        self.announce_costs(context)
        how = self.how(context)
        found = summary(
            {label: artifact.model for label, artifact in models.items()},
            kept,
            self.section,
            **how,
        )
        proof = prove_kernel(last.model, context.documents[0], kernel=self.recipe.kernel, device=context.device)
        first, final = found[0], found[-1]
        numbers = metrics(
            {label: one.losses for label, one in kept.items()},
            self.section.lengths,
            self.section.tail,
            kv_bytes=(first.kv_cache_bytes[how["claimed"]], final.kv_cache_bytes[how["claimed"]]),
            kernel_max_diff=proof.max_difference,
            effective_length=final.effective.length if final.effective else None,
            tasks=[one.tasks for one in kept.values()],
        )
        return EvaluationResult(found, numbers, proof)

    def also(self, context: ModelContext, inputs: Inputs) -> tuple[str, ...]:
        found = []
        for label in self.measured(inputs):
            losses = losses_file(Path(), label)
            found += [losses, *(pass_file(losses, name) for name in passes_of(self.section, context.native))]
            questions = Questions.of(context, self.section)
            files = {task.name: answers_file(Path(), label, task.name) for task in questions.tasks}
            found += files.values()
            found += [samples_file(files[task.name]) for task in questions.tasks if questions.logs(task)]
        return tuple(map(str, found))

    def restored(self, stored: Mapping[str, Any]) -> EvaluationResult:
        return EvaluationResult.restored(stored)

    def score(
        self, context: ModelContext, label: str, artifact: Artifact, partial: Path | None, native: int | None = None
    ) -> Scored:
        """One model's token losses and what else is asked of it. partial: where finished parts are kept meanwhile."""
        from retrofit.evaluation.folders import score_folder

        return score_folder(
            artifact.model,
            context.documents,
            self.asked_of(context, artifact),
            label=label,
            kernel=self.recipe.kernel,
            device=context.device,
            native=native,
            seed=self.recipe.seed,
            identity=artifact.digests if partial is not None else None,
            seen=context.seen_by(artifact),
            partial=partial,
            continuation_tokens=0 if context.alone else self.section.continuation_tokens,
            world=context.world,
            progress=context.progress,
        )

    def asked_of(self, context: ModelContext, artifact: Artifact) -> Section:
        """The section as it is asked of one model: without tests on texts that its window does not hold."""
        if context.allow_extrapolation:
            return self.section
        return within_window(self.section, artifact.model.spec.max_position_embeddings)

    def native(self, context: ModelContext) -> int:
        """Tokens that the original was made for: of a model that is measured alone, what its folder records."""
        return native_length(context.model) if context.alone else context.native

    def measured(self, inputs: Inputs) -> dict[str, Artifact]:
        """The models that are measured: all, or the original and the last one."""
        models = dict(inputs.models)
        if self.section.intermediate or len(models) < 3:
            return models
        return {label: models[label] for label in (next(iter(models)), inputs.label)}

    def announce_costs(self, context: ModelContext) -> None:
        """Say what takes its time now. It has no bar: nothing else should run while speed is measured."""
        if self.section.cost_lengths:
            context.note("measuring speed and memory")

    def how(self, context: ModelContext) -> dict[str, Any]:
        """What `summary` needs to know beside the models."""
        return {
            "native": self.native(context),
            "claimed": context.claimed,
            "kernel": self.recipe.kernel,
            "device": context.device_kind,
            "seed": self.recipe.seed,
        }

    def _scored(self, context: ModelContext, label: str, artifact: Artifact, pieces: Pieces) -> Mapping[str, Any]:
        """Score one model of a run, unless it was before: its losses are in files, this is what stands beside them."""
        from retrofit.model.frequencies import varying

        def work(file: Path, scratch: Path) -> Mapping[str, Any]:
            found = self.score(context, label, artifact, scratch, context.native)
            if context.world.main:
                save_losses(found.losses, file)
                for name, losses in found.measured.passes.items():
                    save_losses(losses, pass_file(file, name))
            answered = LongContext(
                context.native, defined=found.measured.defined, needle=found.measured.needle, ruler=found.measured.ruler
            )
            return {
                "kernel": found.kernel.name,
                "reason": found.kernel.reason,
                "answers": jsonable(answered),
                "continuations": jsonable(found.measured.continuations),
            }

        settings = {
            "chunk": self.section.chunk,
            "continuation_tokens": self.section.continuation_tokens,
            "dtype": self.section.dtype,
            "kv_cache_dtype": self.section.kv_cache_dtype,
            "kernel": [context.kernel.name, context.kernel.requested != "auto"],
            "device": context.device_kind,
            **reading_settings(
                self.asked_of(context, artifact),
                context.native,
                varies=varying(artifact.model.config) is not None,
                seed=self.recipe.seed,
            ),
        }
        read = {
            "checkpoint": dict(artifact.digests),
            "documents": documents_digest(context.documents),
            "seen": context.seen_by(artifact),
        }
        name, file = f"{self.name}:{label}", losses_file(Path(), label)
        also = tuple(str(pass_file(file, one)) for one in passes_of(self.section, context.native))
        return pieces.piece(name, str(file), ResumeKey(name, self.version, settings, read), work, also=also)

    def _asked(self, context: ModelContext, label: str, artifact: Artifact, pieces: Pieces) -> list[Path]:
        """Ask one model of a run every task; the files of its answers, each kept for itself."""
        questions = Questions.of(context, self.section)
        found: list[Path] = []
        with questions.reader(artifact.model, context.claimed, context.native) as ask:
            for asked in questions.tasks:

                def work(file: Path, scratch: Path, asked: Any = asked) -> Mapping[str, Any]:
                    answers = ask(asked, samples_file(file))
                    if context.world.main:
                        to_file({asked.name: answers}, file)
                    return {"scores": [asdict(row) for row in answers.rows()]}

                name, file = f"{self.name}:{label}:{asked.name}", answers_file(Path(), label, asked.name)
                settings = {**questions.key(asked), "kernel": context.kernel.name, "device": context.device_kind}
                key = ResumeKey(name, self.version, settings, {"checkpoint": dict(artifact.digests)})
                also = (str(samples_file(file)),) if questions.logs(asked) else ()
                pieces.piece(name, str(file), key, work, also=also)
                found.append(pieces.folder / file)
        return found
