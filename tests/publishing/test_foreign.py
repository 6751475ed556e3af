"""A card whose every name tries to be something else has the structure of one with plain names."""

from __future__ import annotations

import ast
import shlex
from dataclasses import replace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from retrofit.escape import shell_word, visible
from retrofit.evaluation.tasks.answers import TaskScore
from retrofit.publishing.card import render_card
from retrofit.publishing.card_input import CardInput, CardModel, Recovery
from retrofit.publishing.snippet import load_snippet, shows_snippet
from retrofit.recipe.load import dump_recipe, load_recipe
from tests.hostile import HOSTILE
from tests.publishing.cards import card_input, row


def named(name: str) -> CardInput:
    """A card in which everything that comes from outside is this name; what is checked before is not."""
    score = TaskScore(name, name, 0.5, 0.01, 100, 0)
    models = tuple(
        CardModel(label, (row(name, 64, ppl), row(name, 128, ppl)), (score,))
        for label, ppl in (("original", 2.0), ("converted", 4.0))
    )
    return replace(
        card_input(),
        title=f"tiny {name}",
        models=models,
        recovery=Recovery("distill", 1000, 4, (name, "b")),
        revision=f"0{name}",
        architecture=f"A{name}",
        dtype=f"float32 {name}",
        kernel=name,
        versions={"python": name},
        commands=(f"retrofit run recipe.yaml --model {shell_word(name)}",),
        recipe_yaml=yaml.safe_dump({"name": "tiny", "description": name}, allow_unicode=True),
        license="other",
        license_name=name,
        license_link="https://a.test/x",
        languages=(name,),
        tags=(name,),
    )


def tokens(text: str) -> list[Token]:
    reader = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
    return [inner for token in reader.parse(text.split("\n---\n", 1)[1]) for inner in (token, *(token.children or ()))]


def structure(text: str) -> list[tuple[str, str, Any]]:
    """Blocks, code and links; where words are cut into several tokens is no structure."""
    words = ("text", "text_special", "softbreak", "code_inline")
    return [(token.type, token.info, token.attrs) for token in tokens(text) if token.type not in words]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_has_the_structure_of_one_with_plain_names(name: str) -> None:
    text = render_card(named(name))
    assert structure(text) == structure(render_card(named("plain")))
    assert visible(text, keep="\n") == text
    assert [t.content for t in tokens(text) if t.type == "fence" and t.info == "python"] == [load_snippet(chat=False)]
    assert shows_snippet(text)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_front_matter_holds_names_as_values(name: str) -> None:
    block = render_card(named(name)).split("\n---\n", 1)[0].removeprefix("---\n")
    plain = render_card(named("plain")).split("\n---\n", 1)[0].removeprefix("---\n")
    found = yaml.safe_load(block)
    assert found.keys() == yaml.safe_load(plain).keys()
    assert found["license_name"] == visible(name)
    assert found["language"] == [visible(name)]
    assert found["tags"][-1] == visible(name)
    assert found["base_model"] == "acme/Tiny"
    assert found["model-index"][0]["name"] == f"tiny {visible(name)}"


@pytest.mark.parametrize("name", HOSTILE)
def test_the_recipe_and_the_command_of_a_card_are_what_they_say(name: str) -> None:
    blocks = {token.info: token.content for token in tokens(render_card(named(name))) if token.type == "fence"}
    assert shlex.split(blocks["sh"])[-1] == visible(name)
    if visible(name) == name:
        assert yaml.safe_load(blocks["yaml"]) == {"name": "tiny", "description": name}
    ast.parse(blocks["python"])


def test_a_recipe_that_is_dumped_shows_no_control_character_and_keeps_its_values() -> None:
    recipe = load_recipe("gqa").model_copy(update={"description": "\u202e \x1b[2J é"})
    text = dump_recipe(recipe)
    assert visible(text, keep="\n") == text
    assert yaml.safe_load(text)["description"] == recipe.description
