"""Tasks of lm-evaluation-harness (Gao et al., EleutherAI) on a model that is loaded already: its prompts, its metrics.

The harness is the optional extra `eval`. `open_tasks` finds the tasks and reads their data, so that whatever is wrong
with a name or a data set is known before any model is read; `ask` then has one model answer one of them.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import machine_error
from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import TaskAnswers
from retrofit.evaluation.tasks.harness_answers import answers_of, logged
from retrofit.evaluation.tasks.harness_reader import GENERATED, Prompts, reader_of
from retrofit.evaluation.tasks.own_prompts import makes_prompts, require_all_lengths
from retrofit.install import install_command
from retrofit.recipe.schema import Tasks
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress

LEAST = (0, 4, 12)  # the first version whose tasks are loaded as here
PROBED = 32  # questions of a task whose requests are counted, for a plan
WHERE = "evaluate.tasks"


@dataclass(frozen=True)
class Asked:
    """One name of a recipe: a task, or a group or tag of several, which are asked together.

    given: as it was written. parts: the harness's objects. questions: of all parts. requests, request_bytes: of all
    questions and on average, generated: tokens that answers may have in all; these three are counted on the first
    `PROBED` questions of each part. longest_bytes: the longest request seen there. metrics: what the parts score.
    digest: of tasks, questions and examples. making: seconds that its own prompts took to make, 0 where they are read.
    """

    name: str
    given: str
    parts: tuple[Any, ...]
    questions: int
    requests: int
    request_bytes: float
    longest_bytes: int
    generated: int
    metrics: tuple[str, ...]
    digest: str
    making: float = 0.0


@dataclass(frozen=True)
class Harness:
    """The tasks of a recipe, found and with their data. manager: the harness's own index of tasks."""

    manager: Any
    tasks: tuple[Asked, ...]
    version: str


def require_harness() -> str:
    """The version of the harness that is installed. Raises UserError without one, or with one that is too old."""
    if util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks are asked by lm-evaluation-harness, which is not installed",
            where=WHERE,
            fix=install_command(extra="eval"),
        )
    version = metadata.version("lm_eval")
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < LEAST:
        raise UserError(
            f"lm-evaluation-harness {version} is older than {'.'.join(map(str, LEAST))}",
            where=WHERE,
            fix=install_command("-U", extra="eval"),
        )
    return version


def open_tasks(section: Tasks, tokenizer: Path | None = None) -> Harness:
    """Find every task that `section` names and read its data. No model is needed.

    tokenizer: folder of that of the model, for tasks that make prompts of given lengths. Raises UserError without the
    harness, for a name that no task has (with those nearest to it), data that cannot be had, and tasks that this cannot
    ask: those that run generated code, or show pictures or sound.
    """
    version = require_harness()
    files = [Path(name) for name in section.names if _is_file(name)]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise UserError(f"there is no task file `{missing[0]}`", where=f"{WHERE}.names", fix="check the path")
    if section.folder is not None and not Path(section.folder).is_dir():
        raise UserError(f"there is no folder `{section.folder}`", where=f"{WHERE}.folder", fix="check the path")
    with _silent():
        manager = _manager(section, tokenizer)
        asked = tuple(_open(manager, name, section) for name in section.names)
    names = [one.name for one in asked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two of the tasks are called `{twice}`", where=f"{WHERE}.names", fix="leave one of them out")
    return Harness(manager, asked, version)


def ask(
    harness: Harness,
    asked: Asked,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: Tasks,
    *,
    prompts: Prompts,
    resamples: int = 2000,
    log: Path | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> TaskAnswers:
    """Have a model answer one task, with the kernel and the dtype that it was loaded with.

    prompts: how long ones are read. log: a file for the prompts and answers of all questions. resamples: for the
    standard error of metrics that are no mean. Seeds, and so the examples that are drawn, are the harness's own
    defaults, which published numbers were made with. world: the processes that make this call, each with the model;
    they share the requests (see `harness_reader`), and rank 0 has the answers that all return.
    """
    from lm_eval import simple_evaluate

    with _silent():
        if progress:
            progress.start(f"task {asked.name}", None, "requests")
        reader = reader_of(model, tokenizer, section.batch_size, prompts, world, progress)
        found = simple_evaluate(
            reader,
            tasks=list(asked.parts),
            num_fewshot=section.fewshot,
            limit=section.limit,
            bootstrap_iters=resamples if world.main else 0,  # only its scores are used
            task_manager=harness.manager,
            apply_chat_template=section.apply_chat_template,
            fewshot_as_multiturn=section.apply_chat_template and section.fewshot_as_multiturn,
            system_instruction=section.system_instruction,
        )
        if progress:
            progress.finish()

    def answered() -> TaskAnswers:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(f"{line}\n" for line in logged(asked.name, found, reader.lengths)), encoding="ascii")
        return answers_of(asked.name, found, harness.version, reader.lengths)

    return world.only(answered)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _manager(section: Tasks, tokenizer: Path | None) -> Any:
    """The index of tasks. The harness's own thousands are read only where a name is not in the folder."""
    from lm_eval.tasks import TaskManager

    names = [name for name in section.names if not _is_file(name)]
    given = {**({"tokenizer": str(tokenizer)} if tokenizer else {}), **_lists(section.metadata)}
    own = TaskManager(include_path=section.folder, include_defaults=False, metadata=given)
    if all(name in own.all_tasks for name in names):
        return own
    manager = TaskManager(include_path=section.folder, metadata=given)
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, manager.all_tasks, n=3, cutoff=0.5)
        meant = f"did you mean {', '.join(f'`{name}`' for name in near)}? " if near else ""
        raise UserError(
            f"lm-evaluation-harness knows no task `{unknown}`",
            where=f"{WHERE}.names",
            fix=f"{meant}`lm_eval ls tasks` lists them; a task of your own is named by its YAML file",
        )
    return manager


def _lists(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """As the harness reads them from JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in metadata.items()}


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as the harness begins with, for tasks that make their prompts while they are loaded: each process
    of a run, and each run, has to make the same."""
    import numpy as np

    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def _open(manager: Any, given: str, section: Tasks) -> Asked:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.constants import HF_HOME

    try:
        with _seeded():
            began = time.monotonic()
            loaded = manager.load([given])
            seconds, parts = time.monotonic() - began, loaded["tasks"].values()
            require_all_lengths(given, parts, section.limit)
            making = seconds if any(map(makes_prompts, parts)) else 0.0
            return replace(_examined(given, loaded, section), making=making)
    except (OSError, DatasetsError) as error:
        raise machine_error(error, HF_HOME) or UserError(
            f"the data of the task `{given}` cannot be had: {_first_line(error)}",
            where=f"{WHERE}.names",
            fix="give access to the hub once (its copies are read afterwards), or a task whose data are files here",
        ) from error
    except ImportError as error:
        raise UserError(
            f"the task `{given}` needs a package that is not installed: {_first_line(error)}",
            where=f"{WHERE}.names",
            fix="install it, or leave the task out",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"the task `{given}` cannot be made: {_first_line(error)}",
            where=f"{WHERE}.names",
            fix="correct its YAML file, or leave the task out",
        ) from error


def _examined(given: str, loaded: Mapping[str, Any], section: Tasks) -> Asked:
    """Count what a task asks. loaded: what the harness made of the name."""
    tasks: dict[str, Any] = dict(loaded["tasks"])
    groups: dict[str, Any] = dict(loaded.get("groups") or {})
    name = next(iter(groups or tasks)) if _is_file(given) else given
    for part, task in tasks.items():
        for flag, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows more than text")):
            if getattr(task, flag, False):
                raise UserError(
                    f"the task `{part}` {what}", where=f"{WHERE}.names", fix="leave it out, or run it with lm_eval"
                )
    questions = requests = generated = longest = 0
    size = 0.0
    metrics: dict[str, None] = {}
    digest = hashlib.sha256()
    for part, task in sorted(tasks.items()):
        _set_examples(task, section.fewshot)
        docs = list(itertools.islice(task.eval_docs, section.limit))
        task.build_all_requests(limit=min(len(docs), PROBED), rank=0, world_size=1)
        seen = [_request(one, task) for one in task.instances]
        scale = len(docs) / min(len(docs), PROBED)
        questions += len(docs)
        requests += round(scale * len(seen))
        size += scale * sum(nbytes for nbytes, _, _ in seen)
        longest = max(longest, *(nbytes for nbytes, _, _ in seen))
        generated += round(scale * sum(tokens for _, tokens, _ in seen))
        metrics |= dict.fromkeys(task.aggregation())
        texts = [text for _, _, text in seen]
        config = task.dump_config()
        if isinstance(config.get("metadata"), dict):  # where the tokenizer lies changes no question
            config["metadata"] = {key: value for key, value in config["metadata"].items() if key != "tokenizer"}
        digest.update(json.dumps([part, config, docs, texts], sort_keys=True, default=str).encode())
    return Asked(
        name=name,
        given=given,
        parts=(groups[next(iter(groups))],) if groups else tuple(tasks.values()),
        questions=questions,
        requests=requests,
        request_bytes=size / requests,
        longest_bytes=longest,
        generated=generated,
        metrics=tuple(metrics),
        digest=digest.hexdigest(),
    )


def _set_examples(task: Any, fewshot: int | None) -> None:
    """As `simple_evaluate` does: a task that fixes none keeps none."""
    own = task.get_config("num_fewshot")
    if own is None or (fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=fewshot or 0)
    task.set_fewshot_seed(seed=1234)


def _request(instance: Any, task: Any) -> tuple[int, int, str]:
    """(bytes that are read, tokens that may be generated, the text) of one request."""
    if instance.request_type == "generate_until":
        text, options = str(instance.args[0]), instance.args[1]
        limit = options.get("max_gen_toks", GENERATED) if isinstance(options, dict) else GENERATED
        return len(text.encode()), int(limit), text
    text = "".join(str(part) for part in instance.args)
    return len(text.encode()), 0, text


@contextmanager
def _silent() -> Iterator[None]:
    """Bars, warnings and prints of the harness and of `datasets` off inside the block; ours say what is going on, and
    stdout is for results."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tqdm.std import tqdm

    logger, shown, begin = logging.getLogger("lm_eval"), not are_progress_bars_disabled(), tqdm.__init__
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    tqdm.__init__ = functools.partialmethod(begin, disable=True)  # the bar of building requests has no switch
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = begin
        logger.setLevel(level)
        if shown:
            enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
