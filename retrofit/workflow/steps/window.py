"""Sliding windows in the layers that look back a short way only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import read_config
from retrofit.data.identity import identity, require_distinct
from retrofit.errors import UserError
from retrofit.recipe.layers import how_many
from retrofit.recipe.schema import Recipe, TextSource
from retrofit.recipe.schema import Window as Section
from retrofit.system.resume import ResumeKey
from retrofit.windows import VERSION, row_length
from retrofit.workflow.artifact import from_json, shard_size
from retrofit.workflow.estimate.cost import BASE_BYTES, Cost, CostModel
from retrofit.workflow.step import Inputs, Place, Step
from retrofit.workflow.windowing import (
    after_windows,
    chosen_layers,
    length_of,
    probed_tokens,
    require_sequences,
    require_size,
    target_of,
    texts_of,
)

if TYPE_CHECKING:
    from retrofit.model.folder import ModelFolder
    from retrofit.windows.outcome import WindowReport
    from retrofit.windows.targets import Target
    from retrofit.workflow.context import ModelContext

FLOAT32 = 4


class Window(Step):
    """Write the newest checkpoint with windows; it resumes from its last own layer, round and shard after a kill."""

    name = "window"
    version = f"1, windows {VERSION}"
    distributed = True
    learns = True
    section: Section

    def __init__(self, recipe: Recipe, section: Section) -> None:
        super().__init__(recipe, section)

    @property
    def texts(self) -> tuple[TextSource, ...]:
        return self.section.calibration.text

    def label(self, models: Iterable[str]) -> str:
        """A conversion before it is not measured alone: both together are the converted model."""
        return "converted"

    def reads_by_name(self, context: ModelContext) -> bool:
        return True

    def check_options(self) -> Iterable[str]:
        from retrofit.data.calibration import check_calibration

        require_distinct(self.section.calibration.text, "window.calibration.text")
        length, shortest = self.section.calibration.sequence_length, row_length(self.section.size)
        if length is not None and length < shortest:
            raise UserError(
                f"sequences of {length:,} tokens are too short to look beyond a window of {self.section.size:,}",
                where="window.calibration.sequence_length",
                fix=f"give at least {shortest:,}, or leave it out",
            )
        return check_calibration(self.section.calibration.in_sequences(length or shortest))

    def check(self, context: ModelContext) -> Iterable[str]:
        require_size(self.section.size, context.native)
        target = target_of(self.section, context.config, context.spec)
        after_windows(self.section, context.config, context.spec)
        require_sequences(self.section, length_of(self.section, context.native))
        return target.notes

    def check_here(self, context: ModelContext) -> Iterable[str]:
        """The kernel that is asked for computes windows and sinks too."""
        from retrofit.kernels.registry import choose
        from retrofit.model.families import describe

        choose(self.recipe.kernel, describe(after_windows(self.section, context.config, context.spec)), context.device)
        return ()

    def check_data(self, context: ModelContext, *, weights: bool, sample: bool) -> Iterable[str]:
        if not weights:
            return ()
        from retrofit.data.calibration import require_calibration_text

        reading = self.section.calibration.in_sequences(length_of(self.section, context.native))
        require_calibration_text(reading, context.tokenizer, seed=self.recipe.seed, teacher=context.samples)
        return ()

    def room(self, context: ModelContext) -> int:
        """The streams of the layerwise conversion, or those of the variants that are measured together; and a
        checkpoint that is re-expressed first."""
        from retrofit.windows.ablation import STREAM_BYTES

        section, spec = self.section, context.spec
        tokens = section.calibration.tokens + section.calibration.measured_tokens
        first = spec.layers[0]
        per_token = 5 * spec.hidden_size + first.query_heads * (first.head_dim + 1)
        variants = 2 * FLOAT32 * len(spec.layers) * probed_tokens(section) * spec.hidden_size
        reexpressed = target_of(section, context.config, spec).reexpressed
        before = context.model.checkpoint.nbytes if reexpressed else 0
        return before + max(FLOAT32 * per_token * tokens, min(variants, 2 * STREAM_BYTES))

    def estimate(self, model: CostModel) -> Cost:
        section, spec, facts = self.section, model.facts.spec, model.facts
        calibration, layers = section.calibration, len(spec.layers)
        full = how_many(section.full_layers, layers)
        where = f"in {layers - full} of {layers} layers" if full is not None else "in layers that look back a short way"
        does = f"windows of {section.size:,} tokens {where}, on {calibration.tokens:,} tokens"
        length = length_of(section, model.native)
        batch = min(calibration.tokens, 8192) * (24 * spec.hidden_size + 4 * model.layer_parameters // spec.hidden_size)
        layer = max(4 * spec.vocab_size * spec.hidden_size, 16 * model.layer_parameters)
        columns = spec.layers[0].query_heads * spec.layers[0].head_dim
        grams = 8 * (2 * len(calibration.text) + 6) * columns * (columns + spec.hidden_size)
        peak = BASE_BYTES + batch + layer + grams
        # Two streams with attention in float32; the choice reads one, and its rounds half of all layers for each.
        seconds = model.seconds(calibration.tokens, length, passes=2.5)
        fitted = model.dealt(-(-calibration.tokens // length))
        seconds *= fitted
        if not isinstance(section.full_layers, tuple):
            rounds = 0.5 * layers + 12
            seconds += fitted * model.seconds(calibration.tokens, length, passes=1.5)
            row = row_length(section.size)
            measured = probed_tokens(section)
            seconds += model.dealt(measured // row) * model.seconds(measured, row, passes=rounds)
        return Cost(self.name, does, peak, facts.weight_bytes, seconds + model.disk_seconds(4))

    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        settings: dict[str, Any] = {
            **self.section.model_dump(mode="json"),
            "dtype": self.recipe.dtype,
            "seed": self.recipe.seed,
            "max_shard_size": shard_size(self.recipe),
        }
        return ResumeKey(
            self.name, self.version, settings, {"checkpoint": inputs.digests, "text": identity(self.texts)}
        )

    def restored(self, stored: Mapping[str, Any]) -> WindowReport:
        from retrofit.windows.outcome import WindowReport

        return from_json(WindowReport, stored)

    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> WindowReport:
        """Each process has its share of the text; rank 0 alone chooses the text, and writes."""
        from retrofit.checkpoint.write import write_config
        from retrofit.context.names import portable
        from retrofit.windows.convert import add_windows
        from retrofit.windows.layerwise import Windows
        from retrofit.windows.outcome import WindowReport

        started, section, world = time.monotonic(), self.section, context.world
        source = inputs.current.model
        target = target_of(section, source.config, source.spec)
        texts = texts_of(section, context, source, self.recipe.seed)
        fit, choice = texts.fit, chosen_layers(section, target, source, texts, context, place.work / "choice")
        full = section.full_layers if isinstance(section.full_layers, tuple) else choice.full if choice else ()
        model = self._in_target(source, target, context, place)
        windows = Windows(
            section.size,
            frozenset(target.candidates) - set(full) | set(target.always),
            sinks=target.sinks,
            repair=section.repair != "none",
        )
        checkpoint = place.work / "checkpoint"
        with place.staged(checkpoint) if world.main else nullcontext(checkpoint) as folder:
            layers, rise = add_windows(
                model,
                folder,
                windows,
                fit,
                texts.rows,
                work=place.work / "layers",
                device=context.device,
                dtype=None if self.recipe.dtype == "auto" else source.dtype(self.recipe.dtype),
                max_shard_size=shard_size(self.recipe),
                world=world,
                progress=context.progress,
            )
            report = WindowReport(
                target=target.family,
                size=section.size,
                full_layers=tuple(layer.index for layer in layers if layer.window is None),
                rise=rise,
                layers=tuple(layers),
                choice=choice,
                tokens=fit.input_ids_NT.numel(),
                tokens_by_kind=fit.tokens_by_kind,
                measured_tokens=texts.rows.input_ids_NR.numel(),
                seconds=time.monotonic() - started,
                notes=(*target.notes, *fit.notes),
            )
            if world.main:
                write_config(folder, portable(read_config(folder)))
                self.after(inputs.current.provenance, self.recorded(report)).write(folder)
        context.note(*fit.notes)  # the others were shown before
        return report

    def _in_target(self, source: ModelFolder, target: Target, context: ModelContext, place: Place) -> ModelFolder:
        """The model in the architecture that is written, the same function."""
        if not target.reexpressed:
            return source
        from retrofit.checkpoint.staging import staged
        from retrofit.model.folder import ModelFolder
        from retrofit.model.reexpress import reexpress
        from retrofit.workflow.joining import await_folder

        folder = place.work / "target"

        def write() -> None:
            if not folder.is_dir():
                with staged(folder, overwrite=True, keep=place.work / "target.partial") as partial:
                    reexpress(source, partial, target=target.family, resume=True, progress=context.progress)

        context.world.only(write)
        await_folder(folder)
        return ModelFolder(folder)
