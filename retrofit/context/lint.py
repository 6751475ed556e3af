"""The linter of position encodings: what loads without a word and computes something else.

Works on a `config.json` dict, where gaps still show, and on a transformers configuration, where class defaults have
already filled them in. Each rule is one function from the facts of a configuration to findings: those about structure
in `rules.structure`, those about meaning in `rules.meaning`, and those about the files beside config.json here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import is_number, is_whole, read_config
from retrofit.checkpoint.extensions import first_original
from retrofit.checkpoint.side_files import GENERATION, TOKENIZER
from retrofit.context.fields import RopeView, as_dict, class_thetas, completed, original_length, text_part, views
from retrofit.context.names import portable
from retrofit.context.rules import meaning, structure
from retrofit.context.rules.facts import Facts, Finding
from retrofit.errors import UserError
from retrofit.model.side_files import side_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Finding", "lint", "lint_folder", "recorded", "require_clean"]
_RULES = (*structure.RULES, *meaning.RULES)


def lint(config: object, loaded: PretrainedConfig | None = None) -> list[Finding]:
    """Findings about the position encoding of a `config.json` dict or a transformers configuration, errors first.

    loaded: what the model's class makes of the same dict, where it fills in other fields than the rotary ones.
    """
    prefix, raw = text_part(completed(as_dict(config), loaded) if loaded is not None else as_dict(config))
    thetas = class_thetas(loaded) if loaded is not None else {}
    facts = Facts(raw, views(raw), raw.get("max_position_embeddings"), prefix, thetas)
    found = [
        Finding(one.severity, prefix + one.where, one.what, one.fix, one.rule) for rule in _RULES for one in rule(facts)
    ]
    return sorted(found, key=lambda one: one.severity != "error")


def lint_folder(path: str | Path, loaded: PretrainedConfig | None = None) -> list[Finding]:
    """`lint` on the folder's config.json as stored, and other files' limits against the window it claims."""
    raw = read_config(path)
    whole = raw if loaded is None else completed(raw, loaded)
    tokenizer, generation = (side_file(path, name) for name in (TOKENIZER, GENERATION))
    found = [*recorded(path, loaded), *lint(raw, loaded)]
    sound = not any(one.severity == "error" for one in found)
    return [
        *found,
        *(_older_names(raw) if sound else ()),
        *_tokenizer(whole, tokenizer),
        *_generation(whole, generation),
    ]


def recorded(path: str | Path, loaded: PretrainedConfig | None) -> list[Finding]:
    """An error where retrofit.json records an extension, which wrote a base, and config.json has none any more.

    loaded: the configuration as the model's class, where that has rotary encodings.
    """
    if loaded is None or not class_thetas(loaded):
        return []
    prefix, raw = text_part(read_config(path))
    stated = [view.parameters.get("rope_theta") is not None for view in views(raw)]
    if (stated and all(stated)) or first_original(Path(path)) is None:
        return []
    what = "rope_theta is missing, and retrofit.json records an extension, which had written it"
    return [Finding("error", f"{prefix}rope_parameters", what, "take config.json from that extension", "theta-lost")]


def require_clean(findings: Sequence[Finding], where: str) -> None:
    """UserError that lists every finding of severity error; warnings pass."""
    errors = [one for one in findings if one.severity == "error"]
    if errors:
        listed = "\n".join(f"    {one.where}: {one.what}" for one in errors)
        raise UserError(
            f"The position encoding would compute something else than written:\n{listed}",
            where=where,
            fix="; ".join(dict.fromkeys(one.fix for one in errors)),
        )


def _older_names(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Saving with transformers 5 drops the older names: readers of them compute plain RoPE then, and say nothing."""
    prefix, text = text_part(raw)
    window = text.get("max_position_embeddings")
    if not is_whole(window) or not any(_is_extended(text, view, window) for view in views(text)):
        return
    _, wanted = text_part(portable(raw))
    if missing := ", ".join(sorted(wanted.keys() - text.keys())):
        what = f"{missing}: not there, so that transformers 4 and other readers of these names compute another encoding"
        fix = "saving with transformers 5 dropped them: retrofit certify FOLDER --repair writes them again"
        yield Finding("warning", f"{prefix}rope_parameters", what, fix, "older-names")


def _is_extended(text: Mapping[str, Any], view: RopeView, window: int) -> bool:
    return view.rope_type != "default" or (original_length(text, view.parameters) or window) < window


def _tokenizer(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Finding]:
    _, text = text_part(raw)
    window, limit = text.get("max_position_embeddings"), settings.get("model_max_length")
    if is_whole(window) and is_number(limit) and limit < window:
        what = f"the tokenizer cuts or warns at {limit} tokens; the model claims {window}"
        fix = f'write "model_max_length": {window}'
        yield Finding("warning", "tokenizer_config.json: model_max_length", what, fix, "tokenizer-limit")


def _generation(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Finding]:
    """A limit equal to the original window was left behind by an extension; any other may be meant."""
    _, text = text_part(raw)
    window, limit = text.get("max_position_embeddings"), settings.get("max_length")
    originals = [original_length(text, view.parameters) for view in views(text)]
    if is_whole(window) and is_number(limit) and limit < window and limit in originals:
        what = f"generation stops at the {limit} tokens of the original context length; the model claims {window}"
        fix = f'write "max_length": {window}'
        yield Finding("warning", "generation_config.json: max_length", what, fix, "generation-limit")
