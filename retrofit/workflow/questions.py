"""Tasks of lm-evaluation-harness in a recipe: what must hold before they are asked, and asking them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import TaskAnswers
from retrofit.evaluation.tasks.harness import Asked, Harness, ask, open_tasks
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Evaluate, Recipe
from retrofit.system.world import World
from retrofit.workflow.estimate.cost import TaskSize

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.workflow.context import ModelContext


def harness_of(recipe: Recipe) -> Harness | None:
    """The tasks that a recipe asks, with their data; None without. Raises UserError as `open_tasks` does."""
    section = recipe.evaluate.tasks if recipe.evaluate else None
    return open_tasks(section) if section else None


def sizes(harness: Harness | None) -> tuple[TaskSize, ...]:
    """What a plan needs to know of tasks."""
    return tuple(
        TaskSize(one.name, one.questions, one.requests, one.request_bytes, one.longest_bytes, one.generated)
        for one in (harness.tasks if harness else ())
    )


@dataclass(frozen=True)
class Questions:
    """The tasks of an `evaluate` section, asked of one model after another."""

    harness: Harness
    section: Evaluate
    kernel: str
    device: str
    world: World
    progress: Progress | None

    @classmethod
    def of(cls, context: ModelContext, section: Evaluate) -> Questions:
        """Those of a command."""
        assert context.harness is not None
        return cls(context.harness, section, context.recipe.kernel, context.device, context.world, context.progress)

    def key(self, asked: Asked) -> dict[str, Any]:
        """What decides about the answers to one task beside the model."""
        assert self.section.tasks
        how = self.section.tasks.model_dump(mode="json", include={"fewshot", "limit", "batch_size"})
        version, dtype = self.harness.version, self.section.dtype
        return {**how, "task": asked.name, "digest": asked.digest, "harness": version, "dtype": dtype}

    def keys(self) -> list[dict[str, Any]]:
        """`key` of every task."""
        return [self.key(asked) for asked in self.harness.tasks]

    @contextmanager
    def reader(self, model: ModelFolder, length: int) -> Iterator[Callable[[Asked], TaskAnswers]]:
        """A function that asks the model one task. The model is loaded when the first is asked, and given back at the
        end. length: most tokens of a request, where the model has more positions."""
        from retrofit.evaluation.folders import ready

        tasks = self.section.tasks
        assert tasks
        loaded: list[Any] = []

        def answers(asked: Asked) -> TaskAnswers:
            if not loaded:
                loaded.append(ready(model, self.section, self.kernel, self.device)[0])
            return ask(
                self.harness,
                asked,
                loaded[0],
                model.tokenizer,
                tasks,
                length=min(length, model.spec.max_position_embeddings),
                resamples=self.section.resamples,
                world=self.world,
                progress=self.progress,
            )

        try:
            yield answers
        finally:
            loaded.clear()
            gc.collect()


def check_tasks(recipe: Recipe, harness: Harness, config: Any, kernel: str) -> None:
    """UserError for what would fail later: a batch that the kernel or the positions do not allow, and requirements on
    tasks or metrics that are not asked for. config: of the model; kernel: what it will be read with."""
    from retrofit.model.frequencies import varying

    section = recipe.evaluate.tasks if recipe.evaluate else None
    assert section
    if section.batch_size > 1:
        generating = next((asked.name for asked in harness.tasks if asked.generated), None)
        reason = None
        if varying(config.get_text_config()):
            reason = "the positions of this model change with the length, and those of a batch are padded to one length"
        elif generating and kernel == "blockwise":
            reason = f"`{generating}` generates text, and the blockwise kernel cannot read padding in front of it"
        if reason:
            raise UserError(reason, where="evaluate.tasks.batch_size", fix="write batch_size: 1")
    known = {asked.name: asked for asked in harness.tasks}
    for key in recipe.require:
        measure, _, name = key.partition("@")
        if measure not in ("task", "task_drop"):
            continue
        name, _, metric = name.partition("/")
        if name not in known:
            raise UserError(
                f"no task `{name}` is asked", where=f"require.{key}", fix=f"use one of {', '.join(sorted(known))}"
            )
        metrics = known[name].metrics
        if metric and metric.partition(",")[0] not in metrics:
            raise UserError(
                f"the task `{name}` has no metric `{metric}`",
                where=f"require.{key}",
                fix=f"use one of {', '.join(metrics)}",
            )
