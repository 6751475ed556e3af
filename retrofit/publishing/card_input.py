"""What a model card says, as data, and the refusal of what is not known: never a placeholder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.hub import is_repo_id, license_problem

if TYPE_CHECKING:
    from retrofit.context.engines import Tried
    from retrofit.evaluation.metrics.effective import EffectiveLength
    from retrofit.evaluation.metrics.frequency import FrequencyBand
    from retrofit.evaluation.metrics.perplexity import Row
    from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
    from retrofit.publishing.engines.trial import EngineTrial
    from retrofit.publishing.gguf.writing import GgufReport


@dataclass(frozen=True)
class Recovery:
    """The training behind the card: loss (`distill` | `lm`), tokens in all, LoRA rank, names of the text sources, the
    highest learning rate of the schedule and the speed it ran at. passages: the held-out loss of passages out of sight
    before and after, None where no window hides them. kept: of how many steps the weights are after which,
    (0, n) where no step was better than the start; None where that is not recorded."""

    loss: str
    tokens: int
    rank: int
    sources: tuple[str, ...]
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    kept: tuple[int, int] | None = None
    passages: tuple[float, float] | None = None


@dataclass(frozen=True)
class Windows:
    """Sliding windows behind the card: in how many layers, and in words which, with which sinks and at what loss."""

    count: int
    layers: str
    sinks: str
    losses: str


@dataclass(frozen=True)
class CardModel:
    """Perplexities of one model, its scores in tasks, and what these are against the original's; label is `original`,
    `converted` or `recovered`. not_asked: by task, questions whose prompt its window does not hold. by_frequency: what
    it lost, by rank of the token."""

    label: str
    rows: Sequence[Row]
    tasks: Sequence[TaskScore] = ()
    task_changes: Sequence[TaskChange] = ()
    not_asked: Mapping[str, int] = field(default_factory=dict)
    by_frequency: Sequence[FrequencyBand] = ()


@dataclass(frozen=True)
class CardInput:
    """What a card says.

    base_model: hub id of the source. revision: its commit, if it came from the hub. license: hub license id. A card
    without one of the two says that it is not known.
    kv_heads: (before, after). kv_cache_bytes: {tokens: (before, after)}. conversion: method, None when the heads were
    left. windows: None when none were made. context_method: None when the context was left; encodings_tried: by the
    search that found it. effective: how much of the context the published model is shown to use, None when that was not
    asked for.
    models: the original first, the published one last. chart: path inside the folder. snippet: what `reload` executes.
    tolerance: what `reload` allows a token's loss and the mean of 1,024 to differ by, in nats. languages, tags: of the
    source's card. speed: what was measured of decoding on a GPU, as a sentence. seen: by kind of text, what it was read
    for by the steps that made the published model. engines: what others gave for this very folder; tried: what they
    gave for tiny models of the same kind. gguf: files of llama.cpp's beside it. older_names: keys of config.json that
    transformers 5 reads and does not write.
    """

    title: str
    base_model: str | None
    license: str | None
    architecture: str
    dtype: str
    layers: int
    kv_heads: tuple[int, int]
    native_length: int
    claimed_length: int
    models: tuple[CardModel, ...]
    kv_cache_bytes: Mapping[int, tuple[int, int]]
    recipe_yaml: str
    commands: tuple[str, ...]
    versions: Mapping[str, str]
    snippet: str
    conversion: str | None = None
    windows: Windows | None = None
    context_method: str | None = None
    encodings_tried: int = 0
    effective: EffectiveLength | None = None
    recovery: Recovery | None = None
    revision: str | None = None
    chart: str | None = None
    kernel: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    tolerance: tuple[float, float] | None = None
    speed: str = ""
    seen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    engines: tuple[EngineTrial, ...] = ()
    tried: tuple[Tried, ...] = ()
    gguf: GgufReport | None = None
    older_names: tuple[str, ...] = ()


def require_known(card: CardInput) -> None:
    """UserError that lists every value of the card which is not known, but for base model and license, which a card may
    lack until it is published."""
    problems = _problems(card)
    if problems:
        raise unknown(problems)


def require_usable_identity(
    license: str | None, base_model: str | None, name: str | None = None, link: str | None = None
) -> None:
    """UserError for a license or base model that the hub does not accept; cheap, so that a run tells it before hours of
    work. None, which is not known, is left out of the card; publishing asks for it.

    name, link: of the license `other`.
    """
    problems = _identity_problems(license, base_model, name, link)
    if problems:
        raise unknown(problems)


def unknown(problems: Sequence[str]) -> UserError:
    """The error that lists what is not known of a card."""
    listed = "".join(f"\n  - {problem}" for problem in problems)
    return UserError(f"the model card cannot be written:{listed}", where="README.md", fix="give the values named above")


def _identity_problems(
    license: str | None, base_model: str | None, name: str | None = None, link: str | None = None
) -> list[str]:
    problem = license_problem(license, name, link) if license else None
    problems = [problem] if problem else []
    if base_model and not is_repo_id(base_model):
        problems.append(f"`{shown(base_model, 60)}` is not a hub id; give --set publish.base_model=ORG/NAME")
    return problems


def _problems(card: CardInput) -> list[str]:
    problems = _identity_problems(card.license, card.base_model, card.license_name, card.license_link)
    for name in ("title", "architecture", "dtype", "recipe_yaml", "commands", "versions", "snippet", "kv_cache_bytes"):
        value = getattr(card, name)
        if not value or (isinstance(value, str) and not value.strip()):
            problems.append(f"{name} is empty")
    if not card.models or not all(model.rows for model in card.models):
        return [*problems, "no perplexity was measured; keep `evaluate` in the recipe"]
    places = {(row.kind, row.length) for row in card.models[-1].rows}
    for model in card.models:
        missing = sorted(places - {(row.kind, row.length) for row in model.rows})
        problems += [f"perplexity of the {model.label} model at {n} tokens on {k} is missing" for k, n in missing]
        problems += [
            f"perplexity of the {model.label} model at {row.length} tokens on {row.kind} is not finite"
            for row in model.rows
            if not all(math.isfinite(value) for value in (row.ppl, row.low, row.high))
        ]
    return problems
