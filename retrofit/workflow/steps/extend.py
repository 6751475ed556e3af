"""A longer context window."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from retrofit.context.extension import ExtendReport
from retrofit.context.longrope import folds
from retrofit.context.search.candidates import NEAR, TAIL, candidates, rungs
from retrofit.data.identity import identity
from retrofit.recipe.schema import Context, Recipe, TextSource
from retrofit.system.resume import ResumeKey
from retrofit.workflow.artifact import from_json
from retrofit.workflow.estimate.cost import BASE_BYTES, CHUNK, GPU_CHUNK, Cost, CostModel
from retrofit.workflow.step import Inputs, Place, Step
from retrofit.workflow.windowing import after_windows

if TYPE_CHECKING:
    from retrofit.context.search.outcome import SearchResult
    from retrofit.workflow.context import ModelContext


NEAR_LAUNCHES = 4  # how many times as long a pass takes to launch whose attention sees nearby tokens only


class Extend(Step):
    """Write the newest checkpoint with a longer window; a search resumes after its last own trial after a kill."""

    name = "extend"
    version = "4"
    learns = True
    reads_for = "search"
    section: Context

    def __init__(self, recipe: Recipe, section: Context) -> None:
        super().__init__(recipe, section)

    @property
    def texts(self) -> tuple[TextSource, ...]:
        return self.section.searches.text if self.section.searches else ()

    @property
    def keeps_work(self) -> bool:
        return self.section.searches is not None

    def label(self, models: Iterable[str]) -> str:
        """A conversion before it is not measured alone: both together are the converted model."""
        return "converted" if "converted" in models else "extended"

    def check(self, context: ModelContext) -> Iterable[str]:
        from retrofit.context import rope
        from retrofit.context.lint import require_clean
        from retrofit.model.side_files import side_file

        section, method, config = self.section, str(self.section.method), context.config
        if self.recipe.window is not None:  # full layers alone are extended then
            config = after_windows(self.recipe.window, config, context.spec)
        held = context.held_scale(context.model.path)
        for name in rope.SIDE_FILES:
            side_file(context.model.path, name)
        if section.searches:
            rungs(context.claimed, section.searches.tokens_for(context.claimed))
            portable = section.searches.portable
            first = candidates(config, length=context.claimed, count=1, portable=portable, held=held)
            method = first[0].method
        encoded, planned = rope.extend_and_plan(config, method=method, held=held, **self._target())
        require_clean(rope.lint(encoded), "context")
        return () if section.searches else planned.notes

    def check_here(self, context: ModelContext) -> Iterable[str]:
        if self.section.searches:
            context.require_kernel("auto")
        return ()

    def reads_by_name(self, context: ModelContext) -> bool:
        """As a conversion does: a checkpoint with older names is one that neither takes."""
        return True

    def _target(self) -> dict[str, Any]:
        section = self.section
        return {"length": section.length, "factor": section.factor, "settings": section.settings}

    def estimate(self, model: CostModel) -> Cost:
        section, facts, spec = self.section, model.facts, model.after
        does = f"{section.method}: {model.native:,} to {model.claimed:,} positions"
        disk = facts.weight_bytes
        if not any(layer.rope for layer in spec.layers):
            table = model.value_bytes * model.claimed * spec.hidden_size
            return Cost(self.name, f"{does}; the position table is interpolated", BASE_BYTES, disk + table, 2)
        search = section.searches
        wanted = section.attention_factor
        if search is None and wanted is None and not folds(spec.family, str(section.method)):
            seconds = 1.0 + model.disk_seconds(2)
            return Cost(self.name, f"{does}; only config.json changes", BASE_BYTES, disk, seconds)
        if search is None:
            does += f"; the weights of the queries hold the attention factor{'' if wanted is None else f' {wanted:g}'}"
            return Cost(self.name, does, BASE_BYTES, disk, 2)
        plan = rungs(model.claimed, search.tokens_for(model.claimed))
        usual = GPU_CHUNK if model.throughput.launch_seconds else CHUNK
        chunk = self.recipe.evaluate.chunk if self.recipe.evaluate else usual
        seconds = 0.0
        for rung, (size, count) in enumerate(plan, start=1):
            call = min(chunk, size)
            seconds += model.seconds(min(size, model.native), size, call=call)
            if size == model.claimed or rung == 1:
                seconds += model.seconds(size * count, size, call=call)
            else:  # all of the window is read, the last tokens see all of it
                tail = min(TAIL, model.claimed // 4)
                near = 2 * (model.claimed // NEAR)
                seconds += model.seconds((model.claimed - tail) * count, near, call=call, launches=NEAR_LAUNCHES)
                seconds += model.seconds(tail * count, 2 * model.claimed, call=call)
        tried = ", ".join(f"{count} x {size:,}" for size, count in plan)
        does += f"; encodings x tokens that each counts as: {tried}"
        # The winner's attention factor may have to be written into the weights.
        peak = BASE_BYTES + 2 * facts.weight_bytes + spec.kv_cache_bytes(model.claimed, 4)
        return Cost(self.name, does, peak, disk, seconds)

    def record(self) -> dict[str, Any]:
        return record_of(self.section)

    def recorded(self, report: ExtendReport) -> dict[str, Any]:
        found = super().recorded(report)
        return found if report.search else {key: value for key, value in found.items() if key != "search"}

    def restored(self, stored: Mapping[str, Any]) -> ExtendReport:
        return from_json(ExtendReport, stored)

    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        settings = self.record()
        read: dict[str, object] = {"checkpoint": inputs.digests}
        if self.section.searches:
            settings |= {"seed": self.recipe.seed, "kernel": self.recipe.kernel}
            read |= {"text": identity(self.texts)}
        return ResumeKey(self.name, self.version, settings, read)

    @property
    def distributed(self) -> bool:
        return self.section.searches is not None

    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> ExtendReport | None:
        """The report, on rank 0: the others take part in a search, and not in what is written after it."""
        from retrofit.context.rope import write_extended

        source, found = inputs.current.model, None
        method, settings = str(self.section.method), self.section.settings
        held = context.held_scale(source.path)
        if self.section.searches:
            found = self._search(context, inputs, place, held)
            method, settings = found.method, found.settings
        if not context.world.main:
            return None
        with place.staged() as folder:
            extension = write_extended(
                source,
                folder,
                length=self.section.length,
                factor=self.section.factor,
                method=method,
                settings=settings,
                held=held,
                link=self.recipe.link,
            )
            values = {field.name: getattr(extension, field.name) for field in fields(extension)}
            report = ExtendReport(**values, search=found)
            self.after(inputs.current.provenance, self.recorded(report)).write(folder)
        return report

    def _search(self, context: ModelContext, inputs: Inputs, place: Place, held: float) -> SearchResult:
        from retrofit.context.search.halving import search
        from retrofit.data.search_text import searched_text
        from retrofit.evaluation.folders import kernel_for

        section, source, device = self.section.searches, inputs.current.model, context.device
        assert section
        model = source.load(dtype=source.working_dtype("auto", device), device=device)
        length = self.section.target(source.spec.max_position_embeddings)
        ids_T, name = context.world.only(
            lambda: searched_text(
                section,
                source.tokenizer,
                length,
                seed=self.recipe.seed,
                teacher=context.samples,
                progress=context.progress,
            )
        )
        context.note(f"search: position encodings for {length:,} tokens, measured on {name}")
        choice = kernel_for(model, source, self.recipe.kernel, device)
        found = search(
            model,
            source.tokenizer,
            ids_T,
            section=section,
            name=name,
            seed=self.recipe.seed,
            held=held,
            kernel=None if choice.requested == "auto" else choice,
            identity=dict(inputs.digests),
            partial=place.work / "search",
            world=context.world,
            progress=context.progress,
        )
        won, reference = found.winner, found.reference
        context.note(
            f"search: {won.label}, objective {won.objective:.3f}; {reference.label}: {reference.objective:.3f}"
        )
        del model
        gc.collect()
        return found


def record_of(section: Context) -> dict[str, Any]:
    """A `context` section as JSON values, without what its method does not read."""
    unused = {name for name, value in section.model_dump().items() if value is None}
    section = section.model_copy(update={"search": section.searches})
    unused -= {"search"} if section.search else set()
    return section.model_dump(mode="json", exclude=unused)
