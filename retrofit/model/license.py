"""Under which license a checkpoint folder stands and what it was made from, read from its card and license file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from retrofit.escape import visible
from retrofit.recipe.hub import is_link, is_repo_id

# What of a card may go on into another card: codes and words, nothing that is structure anywhere.
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})?|code|multilingual")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,47}|arxiv:\d{4}\.\d{4,5}")
_MOST_LANGUAGES, _MOST_TAGS = 200, 32
# Of how the source's files are stored, which ours are not.
_OF_FILES = frozenset(
    ("gguf", "onnx", "awq", "gptq", "exl2", "mlx", "openvino", "coreml", "bitsandbytes", "4-bit", "8-bit")
)

_MAX_READ = 1 << 20  # characters of a card or a license text
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")

# The words a license text starts with (after white space is squeezed) -> its id on the hub. First match wins.
_TEXTS: tuple[tuple[str, str], ...] = (
    (r"apache license,? version 2\.0", "apache-2.0"),
    (r"llama 3\.3 community license", "llama3.3"),
    (r"llama 3\.2 community license", "llama3.2"),
    (r"llama 3\.1 community license", "llama3.1"),
    (r"meta llama 3 community license", "llama3"),
    (r"llama 2 community license", "llama2"),
    (r"gemma terms of use", "gemma"),
    (r"gnu affero general public license version 3", "agpl-3.0"),
    (r"gnu general public license version 3", "gpl-3.0"),
    (r"attribution-noncommercial 4\.0", "cc-by-nc-4.0"),
    (r"attribution 4\.0 international", "cc-by-4.0"),
    (r"redistributions? of source code must retain.*neither the name", "bsd-3-clause"),
    (r"permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
)


def card_data(folder: str | Path) -> dict[str, Any]:
    """The YAML front matter of the folder's README.md, {} when there is none; None for a value that cannot be read."""
    from retrofit.yamlfile import front_matter, parse

    value = parse(front_matter(_start(Path(folder) / "README.md")) or "").value
    return value if isinstance(value, dict) else {}


def license_of(folder: str | Path) -> str | None:
    """The license id from the card, else recognised from the license file, else None."""
    stated = _first(card_data(folder).get("license"))
    if stated:
        return stated
    for name in _LICENSE_FILES:
        path = Path(folder) / name
        if path.is_file():
            start = " ".join(_start(path).lower().split())[:4000]
            return next((license for pattern, license in _TEXTS if re.search(pattern, start)), None)
    return None


def other_license_of(folder: str | Path) -> tuple[str | None, str | None]:
    """(name, link) that a card states beside the license `other`, each None where it is not plain text or a link."""
    card = card_data(folder)
    name, link = _first(card.get("license_name")), _first(card.get("license_link"))
    plain = name is not None and name == visible(name) and len(name) <= 200
    return name if plain else None, link if link is not None and is_link(link) else None


def languages_and_tags(folder: str | Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(languages, tags) that a card states, in its order and once each; those that are no plain code or word, or that
    say how the source's files are stored, are left out."""
    card = card_data(folder)
    languages = ["no" if one is False else one for one in _listed(card.get("language"))]  # Norwegian, to YAML
    tags = [one for one in _listed(card.get("tags")) if not isinstance(one, str) or one.lower() not in _OF_FILES]
    return _plain(languages, _LANGUAGE, _MOST_LANGUAGES), _plain(tags, _TAG, _MOST_TAGS)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _plain(values: list[object], pattern: re.Pattern[str], most: int) -> tuple[str, ...]:
    found = dict.fromkeys(one for one in values if isinstance(one, str) and pattern.fullmatch(one))
    return tuple(found)[:most]


def base_model_of(folder: str | Path) -> str | None:
    """The hub id that the card names as `base_model`; None when it names none, or something that is no id."""
    stated = _first(card_data(folder).get("base_model"))
    return stated if stated and is_repo_id(stated) else None


def _start(path: Path) -> str:
    """The first characters of a text that somebody else wrote; "" when there is no such file."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(_MAX_READ)


def _first(value: object) -> str | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) and value else None
