"""Engines that a recipe tries what it publishes in: what is refused or warned of before any work, what it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retrofit.context.engines import does_not_know, of_environment
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.publishing.engines.environments import CONVERTER, find
from retrofit.publishing.engines.run import engine_of
from retrofit.publishing.engines.trial import BEYOND, DOCUMENTS, environments_of
from retrofit.recipe.schema import Publish
from retrofit.workflow.estimate.cost import CostModel

START = {"transformers": 5.0, "vllm": 20.0, "llama.cpp": 1.5, "mlx": 2.0, "ctranslate2": 10.0, CONVERTER: 5.5}
"""Seconds until an engine has loaded a tiny model, or the converter has written one: of one core, measured but
for CTranslate2's, which is a guess."""
PASSES = {"transformers": 1.0, "vllm": 1.2, "llama.cpp": 2.0, "mlx": 20.0, "ctranslate2": 1.0}
"""What scoring takes in an engine, over one pass of transformers in float32 (1,024 tokens of SmolLM2-135M: 5.2 seconds
of one core): vLLM 6.1, llama.cpp 9.7, mlx-lm more than 68 on a CPU, where it was stopped;
CTranslate2's is a guess."""
FLOAT32 = 4


def check_engines(names: Sequence[str], config: object, *, where: str, make: bool) -> Iterator[str]:
    """Notes on engines that the table has computing something else from such a model, or not loading it.

    config: as it will be published. make: environments are made for what is not here. Raises UserError for a release
    that does not know the architecture: what is pinned is the table's, and of what somebody installed it is a note.
    """
    for name in names:
        words, found = does_not_know(config, name), of_environment(config, name)
        environments = [find(one) for one in environments_of(name)]
        pinned = all(make if one is None else one.pinned for one in environments)
        if words is not None and pinned:
            raise UserError(
                f"{name} does not know this architecture: {shown(words)}",
                where=where,
                fix="leave it out; `retrofit inspect` says which engines compute such a model",
            )
        if found is None or found.verdict not in ("differs", "error"):
            continue
        message = f": {shown(found.message)}" if found.message else ""
        does = "does not load" if found.verdict == "error" else "computes something else from"
        yield f"{found.engine} {found.version} {does} a tiny model like this one{message}; this one is tried"


def engine_seconds(section: Publish, model: CostModel) -> float:
    """What trying the engines of a section takes: transformers and a control of it first, then each of them.

    Without the making of environments, which takes as long as the packages take to come.
    """
    if not section.engines:
        return 0.0
    tokens = min(model.claimed - 1, section.engine_tokens or model.native + BEYOND)
    scoring = DOCUMENTS * model.seconds(tokens, tokens, float32=True)
    loading = model.disk_seconds(FLOAT32 / model.value_bytes)
    seconds = START["transformers"] + 2 * (scoring + loading)
    for name in map(engine_of, section.engines):
        seconds += START[name] + PASSES[name] * scoring + loading
        if CONVERTER in environments_of(name):
            seconds += START[CONVERTER] + 2 * loading
    return seconds


def engine_bytes(section: Publish, model: CostModel) -> int:
    """Disk that the engines of a section take for a while: a GGUF file in float32 for llama.cpp."""
    needed = any(CONVERTER in environments_of(name) for name in section.engines)
    return FLOAT32 * model.facts.parameters if needed else 0
