"""Quality won back by a short adapter training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.staging import staged
from retrofit.data.identity import identity, merged, require_distinct
from retrofit.errors import UserError
from retrofit.install import install_command
from retrofit.model.families.experts import EXPERTS
from retrofit.recipe.recovery import PROBE_MOST, PROBE_SHARE, TRIES, Tracker, distils, stages_of, text_lengths
from retrofit.recipe.schema import Recipe, TextSource
from retrofit.recipe.schema import Recover as Section
from retrofit.recipe.values import SYNTHETIC
from retrofit.recovery.layout import Layout, layout_of, sequence_engine, sizes_of, ulysses_note
from retrofit.system.resume import ResumeKey
from retrofit.system.world import World
from retrofit.workflow.artifact import from_json, shard_size
from retrofit.workflow.checks import require_within
from retrofit.workflow.estimate.cost import BASE_BYTES, Cost, CostModel
from retrofit.workflow.estimate.distributed import fits_one, memory_of_one, planned_memory
from retrofit.workflow.estimate.repetition import passes_in_words, require_text
from retrofit.workflow.estimate.several_gpus import step_seconds
from retrofit.workflow.estimate.training_memory import trained_parameters
from retrofit.workflow.outputs import require_same_or_new
from retrofit.workflow.samples import sampled_in
from retrofit.workflow.step import Inputs, Place, Step

if TYPE_CHECKING:
    from retrofit.data.packing import Packed
    from retrofit.model.spec import AttentionSpec
    from retrofit.recovery.report import RecoverReport
    from retrofit.workflow.context import ModelContext

UNRECORDED = {"allow_repeats", "report_to", "distribute", "sequence_engine"}  # how it was done, not what was made
ROW_BYTES = 16  # of a token that is kept, and of what is known about it
ADAPTER, LOGS = "-adapter", "-logs"  # what stands beside the checkpoint, after its name
TRACKERS: dict[Tracker, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
PACKED_BYTES = 60  # of a token while rows are packed: it is a Python number


class Recover(Step):
    """Train the newest checkpoint to follow the original; it resumes from its last own checkpoint after a kill."""

    name = "recover"
    distributed = True
    version = "2"
    learns = True
    reads_for = "training"
    section: Section

    def __init__(self, recipe: Recipe, section: Section) -> None:
        super().__init__(recipe, section)

    @property
    def texts(self) -> tuple[TextSource, ...]:
        return self.section.text

    @property
    def begun_with(self) -> str:
        """Rows of a step: by default they follow from the number of processes, which may change."""
        return str(self.section.batch_size)

    def label(self, models: Iterable[str]) -> str:
        return "recovered"

    def reads_by_name(self, context: ModelContext) -> bool:
        return True

    def check_options(self) -> Iterable[str]:
        require_distinct(self.section.text, "recover.text")
        return ()

    def check(self, context: ModelContext) -> Iterable[str]:
        from retrofit.recovery.schedule import check_lengths
        from retrofit.recovery.student_teacher import require_same_vocabulary

        section, original = self.section, context.original_model.spec
        if distils(section):
            require_same_vocabulary(original, context.spec, "--teacher")
        require_text(section)
        require_within(section.sequence_length, context.claimed, "recover.sequence_length")
        check_lengths(section, original.max_position_embeddings, context.claimed)
        if section.adapter.rank > context.spec.hidden_size:
            raise UserError(
                f"an adapter of rank {section.adapter.rank} is larger than the layers, which are "
                f"{context.spec.hidden_size} wide",
                where="recover.adapter.rank",
                fix=f"use at most {context.spec.hidden_size}",
            )
        return ()

    def check_here(self, context: ModelContext) -> Iterable[str]:
        from retrofit.recovery.sequence import shared_kernel
        from retrofit.recovery.student_teacher import compute_dtype, training_kernel

        dtype = str(compute_dtype(context.device)).removeprefix("torch.")
        masked = self.section.document_masking
        training_kernel(self.recipe.kernel, context.spec, context.device, dtype, documents=masked)
        _, sequence, _ = sizes_of(self.section, World(0, context.processes))
        engine, _ = sequence_engine(self.section, context.spec, context.device, sequence)
        shared_kernel(engine, self.recipe.kernel, context.spec, context.device, dtype)
        for name in self.section.report_to:
            if not any(find_spec(package) for package in TRACKERS[name]):
                raise UserError(
                    f"the package `{TRACKERS[name][0]}` is not installed",
                    where="recover.report_to",
                    fix=install_command(TRACKERS[name][0]),
                )
        return ()

    def check_data(self, context: ModelContext, *, weights: bool, sample: bool) -> Iterable[str]:
        """Every source gives tokens that the model knows, and the chat template writes every dialogue; text that does
        not suffice is read again."""
        from retrofit.data.chat_tokens import check_dialogues
        from retrofit.data.long_rows import LONG_ROW, require_long_documents
        from retrofit.data.packing import CHARS_PER_TOKEN, training_rows
        from retrofit.data.sources import OURS
        from retrofit.data.synthetic import require_room
        from retrofit.data.texts import require_known

        section, length = self.section, self.section.sequence_length
        most = CHARS_PER_TOKEN * section.tokens
        if length > max(context.original_model.spec.max_position_embeddings, LONG_ROW):
            require_long_documents(section.text, context.tokenizer, length, limit_chars=most)
        for source in section.text:
            if source.source == SYNTHETIC:
                for rows_of in sorted(text_lengths(section)):
                    require_room(context.tokenizer, rows_of, self.recipe.seed)
            if source.source not in OURS:
                check_dialogues(source, context.tokenizer, section.loss_on, limit_chars=most)
                rows = training_rows(
                    [source], context.tokenizer, length, length, self.recipe.seed, loss_on=section.loss_on
                )
                require_known(rows.ids_NT, context.model)
        return ()

    def estimate(self, model: CostModel) -> Cost:
        spec, facts, recover = model.after, model.facts, self.section
        adapter, batch = recover.adapter, min(recover.batch_size, -(-recover.tokens // recover.sequence_length))
        rows = batch * recover.sequence_length
        read = recover.model_copy(update={"batch_size": batch})
        memory = planned_memory(
            spec, facts.spec, facts.parameters, read, model.training_bytes, model.processes, self.recipe.device
        )
        text = recover.tokens + recover.eval_tokens
        peak = BASE_BYTES + max(memory.total + ROW_BYTES * text, PACKED_BYTES * text)
        trained = trained_parameters(spec, adapter)
        held_out = (recover.evals + 1) * recover.eval_tokens
        length, processes = recover.sequence_length, min(batch, model.throughput.gpus)
        steps = max(1, recover.tokens // rows)
        tried = TRIES * min(PROBE_MOST, steps // PROBE_SHARE) if recover.find_learning_rate else 0
        seconds = (recover.tokens / rows + tried) * step_seconds(recover, model, batch, processes)
        written = round(recover.on_policy * recover.tokens)
        seconds += model.sampling_seconds(written) if written else 0.0
        seconds += model.dealt(-(-held_out // length)) * model.seconds(held_out, length, passes=2)
        if recover.token_weights == "long":
            learned = sum(stage.tokens for stage in stages_of(recover) if stage.loss == "lm")
            seconds += model.dealt(-(-learned // length)) * model.seconds(learned, length, passes=1)
            seconds += model.dealt(-(-learned // length)) * model.seconds(learned * 5 // 4, length // 4, passes=1)
        losses = " then ".join(dict.fromkeys(stage.loss or recover.loss for stage in stages_of(recover)))
        does = f"{losses}, LoRA rank {adapter.rank}, {recover.tokens:,} tokens in {steps:,} steps of {rows:,}"
        if sampled := sampled_in(self.recipe, self.name):
            does += f", {sampled:,} sampled from the original first (kept for later runs)"
            peak = max(peak, BASE_BYTES + model.sampling_bytes)
            seconds += model.sampling_seconds(sampled)
        if written:
            does += f", {written:,} of them written by the student"
        if tried:
            does += f", after {tried} steps that try {TRIES} learning rates"
        if read_often := passes_in_words(recover):
            does += f", reading {read_often}"
        sequence = recover.distribute.sequence
        if sequence > 1:
            engine, why = sequence_engine(recover, spec, "cpu" if self.recipe.device == "cpu" else "cuda", sequence)
            does += f"; {sequence} processes share every row ({engine}: {why}); {ulysses_note(spec, sequence)}"
        if adapter.mlp and spec.family in EXPERTS:
            does += "; the experts carry no adapters"
        return Cost(self.name, does, peak, facts.weight_bytes + (16 if recover.keep_adapter else 12) * trained, seconds)

    def record(self) -> dict[str, Any]:
        return self.section.model_dump(mode="json", exclude=UNRECORDED)

    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        settings: dict[str, Any] = {
            **{key: value for key, value in self.record().items() if key != "keep_adapter" or value},
            "dtype": self.recipe.dtype,
            "seed": self.recipe.seed,
            "max_shard_size": shard_size(self.recipe),
            "kernel": self.recipe.kernel,
        }
        read = {
            "checkpoint": inputs.digests,
            "teacher": dict(context.original_source.digests),
            "text": identity(self.section.text),
        }
        return ResumeKey(self.name, self.version, settings, read)

    def restored(self, stored: Mapping[str, Any]) -> RecoverReport:
        from retrofit.recovery.report import RecoverReport

        return from_json(RecoverReport, stored)

    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> RecoverReport:
        from retrofit.data.texts import require_known, write_samples
        from retrofit.recovery.schedule import recovery_rows
        from retrofit.recovery.train import recover

        student, provenance = inputs.current.model, inputs.current.provenance
        kept, logs = place.out.with_name(f"{place.out.name}{ADAPTER}"), place.out.with_name(f"{place.out.name}{LOGS}")
        replaces = place.run is not None or (
            self.section.keep_adapter and require_same_or_new(kept, provenance.question, overwrite=place.overwrite)
        )
        read = self.section.model_copy(update={"text": merged(self.section.text)})

        def packed() -> tuple[Packed, Packed | None]:
            rows, held_out = recovery_rows(
                read, student.tokenizer, self.recipe.seed, teacher=context.samples, progress=context.progress
            )
            require_known(rows.ids_NT, student)
            return rows, held_out

        write_samples(read.text, context.samples, ("train", "held_out"), context.world, context.progress)
        rows, held_out = context.world.only(packed)
        with ExitStack() as stack:
            folder, adapter = place.out, None
            if context.world.main:
                folder = stack.enter_context(place.staged())
            if context.world.main and self.section.keep_adapter:
                # The adapter gets its name first: the command is done when the checkpoint is there.
                adapter = stack.enter_context(staged(kept, overwrite=replaces))
            report = recover(
                student,
                context.original_model,
                folder,
                self.section,
                rows,
                held_out,
                device=context.device,
                kernel=self.recipe.kernel,
                seed=self.recipe.seed,
                work_dir=place.work,
                max_shard_size=shard_size(self.recipe),
                progress=context.progress,
                adapter=adapter,
                logs=logs / place.work.name[:8] if "tensorboard" in self.section.report_to else None,
                world=context.world,
                layout=self._layout(context, student.spec),
            )
            for written in filter(None, (folder, adapter) if context.world.main else ()):
                self.after(provenance, self.recorded(report)).write(written)
        return report

    def _layout(self, context: ModelContext, spec: AttentionSpec) -> Layout:
        """How the processes share the training of a student with this attention."""
        from retrofit.recovery.student_teacher import compute_dtype

        world, original, parameters = context.world, context.original_model.spec, context.facts.parameters
        value = compute_dtype(context.device).itemsize
        memory = memory_of_one(spec, original, parameters, self.section, value, processes=world.size)
        return layout_of(self.section, world, spec, context.device, fits=fits_one(memory, context.device))

    def also(self, context: ModelContext, inputs: Inputs) -> tuple[str, ...]:
        return (_beside(ADAPTER),) if self.section.keep_adapter else ()

    def unkept(self) -> tuple[str, ...]:
        return (_beside(LOGS),) if "tensorboard" in self.section.report_to else ()

    def stale(self) -> tuple[str, ...]:
        return () if self.section.keep_adapter else (_beside(ADAPTER),)


def _beside(what: str) -> str:
    """In a run folder."""
    from retrofit.workflow.steps import FOLDERS

    return f"{FOLDERS[Recover.name]}{what}"
