"""Tasks in a recipe, built in or of lm-evaluation-harness: what must hold before they are asked, and asking them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import read_config
from retrofit.errors import UserError
from retrofit.evaluation.tasks import common_knowledge
from retrofit.evaluation.tasks.answers import TaskAnswers
from retrofit.evaluation.tasks.common_knowledge import CommonKnowledge
from retrofit.evaluation.tasks.harness import Asked, Harness, ask, open_tasks
from retrofit.evaluation.tasks.harness_reader import Prompts
from retrofit.model.folder import ModelFolder
from retrofit.model.side_files import side_file
from retrofit.recipe.schema import Evaluate, Recipe
from retrofit.system.world import World
from retrofit.workflow.estimate.cost import TOKEN_BYTES, TaskSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.workflow.context import ModelContext


Task = CommonKnowledge | Asked


def harness_of(recipe: Recipe, model: ModelFolder) -> Harness | None:
    """The tasks of the harness that a recipe asks, with their data; None without. Raises UserError as `open_tasks`
    does.

    model: whose tokenizer measures the prompts that some tasks make. The harness opens it with leave to run the
    folder's own code, so that a folder which names code of its own is not given to it.
    """
    section = recipe.evaluate.tasks if recipe.evaluate else None
    if section is None:
        return None
    named = (side_file(model.path, "tokenizer_config.json"), read_config(model.path))
    return open_tasks(section, None if any("auto_map" in one for one in named) else model.path)


def tasks_of(section: Evaluate | None, harness: Harness | None) -> tuple[Task, ...]:
    """Every task that is asked, those that are built in first."""
    built_in = (CommonKnowledge.of(section.common_knowledge),) if section and section.common_knowledge else ()
    return (*built_in, *(harness.tasks if harness else ()))


def sizes(section: Evaluate | None, harness: Harness | None) -> tuple[TaskSize, ...]:
    """What a plan needs to know of tasks."""
    return tuple(_size(one, section.chunk if section else 0) for one in tasks_of(section, harness))


def _size(task: Task, chunk: int) -> TaskSize:
    if isinstance(task, CommonKnowledge):
        count, each = len(task.questions), task.nbytes / len(task.questions)
        together = max(1, round(chunk * TOKEN_BYTES / each))
        return TaskSize(task.name, count, count, each, 0, 0, together)
    read = (task.requests, task.request_bytes, task.longest_bytes, task.generated)
    return TaskSize(task.name, task.questions, *read, making=task.making)


@dataclass(frozen=True)
class Questions:
    """The tasks of an `evaluate` section, asked of one model after another. harness: for those that it has."""

    tasks: tuple[Task, ...]
    harness: Harness | None
    section: Evaluate
    kernel: str
    device: str
    world: World
    progress: Progress | None

    @classmethod
    def of(cls, context: ModelContext, section: Evaluate) -> Questions:
        """Those of a command."""
        tasks, recipe = tasks_of(section, context.harness), context.recipe
        return cls(tasks, context.harness, section, recipe.kernel, context.device, context.world, context.progress)

    def key(self, asked: Task) -> dict[str, Any]:
        """What decides about the answers to one task beside the model."""
        if isinstance(asked, CommonKnowledge):
            read = self.section.model_dump(mode="json", include={"chunk", "dtype", "kv_cache_dtype"})
            return {**read, "task": asked.name, "digest": asked.digest, "version": common_knowledge.VERSION}
        assert self.section.tasks
        assert self.harness
        how = self.section.tasks.model_dump(mode="json", exclude={"names", "folder"})
        read = {"dtype": self.section.dtype, "kv_cache_dtype": self.section.kv_cache_dtype}
        return {**how, **read, "task": asked.name, "digest": asked.digest, "harness": self.harness.version}

    def keys(self) -> list[dict[str, Any]]:
        """`key` of every task."""
        return [self.key(asked) for asked in self.tasks]

    def logs(self, asked: Task) -> bool:
        """Whether prompts and answers of a task are kept."""
        return bool(not isinstance(asked, CommonKnowledge) and self.section.tasks and self.section.tasks.log_samples)

    @contextmanager
    def reader(
        self, model: ModelFolder, longest: int, native: int
    ) -> Iterator[Callable[[Task, Path | None], TaskAnswers]]:
        """A function that asks the model one task, and keeps prompts and answers in a file. The model is loaded when
        the first is asked, and given back at the end.

        longest: positions of that of the compared models that has most. A model with fewer is not asked what its window
        does not hold; the one with most is shown the end of a prompt that is longer still. native: positions of the
        original, the windows in which whole texts are read.
        """
        from retrofit.evaluation.folders import ready

        loaded: list[Any] = []
        own = model.spec.max_position_embeddings
        prompts = Prompts(min(longest, own), whole=own < longest, rolling=min(native, own))

        def answers(asked: Task, log: Path | None) -> TaskAnswers:
            if not loaded:
                loaded.extend(ready(model, self.section, self.kernel, self.device))
            if isinstance(asked, CommonKnowledge):
                return common_knowledge.ask(
                    asked,
                    loaded[0],
                    model.tokenizer,
                    tokens=self.section.chunk,
                    kernel=loaded[1] if self.kernel != "auto" else None,
                    world=self.world,
                    progress=self.progress,
                )
            assert self.harness
            assert self.section.tasks
            return ask(
                self.harness,
                asked,
                loaded[0],
                model.tokenizer,
                self.section.tasks,
                prompts=prompts,
                resamples=self.section.resamples,
                log=log if self.logs(asked) else None,
                world=self.world,
                progress=self.progress,
            )

        try:
            yield answers
        finally:
            loaded.clear()
            gc.collect()


def require_positions_of_tasks(section: Evaluate, end: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where questions of a built-in task are longer than a table of learned positions. end: of the table."""
    if end is None or not section.common_knowledge:
        return
    from retrofit.evaluation.scoring.reader import require_positions
    from retrofit.evaluation.tasks.multiple_choice import tokenized

    choices = common_knowledge.choices_of(CommonKnowledge.of(section.common_knowledge))
    longest = max(tokenized(tokenizer, one).longest for one in choices)
    require_positions(end, longest, "evaluate.common_knowledge, for the original model")


def require_chat_template(section: Evaluate, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where tasks are asked as turns of a dialogue that the model's chat template cannot write."""
    tasks = section.tasks
    if tasks is None or not tasks.apply_chat_template:
        return
    from retrofit.model.dialogues import write_dialogues

    system = [{"role": "system", "content": tasks.system_instruction}] if tasks.system_instruction else []
    example = [{"role": "user", "content": "Two"}, {"role": "assistant", "content": "three"}]
    turns = [*system, *example, {"role": "user", "content": "four"}]
    list(write_dialogues(tokenizer, [(turns, [], "evaluate.tasks.apply_chat_template")], answered=False))


def check_tasks(recipe: Recipe, harness: Harness | None, config: Any, kernel: str) -> None:
    """UserError for what would fail later: a task by the name of one that is built in, a batch that the kernel or the
    positions do not allow, and requirements on tasks or metrics that are not asked for. config: of the model; kernel:
    what it will be read with."""
    from retrofit.model.frequencies import varying

    section = recipe.evaluate.tasks if recipe.evaluate else None
    if harness and any(asked.name == common_knowledge.NAME for asked in harness.tasks):
        raise UserError(
            f"`{common_knowledge.NAME}` is the name of a task that is built in",
            where="evaluate.tasks.names",
            fix="give the task another name, or write evaluate.common_knowledge: true for the built-in one",
        )
    if section and harness and section.batch_size > 1:
        generating = next((asked.name for asked in harness.tasks if asked.generated), None)
        reason = None
        if varying(config.get_text_config()):
            reason = "the positions of this model change with the length, and those of a batch are padded to one length"
        elif generating and kernel == "blockwise":
            reason = f"`{generating}` generates text, and the blockwise kernel cannot read padding in front of it"
        if reason:
            raise UserError(reason, where="evaluate.tasks.batch_size", fix="write batch_size: 1")
    known = {asked.name: asked for asked in tasks_of(recipe.evaluate, harness)}
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
