"""What publishing will need at the end of a run, checked at its start: license, names, and lines that run the model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.side_files import GENERATION
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.chat import rendered
from retrofit.model.license import other_license_of
from retrofit.model.side_files import side_file
from retrofit.model.source import Source
from retrofit.publishing.snippet import MESSAGES, PROMPT, TOKEN_TYPES, load_snippet
from retrofit.recipe.hub import OTHER
from retrofit.recipe.schema import Publish

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Terms:
    """The license of what is published; name and link only beside the license `other`."""

    license: str | None
    name: str | None = None
    link: str | None = None


def terms_of(section: Publish, source: Source) -> Terms:
    """What the recipe says of the license, and of the rest what the source's card says."""
    license = section.license or source.license
    if license != OTHER:
        return Terms(license)
    name, link = other_license_of(source.folder)
    return Terms(license, section.license_name or name, section.license_link or link)


def snippet_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, folder: Path) -> str:
    """The lines of the card that load and run the model; what its tokenizer gives them has been tried.

    Raises UserError for a chat template that cannot be rendered, and for a tokenizer whose output the model cannot
    read. folder: of the tokenizer, for messages.
    """
    _require_plain_generation(folder)
    chat = bool(getattr(tokenizer, "chat_template", None))
    text = rendered(tokenizer, MESSAGES, folder) if chat else PROMPT
    inputs = tokenizer(text, add_special_tokens=not chat)
    unread = set(inputs) - _read_by(config)
    if unread - {TOKEN_TYPES}:
        raise UserError(
            f"the tokenizer gives {', '.join(sorted(map(shown, unread)))}, which the model does not read",
            where=str(folder / "tokenizer_config.json"),
            fix='write "model_input_names": ["input_ids", "attention_mask"] there',
        )
    ids = inputs["input_ids"]
    if not ids or max(ids) >= config.get_text_config().vocab_size:
        raise UserError(
            "the tokenizer gives no tokens"
            if not ids
            else f"the tokenizer gives the token id {max(ids)}, and the "
            f"model knows ids below {config.get_text_config().vocab_size} (vocab_size)",
            where=str(folder),
            fix="put the tokenizer files that belong to these weights into the folder",
        )
    return load_snippet(chat=chat, token_types=TOKEN_TYPES in unread)


def _require_plain_generation(folder: Path) -> None:
    """The stored settings of generation ask for nothing that transformers has no code of its own for."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import GenerationMode

    settings = side_file(folder, GENERATION)
    mode = GenerationConfig.from_dict({**settings, "do_sample": False}).get_generation_mode()
    ours = (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH, GenerationMode.ASSISTED_GENERATION)
    if mode not in ours or settings.get("stop_strings"):
        what = "stop_strings" if mode in ours else mode.value.replace("_", " ")
        raise UserError(
            f"the settings of generation ask for {what}, which `generate` does not run from the model's files alone",
            where=shown(folder / GENERATION),
            fix="remove those settings from the source's file",
        )


def _read_by(config: PretrainedConfig) -> set[str]:
    """What `generate` of this model takes."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping  # type: ignore[attr-defined]
    return set(inspect.signature(mapping[type(config)].forward).parameters)
