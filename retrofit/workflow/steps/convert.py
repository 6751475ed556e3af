"""Fewer KV heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import read_config
from retrofit.data.identity import identity, require_distinct
from retrofit.errors import UserError
from retrofit.format import heads
from retrofit.kv_heads import VERSION
from retrofit.recipe.schema import Convert as Section
from retrofit.recipe.schema import Recipe, TextSource
from retrofit.system.resume import ResumeKey
from retrofit.workflow.artifact import from_json, shard_size
from retrofit.workflow.checks import require_within
from retrofit.workflow.estimate.cost import BASE_BYTES, EFFICIENCY, SOLVE_LAUNCHES, Cost, CostModel
from retrofit.workflow.samples import sampled_in
from retrofit.workflow.step import Inputs, Place, Step
from retrofit.workflow.steps.extend import record_of as context_record

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from retrofit.data.calibration import CalibrationText
    from retrofit.kv_heads.repair.outcome import ConvertReport
    from retrofit.workflow.context import ModelContext

MOMENTS = "moments"
TRANSFER_PASSES = 7  # forward and backward twice over the text that is trained on, and what is held out, four times
BATCH_TOKENS = 8192  # of a calibration batch
MEAN_PASSES = 4  # over the weights: digested, checked, read and written, and digested again
PACKED_BYTES = 60  # of a token while rows are packed: it is a Python number


class Convert(Step):
    """Write the newest checkpoint with fewer KV heads; it resumes from its last own layer and shard after a kill."""

    name = "convert"
    version = f"3, heads {VERSION}"
    learns = True
    section: Section

    def __init__(self, recipe: Recipe, section: Section) -> None:
        super().__init__(recipe, section)

    @property
    def texts(self) -> tuple[TextSource, ...]:
        return self.section.calibration.text if self.section.calibrates else ()

    @property
    def distributed(self) -> bool:
        return bool(self.section.calibrates)

    def label(self, models: Iterable[str]) -> str:
        return "converted"

    def reads_by_name(self, context: ModelContext) -> bool:
        return True

    def check_options(self) -> Iterable[str]:
        if not self.section.calibrates:
            return ()
        from retrofit.data.calibration import check_calibration

        require_distinct(self.section.calibration.text, "convert.calibration.text")
        return check_calibration(self.section.calibration)

    def check(self, context: ModelContext) -> Iterable[str]:
        from retrofit.model.families import family_of

        family_of(context.config).with_kv_heads(context.config, self.section.kv_heads, context.spec)
        if self.section.calibrates:
            length, where = self.section.calibration.sequence_length, "convert.calibration.sequence_length"
            require_within(length, context.native, where, extendable=False)
        if self._changes(context):
            return ()
        if self.recipe.recover and context.claimed == context.native:
            possible = [c.kv_heads for c in family_of(context.config).conversions(context.spec) if c.possible]
            fewer = ", ".join(str(count) for count in possible if count < self.section.kv_heads)
            raise UserError(
                f"the model already has {heads(self.section.kv_heads)}"
                + ("" if fewer else ", and can have no fewer")
                + ": there is nothing that a training could win back",
                where="convert.kv_heads",
                fix=f"choose one of: {fewer}" if fewer else "extend the model instead (context), or leave out recover",
            )
        return (f"the model already has {self.section.kv_heads} KV heads: its weights are copied unchanged",)

    def require_moments(self, context: ModelContext) -> None:
        """UserError for moments that would not be measured because the model has that many KV heads already."""
        if not self._changes(context):
            raise UserError(
                f"the model already has {self.section.kv_heads} KV heads, so nothing is measured",
                where="--moments",
                fix="leave out --moments, or choose fewer --kv-heads",
            )

    def check_data(self, context: ModelContext, *, weights: bool, sample: bool) -> Iterable[str]:
        if not self.section.calibrates or not self._changes(context) or not weights:
            return ()
        from retrofit.data.calibration import fewest_sequences, require_calibration_text
        from retrofit.kv_heads.calibrate.settings import require_left_out
        from retrofit.kv_heads.merge.baselines import METHODS

        calibration, repairs = self.section.calibration, self.section.repair != "none"
        fewest = fewest_sequences(calibration, context.samples)
        require_left_out(fewest, context.spec, METHODS[self.section.method], repairs=repairs)
        require_calibration_text(calibration, context.tokenizer, seed=self.recipe.seed, teacher=context.samples)
        return ()

    def room(self, context: ModelContext, *, moments: bool = False) -> int:
        if not self.section.calibrates or not self._changes(context):
            return 0
        from retrofit.kv_heads.room import room_needed

        calibration = self.section.calibration
        return room_needed(
            context.spec,
            self.section.kv_heads,
            calibration.tokens + len(calibration.text) * calibration.sequence_length,  # sequences are whole
            repairs=self.section.repair != "none",
            moments=moments,
            value_bytes=context.model.dtype(self.recipe.dtype).itemsize,
            checkpoint_bytes=context.model.checkpoint.nbytes,
        )

    def _changes(self, context: ModelContext) -> bool:
        return self.section.kv_heads != context.spec.layers[0].kv_heads

    def estimate(self, model: CostModel) -> Cost:
        convert, spec, facts = self.section, model.facts.spec, model.facts
        work = f"{spec.layers[0].kv_heads} to {convert.kv_heads} KV heads in {len(spec.layers)} layers, "
        work += str(convert.method)
        if not convert.calibrates:
            seconds = model.disk_seconds(MEAN_PASSES) + 1
            peak = BASE_BYTES + facts.weight_bytes // len(spec.layers)
            return Cost(self.name, work, peak, facts.weight_bytes, seconds)
        tokens, length = convert.calibration.tokens, convert.calibration.sequence_length
        repair = f" and the {convert.repair} repair" if convert.repair != "none" else ""
        first = spec.layers[0]
        # In float32: a batch's stream and what one layer makes of it, the embeddings or one layer, its projections in
        # float64, Grams of all values and of all head outputs (for each fold, and for their sums).
        batch = min(tokens, BATCH_TOKENS) * (16 * spec.hidden_size + 4 * model.layer_parameters // spec.hidden_size)
        layer = max(4 * spec.vocab_size * spec.hidden_size, 16 * model.layer_parameters)
        folds = 2 * len(convert.calibration.text) + 5
        columns = first.query_heads * first.head_dim
        grams = 8 * (4 * (first.kv_heads * first.head_dim) ** 2 + folds * columns * (columns + spec.hidden_size))
        peak = BASE_BYTES + max(batch + layer + grams, PACKED_BYTES * tokens)
        does = f"{work}{repair} on {tokens:,} tokens"
        # Each stream passes every layer once; the moments and refits between are about half a pass in float32.
        call = min(tokens, BATCH_TOKENS)
        seconds = model.seconds(tokens, length, passes=2, call=call)
        seconds += model.seconds(tokens, length, passes=0.5, float32=True, call=call)
        seconds *= model.dealt(-(-tokens // length))
        seconds += len(spec.layers) * SOLVE_LAUNCHES * model.throughput.launch_seconds + model.disk_seconds(MEAN_PASSES)
        if convert.repair == "transfer":
            seconds += TRANSFER_PASSES * model.attention_flops(tokens, length) / (model.throughput.flops * EFFICIENCY)
        if sampled := sampled_in(self.recipe, self.name):
            does += f", {sampled:,} sampled from the original first (kept for later runs)"
            peak = max(peak, BASE_BYTES + model.sampling_bytes)
            seconds += model.sampling_seconds(sampled)
        # Upper triangles of two Grams of all values are most of the moments that stay.
        moments = len(spec.layers) * 4 * (first.kv_heads * first.head_dim) ** 2
        return Cost(self.name, does, peak, facts.weight_bytes + moments, seconds)

    def record(self) -> dict[str, Any]:
        unused = set() if self.section.calibrates else {"calibration", "repair"}
        return self.section.model_dump(mode="json", exclude=unused)

    def kinds_read(self, report: Mapping[str, Any]) -> tuple[str, ...]:
        return super().kinds_read(report) if report["tokens"] else ()

    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        extension = self.recipe.context if self._reads_extension else None
        settings = {
            **self.record(),
            "dtype": self.recipe.dtype,
            "seed": self.recipe.seed,
            "max_shard_size": shard_size(self.recipe),
        }
        read = {
            "checkpoint": inputs.digests,
            "text": identity(self.texts) if self.section.calibrates else None,
            "context": extension and context_record(extension),
            "moments": inputs.moments,
        }
        return ResumeKey(self.name, self.version, settings, read)

    @property
    def _reads_extension(self) -> bool:
        """Whether keys are merged for the rotations that the recipe ends with; what a search finds is not known yet."""
        context = self.recipe.context
        return self.section.calibrates and context is not None and not context.searches

    def restored(self, stored: Mapping[str, Any]) -> ConvertReport:
        from retrofit.kv_heads.repair.outcome import ConvertReport

        return from_json(ConvertReport, stored)

    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> ConvertReport:
        """Where text is read, each process has its share of it; rank 0 alone chooses the text, and writes."""
        from retrofit.checkpoint.write import write_config
        from retrofit.context.names import portable
        from retrofit.data.texts import write_samples
        from retrofit.kv_heads.calibrate import moments
        from retrofit.kv_heads.convert import convert
        from retrofit.kv_heads.disk import require_room
        from retrofit.kv_heads.room import held

        section, source, world = self.section, inputs.current.model, context.world

        def wanted() -> tuple[TextSource, ...]:
            if place.moments is not None:
                moments.require_own(place.moments)
            if not self.room(context):
                return ()
            # Before the model writes its samples, which takes minutes.
            require_room(place.work, self.room(context, moments=place.moments is not None) - held(place.work))
            from retrofit.data.calibration import sampled_sources

            return sampled_sources(section.calibration, context.samples)

        def chosen() -> CalibrationText | None:
            if not self.room(context):
                return None
            from retrofit.data.calibration import calibration_text

            return calibration_text(
                section.calibration,
                source.tokenizer,
                seed=self.recipe.seed,
                teacher=context.samples,
                progress=context.progress,
            )

        write_samples(world.only(wanted), context.samples, ("train",), world, context.progress)
        text, checkpoint = world.only(chosen), place.work / "checkpoint"
        with place.staged(checkpoint) if world.main else nullcontext(checkpoint) as folder:
            report = convert(
                source,
                folder,
                kv_heads=section.kv_heads,
                method=section.method,
                repair=section.repair,
                text=text,
                averaged_tokens=section.calibration.averaged_tokens,
                device=context.device,
                dtype=None if self.recipe.dtype == "auto" else source.dtype(self.recipe.dtype),
                max_shard_size=shard_size(self.recipe),
                work=place.work,
                moments=place.moments,
                read_with=self._read_with(source.config, context.held_scale(source.path)),
                world=world,
                progress=context.progress,
            )
            if world.main:
                write_config(folder, portable(read_config(folder)))
                self.after(inputs.current.provenance, self.recorded(report)).write(folder)
        context.note(*report.notes)
        return report

    def _read_with(self, config: PretrainedConfig, held: float) -> PretrainedConfig | None:
        """The configuration that the merged keys will be rotated by, where the recipe extends the window next.

        held: what earlier extensions multiplied the queries with.
        """
        extension = self.recipe.context
        if extension is None or not self._reads_extension:
            return None
        from retrofit.context.rope import extend

        return extend(
            config,
            length=extension.length,
            factor=extension.factor,
            method=str(extension.method),
            settings=extension.settings,
            held=held,
        )

    def unkept(self) -> tuple[str, ...]:
        return (MOMENTS,) if self.section.calibrates else ()

    def stale(self) -> tuple[str, ...]:
        return () if self.section.calibrates else (MOMENTS,)
