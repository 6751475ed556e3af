"""The same function as an architecture that can share KV heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import read_config
from retrofit.checkpoint.write import write_config
from retrofit.model.reexpress import FORMAT
from retrofit.recipe.schema import Recipe
from retrofit.system.resume import ResumeKey
from retrofit.workflow.artifact import from_json
from retrofit.workflow.estimate.cost import BASE_BYTES, Cost, CostModel
from retrofit.workflow.step import Inputs, Place, Step

if TYPE_CHECKING:
    from retrofit.model.reexpress import ReexpressReport
    from retrofit.workflow.context import ModelContext


@dataclass(frozen=True)
class Section:
    """target: the wanted model type, where there is a choice."""

    target: str | None = None


class Reexpress(Step):
    """Write the model, the same function, as another architecture. A command of its own; in a recipe a model that
    needs it is re-expressed as it is opened. It resumes from its last own shard after a kill."""

    name = "reexpress"
    version = str(FORMAT)
    section: Section

    def __init__(self, recipe: Recipe, section: Section) -> None:
        super().__init__(recipe, section)

    def label(self, models: Iterable[str]) -> str:
        return "re-expressed"

    def estimate(self, model: CostModel) -> Cost:
        seconds = model.disk_seconds(4) + 1
        return Cost(self.name, "the same function", BASE_BYTES, model.facts.weight_bytes, seconds)

    def key(self, context: ModelContext, inputs: Inputs) -> ResumeKey:
        settings = [self.section.target, self.recipe.dtype]
        return ResumeKey(self.name, self.version, settings, {"checkpoint": inputs.digests})

    def restored(self, stored: Mapping[str, Any]) -> ReexpressReport:
        from retrofit.model.reexpress import ReexpressReport

        return from_json(ReexpressReport, stored)

    def run(self, context: ModelContext, inputs: Inputs, place: Place) -> ReexpressReport:
        from retrofit.context.names import portable
        from retrofit.model.reexpress import reexpress

        with place.staged(place.work / "checkpoint") as folder:
            report = reexpress(
                inputs.current.model,
                folder,
                target=self.section.target,
                dtype=self.recipe.dtype,
                resume=True,
                progress=context.progress,
            )
            write_config(folder, portable(read_config(folder)))
            config: dict[str, Any] = {"target": report.target, "dtype": report.dtype}
            inputs.current.provenance.after(self.name, config, self.recorded(report)).write(folder)
        return report
