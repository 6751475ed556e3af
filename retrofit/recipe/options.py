"""Which options of a command set which keys of a recipe: one table for the command line, the Python functions and the
wording of errors. Name, type, choices, help and default of an option are those of the key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from retrofit.errors import UserError
from retrofit.recipe.layers import FULL_LAYERS
from retrofit.recipe.load import validate
from retrofit.recipe.problems import section_at
from retrofit.recipe.relative import RELATIVE_HEADS
from retrofit.recipe.schema import Recipe, TextSource
from retrofit.recipe.values import LISTED, TOKEN_COUNT

Kind = Literal["flag", "choice", "layers", "tokens", "whole", "number", "text"]
METAVARS: Mapping[Kind, str] = {
    "flag": "",
    "choice": "",
    "layers": "auto|N|1/4|0,7",
    "tokens": "N",
    "whole": "N",
    "number": "F",
    "text": "TEXT",
}


@dataclass(frozen=True)
class Option:
    """An option of a command.

    path: of the key that it sets. name: of the parameter in Python. flag: on the command line.
    """

    path: str
    name: str
    flag: str

    @property
    def key(self) -> tuple[str, ...]:
        """The parts of the path."""
        return tuple(self.path.split("."))

    @property
    def field(self) -> FieldInfo:
        """The key in the recipe language: its type, default and description."""
        section = section_at(Recipe, self.key[:-1])
        assert section is not None
        return section.model_fields[self.key[-1]]

    @property
    def kind(self) -> Kind:
        """What one value is."""
        return _kind(self.field)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed, where not every one is."""
        if self.kind != "choice":
            return ()
        return tuple(
            word for part in _parts(self.field.annotation) if get_origin(part) is Literal for word in get_args(part)
        )

    @property
    def many(self) -> Literal["commas", "repeated"] | None:
        """How several values are given on the command line; None for an option with one value."""
        if LISTED in self.field.metadata:
            return "commas"
        if FULL_LAYERS in self.field.metadata:
            return None
        return "repeated" if any(get_origin(part) is tuple for part in _parts(self.field.annotation)) else None

    @property
    def metavar(self) -> str:
        """What stands for the value in a usage line."""
        one = f"[{'|'.join(self.choices)}]" if self.choices else METAVARS[self.kind]
        return f"{one},{one}" if self.many == "commas" else one

    @property
    def default(self) -> str | None:
        """The default as it is written on a command line; None where there is none, or it depends."""
        value = None if self.field.is_required() else self.field.get_default(call_default_factory=True)
        if value is None or value is False or value == ():
            return None
        values = value if isinstance(value, tuple) else (value,)
        return ",".join(one.source if isinstance(one, TextSource) else str(one) for one in values)


def _option(path: str, name: str | None = None, flag: str | None = None) -> Option:
    name = name or path.rpartition(".")[2]
    return Option(path, name, flag or f"--{name.replace('_', '-')}")


_SOURCE = (_option("model"), _option("revision"))
_CALIBRATE = _option("convert.calibration.text", "calibrate")
_MACHINE = (_option("device"), _option("seed"))

OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "run": _SOURCE,
    "plan": _SOURCE,
    "prices": (*_SOURCE, _CALIBRATE, _option("device")),
    "window_prices": (*_SOURCE, _option("window.size"), _option("device")),
    "budget_prices": (*_SOURCE, _option("window.size"), _option("device")),
    "inspect": _SOURCE,
    "convert": (
        *_SOURCE,
        _option("convert.kv_heads"),
        _option("convert.method"),
        _option("convert.repair"),
        _CALIBRATE,
        _option("convert.calibration.tokens"),
        _option("dtype"),
        *_MACHINE,
    ),
    "window": (
        *_SOURCE,
        _option("window.size"),
        _option("window.full_layers"),
        _option("window.sinks"),
        _option("window.target"),
        _option("window.repair"),
        _option("window.text_loss"),
        _option("window.answer_loss"),
        _option("window.calibration.text", "calibrate"),
        _option("window.calibration.tokens"),
        _option("window.calibration.sequence_length"),
        _option("window.calibration.measured_tokens"),
        _option("dtype"),
        *_MACHINE,
    ),
    "extend": (
        *_SOURCE,
        _option("context.length"),
        _option("context.factor"),
        _option("context.method"),
        _option("context.attention_factor"),
        _option("context.search.text"),
        _option("context.search.tokens"),
        _option("link"),
        *_MACHINE,
    ),
    "recover": (
        _option("model"),
        _option("recover.tokens"),
        _option("recover.text"),
        _option("recover.loss"),
        _option("recover.loss_on"),
        _option("recover.divergence"),
        _option("recover.on_policy"),
        _option("recover.sequence_length"),
        _option("recover.batch_size"),
        _option("recover.learning_rate"),
        _option("recover.find_learning_rate"),
        _option("recover.adapter.rank"),
        _option("recover.adapter.norms"),
        _option("recover.positions"),
        _option("recover.short_share"),
        _option("recover.document_masking"),
        _option("recover.gradient_checkpointing"),
        _option("recover.allow_repeats"),
        _option("recover.keep_adapter"),
        _option("recover.report_to"),
        _option("recover.distribute.sequence", "sequence_parallel"),
        _option("recover.sequence_engine"),
        _option("kernel"),
        *_MACHINE,
    ),
    "evaluate": (
        *_SOURCE,
        _option("evaluate.text"),
        _option("evaluate.lengths"),
        _option("evaluate.documents"),
        _option("evaluate.loss_on"),
        _option("evaluate.needle.lengths", "needle"),
        _option("evaluate.needle.depths"),
        _option("evaluate.needle.multi_key"),
        _option("evaluate.ruler.lengths", "ruler"),
        _option("evaluate.common_knowledge"),
        _option("evaluate.tasks.names", "tasks", "--task"),
        _option("evaluate.tasks.folder", "task_folder"),
        _option("evaluate.tasks.fewshot"),
        _option("evaluate.tasks.limit"),
        _option("evaluate.tasks.apply_chat_template"),
        _option("evaluate.tasks.system_instruction"),
        _option("evaluate.tasks.log_samples"),
        _option("evaluate.context_gain"),
        _option("evaluate.long_ppl"),
        _option("evaluate.definitions", flag="--definition"),
        _option("evaluate.document_tokens"),
        _option("evaluate.sequence_parallel"),
        _option("kernel"),
        _option("evaluate.dtype"),
        _option("evaluate.kv_cache_dtype"),
        _option("device"),
    ),
    "certify": (
        _option("evaluate.text"),
        _option("evaluate.lengths"),
        _option("evaluate.documents"),
        _option("publish.engines", flag="--engine"),
        _option("publish.engine_tokens"),
        _option("publish.gguf"),
        _option("publish.make_environments", flag="--make-environment"),
        _option("kernel"),
        _option("device"),
    ),
    "export": (
        _option("publish.gguf"),
        _option("publish.make_environments", flag="--make-environment"),
        _option("publish.reload_tokens"),
        _option("evaluate.text"),
        _option("evaluate.lengths"),
        _option("evaluate.documents"),
        _option("device"),
    ),
    "publish": (
        _option("publish.license"),
        _option("publish.license_name"),
        _option("publish.license_link"),
        _option("publish.base_model"),
    ),
}
"""The options of each command that set keys of a recipe; `prices` is `plan --kv-heads`, `window_prices`
`plan --windows`, `budget_prices` `plan --kv-budget`."""

SECTIONS = ("convert", "window", "context", "recover", "evaluate", "publish")


def recipe_of(command: str, given: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe with the one step of a command.

    given: by the names of its parameters, others are ignored; None and an empty list mean as the recipe language has
    it. base: values that the options are laid over. Raises RecipeError in the words of the options.
    """
    values: dict[str, Any] = {"name": command, **dict.fromkeys(SECTIONS), **(base or {})}
    asked = [(option, given[option.name]) for option in OPTIONS[command] if _is_given(given.get(option.name))]
    _require_sections(values, [option for option, _ in asked], command)
    for option, value in asked:
        lay_over(values, option.key, value)
    return validate(values, Recipe, "options", option_of(command))


def lay_over(values: dict[str, Any], key: Sequence[str], value: Any) -> None:
    """Set the value at `key`, in sections that are made where there are none."""
    *sections, last = key
    for name in sections:
        values[name] = dict(values.get(name) or {})
        values = values[name]
    values[last] = _plain(value)


def _plain(value: Any) -> Any:
    """Paths as text, and other sequences as lists."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def option_of(command: str) -> Callable[[Sequence[str | int]], str | None]:
    """What gives the option of a command that sets the value of a key; None for a section that several set."""

    def find(key: Sequence[str | int]) -> str | None:
        words = tuple(part for part in key if isinstance(part, str))
        exact = [option.flag for option in OPTIONS[command] if words[: len(option.key)] == option.key]
        inside = [option.flag for option in OPTIONS[command] if words and option.key[: len(words)] == words]
        return next(iter(exact), None) or (next(iter(inside), None) if len(words) > 1 else None)

    return find


def in_options(command: str, text: str) -> str:
    """A message with the options of a command for the keys that they set: `--lengths` for `evaluate.lengths`, and
    `--loss lm` for `loss: lm`."""
    for option in sorted(OPTIONS[command], key=lambda option: -len(option.path)):
        if len(option.key) > 1:
            text = re.sub(rf"(?<![\w./-])(`?){re.escape(option.path)}(?![\w.])\1", option.flag, text)
        if option.path not in ("model", "revision"):
            written = rf"(?<![\w./-])(?:{re.escape(option.key[-1])}|{option.flag}): (?=[\w\[])"
            if option.kind == "flag":
                text = re.sub(rf"{written}true\b", option.flag, text)
            else:
                text = re.sub(written, f"{option.flag} ", text)
    return text


def _is_given(value: object) -> bool:
    """Whether an option was given: False, 0 and "" were, and are refused by what they are meant for."""
    return value is not None and value != () and value != []


def _require_sections(values: Mapping[str, Any], asked: Sequence[Option], command: str) -> None:
    """UserError for options of a part that the recipe has not, without the option that makes it."""
    paths = {option.path for option in asked}
    for option in OPTIONS[command]:
        *parts, _ = option.key
        if len(parts) < 2 or not option.field.is_required() or option.path in paths:
            continue
        others = [other.flag for other in asked if list(other.key[:-1]) == parts]
        if others and not (values.get(parts[0]) or {}).get(parts[1]):
            raise UserError(
                f"there is no {parts[1].removesuffix('s')} test to apply this to",
                where=" and ".join(others),
                fix=f"add {option.flag} {option.metavar}, or a --suite that has one",
            )


def _parts(annotation: Any) -> Iterator[Any]:
    """A type and the types inside it, without those of sections."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _parts(argument)


def _kind(field: FieldInfo) -> Kind:
    parts = list(_parts(field.annotation))
    if FULL_LAYERS in field.metadata:
        return "layers"
    if TOKEN_COUNT in (*field.metadata, *parts) or RELATIVE_HEADS in field.metadata:
        return "tokens"
    if any(get_origin(part) is Literal for part in parts):
        return "choice"
    kinds: tuple[tuple[type, Kind], ...] = ((bool, "flag"), (int, "whole"), (float, "number"))
    return next((kind for basis, kind in kinds if basis in parts), "text")
