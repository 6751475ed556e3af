"""A longer window by rewriting the position encoding: linear, ntk, yarn, llama3, longrope, or the length alone (none).

`extend` gives the configuration, `extend_fields` the same for a `config.json` dict, `write_extended` a folder. Written
is what stock transformers 5 reads (`rope_parameters`) and, with the same values, the older names (`rope_theta`,
`rope_scaling`) that other engines and older releases look for. The original length and theta are always explicit.

An already extended model is extended further with the method it has, from its true original length; another method on
top of it is refused, because its weights were trained with the first. phi3 knows longrope only: there a method is known
by the lists that its defaults give, and any other lists are followed by new lists alone. Models with learned positions
get a longer table.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import is_number
from retrofit.checkpoint.side_files import GENERATION, TOKENIZER
from retrofit.context import learned
from retrofit.context.engines import Tried, tried
from retrofit.context.extension import Extension
from retrofit.context.fields import LAYER_THETAS, as_dict, text_part, views
from retrofit.context.frequencies import frequencies
from retrofit.context.lint import Finding, lint, lint_folder, recorded, require_clean
from retrofit.context.methods import METHODS, extended
from retrofit.context.names import portable, replaced, with_theta
from retrofit.model.side_files import side_file
from retrofit.recipe.schema import RopeSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from retrofit.model.folder import ModelFolder

__all__ = [
    "METHODS",
    "Extension",
    "Finding",
    "RopeSettings",
    "Tried",
    "extend",
    "extend_and_plan",
    "extend_fields",
    "frequencies",
    "lint",
    "lint_folder",
    "plan",
    "portable",
    "recorded",
    "tried",
    "write_extended",
]

DEFAULTS = RopeSettings()
_SET = (
    "max_position_embeddings",
    "max_sequence_length",
    "original_max_position_embeddings",
    "rope_parameters",
    LAYER_THETAS,
    "head_dim",
)
SIDE_FILES = (TOKENIZER, GENERATION)
"""Files beside config.json that hold the window too."""


def extend(
    config: PretrainedConfig,
    *,
    length: int | None = None,
    factor: float | None = None,
    method: str,
    settings: RopeSettings = DEFAULTS,
    held: float = 1.0,
) -> PretrainedConfig:
    """A copy of `config` whose window is `length` tokens, or `factor` times its present window (exactly one of them).

    Only full-attention layers are extended where layers have their own parameters (Gemma 3); layers without rotary
    encoding (SmolLM3) have nothing to extend. Learned positions need their table rewritten as well, an attention factor
    the weights of the queries (`write_extended`). held: as of `plan`.
    Raises UserError: unknown method, length not above the present window, a factor that gives no whole number of
    tokens, an encoding this method cannot be put on.
    """
    return extend_and_plan(config, length=length, factor=factor, method=method, settings=settings, held=held)[0]


def extend_and_plan(
    config: PretrainedConfig,
    *,
    length: int | None = None,
    factor: float | None = None,
    method: str,
    settings: RopeSettings = DEFAULTS,
    held: float = 1.0,
) -> tuple[PretrainedConfig, Extension]:
    """What `extend` gives, and what `plan` says of it; raises the same errors."""
    result = copy.deepcopy(config)
    text = result.get_text_config()
    fields, done = extended(as_dict(text), length=length, factor=factor, method=method, settings=settings, held=held)
    if learned.has_table(as_dict(text)):
        for name, value in fields.items():
            setattr(text, name, value)
        return result, done
    for name in _SET:
        if name in fields:
            setattr(text, name, fields[name])
    if hasattr(text, "rope_theta"):
        text.rope_theta = fields["rope_theta"]
    text.validate_rope()
    return result, done


def plan(
    config: object,
    *,
    length: int | None = None,
    factor: float | None = None,
    method: str,
    settings: RopeSettings = DEFAULTS,
    held: float = 1.0,
) -> Extension:
    """What `extend` would do, without doing it; raises the same errors. Needs no torch.

    held: what earlier extensions multiplied the queries with (`record.held_scale`).
    """
    _, text = text_part(as_dict(config))
    return extended(text, length=length, factor=factor, method=method, settings=settings, held=held)[1]


def extend_fields(
    raw: Mapping[str, Any],
    *,
    length: int | None = None,
    factor: float | None = None,
    method: str,
    settings: RopeSettings = DEFAULTS,
    held: float = 1.0,
    whole: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`config.json` with a longer window: the position fields are replaced, new and old names; all others stay.

    held: as of `plan`. whole: the same configuration without gaps (`names.with_theta`), where `raw` leaves fields to
    the model's class.
    """
    prefix, text = text_part(raw if whole is None else whole)
    fields, _ = extended(text, length=length, factor=factor, method=method, settings=settings, held=held)
    return replaced(raw, prefix, fields)


def write_extended(
    source: str | Path | ModelFolder,
    out: str | Path,
    *,
    length: int | None = None,
    factor: float | None = None,
    method: str,
    settings: RopeSettings = DEFAULTS,
    held: float | None = None,
    link: bool = False,
    overwrite: bool = False,
) -> Extension:
    """Write a checkpoint folder with a longer window: a copy of the weights (link: hard links where the disk allows
    them), a new config.json.

    Learned positions are interpolated, an attention factor multiplies the queries: such weights are written anew.
    held: what earlier extensions multiplied the queries with; by default what the source's record says. The
    tokenizer's `model_max_length` is raised to the new window, and generation's `max_length` where it was the old one;
    a theta that the file leaves to the model's class is written. The new configuration is linted before anything is
    written; an error in it is a UserError.
    """
    from retrofit.checkpoint.copying import copy_file
    from retrofit.checkpoint.extensions import held_scale
    from retrofit.checkpoint.rewrite import rewrite
    from retrofit.checkpoint.side_files import copy_side_files
    from retrofit.checkpoint.staging import staged
    from retrofit.checkpoint.write import write_config
    from retrofit.context.temperature import query_rules
    from retrofit.model.folder import opened

    model, out = opened(source), Path(out)
    checkpoint, loaded = model.checkpoint, model.config
    require_clean(recorded(model.path, loaded), str(model.path))
    raw = with_theta(checkpoint.config, loaded)
    held = held_scale(model.path) if held is None else held
    asked: dict[str, Any] = {"length": length, "factor": factor, "method": method, "settings": settings, "held": held}
    extension, fields = plan(raw, **asked), extend_fields(checkpoint.config, whole=raw, **asked)
    require_clean(lint(fields, loaded), str(out))
    extension = replace(extension, notes=(*_filled_in(checkpoint.config, fields), *extension.notes))
    for name in SIDE_FILES:
        side_file(model.path, name)
    with staged(out, overwrite=overwrite) as folder:
        if learned.has_table(fields):
            learned.rewrite_table(checkpoint, folder, fields, extension.before, extension.length)
        elif extension.query_scale != 1:
            _, text = text_part(raw)
            rules = query_rules(model.spec, text, extension.query_scale)
            rewrite(checkpoint, folder, rules, config=fields)
        else:
            for name in checkpoint.files.names:
                copy_file(model.path / name, folder / name, link=link)
            write_config(folder, fields)
        copy_side_files(model.path, folder)
        tokenizer, generation = SIDE_FILES
        _raise(folder / tokenizer, "model_max_length", extension.length)
        # Any other limit of what is generated was somebody's choice.
        _raise(folder / generation, "max_length", extension.length, only=extension.before)
    return extension


def _filled_in(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[str, ...]:
    """A note where the base was left to the model's class and stands in the new fields."""
    _, text = text_part(raw)
    _, new = text_part(fields)
    stated = [view.parameters.get("rope_theta") is not None for view in views(text)]
    if new.get("rope_theta") is None or (stated and all(stated)):
        return ()
    name = str(text.get("model_type"))
    return (f"config.json left rope_theta to the model's class: the default of transformers for {name} is written.",)


def _raise(path: Path, name: str, length: int, *, only: int | None = None) -> None:
    """Write `length` in the place of a smaller number of the file. only: of this one."""
    settings = side_file(path.parent, path.name)
    limit = settings.get(name)
    if is_number(limit) and limit < length and only in (None, limit):
        settings[name] = length
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
