"""What a card says of its source: base model and license. A card that does not know them says so; publishing asks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.publishing.snippet import front_matter
from retrofit.recipe.hub import OTHER, is_repo_id, license_problem

KEYS = ("license", "license_name", "license_link", "base_model")
"""What may be stated when a folder is published; the keys of a card's front matter."""
UNKNOWN_BASE = "The base model is not known: the folder it was made from names none."
UNKNOWN_LICENSE = "The license is not known: the folder it was made from names none."
_OPENING = re.compile(r"\A\s*---[ \t]*\r?\n")


def unknown_lines(license: str | None, base_model: str | None) -> list[str]:
    """A line of the card for each that is not known."""
    return [*([] if base_model else [UNKNOWN_BASE]), *([] if license else [UNKNOWN_LICENSE])]


def completed(card: str, stated: Mapping[str, str], where: str) -> str:
    """The card with what is stated in its front matter, and without the lines that said that it was not known.

    stated: by KEYS. where: the card, for messages. Raises UserError where the card says something else, and for a base
    model that is no hub id.
    """
    front = front_matter(card)
    for key, value in stated.items():
        if front.get(key) and front[key] != value:
            raise UserError(
                f"the card says {key.replace('_', ' ')} {front[key]}, and {value} was asked for",
                where=where,
                fix=f"leave --{key.replace('_', '-')} out, or change `{key}: {front[key]}` in the card",
            )
    base = stated.get("base_model")
    if base is not None and not is_repo_id(base):
        raise UserError(f"`{shown(base, 60)}` is not a hub id", where="--base-model", fix="write ORG/NAME")
    new: dict[str, Any] = {key: stated[key] for key in KEYS if key in stated and not front.get(key)}
    if "base_model" in new and not front.get("base_model_relation"):
        new["base_model_relation"] = "finetune"
    if new:
        block = yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=10_000)
        card = _OPENING.sub(lambda opening: opening[0] + block, card, count=1)
    front |= new
    if front.get("base_model"):
        named = front["base_model"]
        links = [f"[{one}](https://huggingface.co/{one})" for one in (named if isinstance(named, list) else [named])]
        card = card.replace(UNKNOWN_BASE, f"The base model is {' and '.join(links)}.")
    if front.get("license"):
        card = card.replace(UNKNOWN_LICENSE, f"The license is {front['license']}.")
    return card


def require_identity(card: str, where: str) -> str:
    """The license of a card that is to be published. Raises UserError where it names none that the hub knows, or no
    base model."""
    front = front_matter(card)
    license = front.get("license")
    missing = [key for key in ("license", "base_model") if not front.get(key)]
    if missing:
        words = " and ".join(f"no {key.replace('_', ' ')}" for key in missing)
        given = {"license": "--license apache-2.0", "base_model": "--base-model ORG/NAME"}
        raise UserError(
            f"{words} is known for this model", where=where, fix=f"give it: {' '.join(given[key] for key in missing)}"
        )
    problem = license_problem(str(license), front.get("license_name"), front.get("license_link"))
    if problem:
        fix = "correct `license:` in the card"
        if license == OTHER:
            fix = f"give --license-name NAME --license-link https://..., or {fix}"
        raise UserError(problem.partition(";")[0], where=where, fix=fix)
    return str(license)
