"""What may be published: a finished folder with a known license and base model, and nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrofit.errors import GateError, UserError
from retrofit.publishing.card import render_card
from retrofit.publishing.verify import require_finished
from tests.publishing.cards import card_input
from tests.publishing.hub_server import HubServer
from tests.publishing.pushing import GATE, files, folder, hub, push, record

__all__ = ["folder", "hub"]  # fixtures


def edit_card(folder: Path, old: str, new: str) -> None:
    card = (folder / "README.md").read_text()
    assert old in card
    (folder / "README.md").write_text(card.replace(old, new))


def test_license_may_be_given_for_a_card_that_has_none(hub: HubServer, folder: Path) -> None:
    edit_card(folder, "license: apache-2.0\n", "")
    with pytest.raises(UserError, match="no license is known"):
        push(hub, folder)
    with pytest.raises(UserError, match="not a license id"):
        push(hub, folder, stated={"license": "My License"})
    assert not hub.requests
    assert push(hub, folder, stated={"license": "mit"})[0].license == "mit"
    assert hub.repos["ann/tiny"].files["README.md"].startswith(b"---\nlicense: mit\n")
    with pytest.raises(UserError, match="card says license mit"):
        push(hub, folder, stated={"license": "apache-2.0"})


def test_base_model_and_license_are_asked_for_when_a_folder_is_published(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text(render_card(card_input(base_model=None, license=None)))
    record(folder)
    assert "The base model is not known" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="no license and no base model") as caught:
        push(hub, folder)
    assert caught.value.fix == "give it: --license apache-2.0 --base-model ORG/NAME"
    with pytest.raises(UserError, match="not a hub id"):
        push(hub, folder, stated={"license": "mit", "base_model": "/home/me/model"})
    assert not hub.requests
    push(hub, folder, stated={"license": "mit", "base_model": "acme/TBD"})
    card = hub.repos["ann/tiny"].files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\nbase_model: acme/TBD\nbase_model_relation: finetune\n")
    assert "is not known" not in card
    assert "The base model is [acme/TBD](https://huggingface.co/acme/TBD)." in card
    assert push(hub, folder)[0].license == "mit"
    with pytest.raises(UserError, match="card says base model acme/TBD"):
        push(hub, folder, stated={"base_model": "acme/other"})


def test_the_license_other_is_asked_for_its_name_and_link(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text(render_card(card_input(license=None)))
    record(folder)
    with pytest.raises(UserError, match="needs a name and a link") as caught:
        push(hub, folder, stated={"license": "other"})
    assert "--license-name NAME" in str(caught.value)
    terms = {"license": "other", "license_name": "mine: all of it", "license_link": "LICENSE"}
    assert push(hub, folder, stated=terms)[0].license == "other"
    assert "license_name: 'mine: all of it'\n" in (folder / "README.md").read_text()


def test_a_finished_folder_passes(folder: Path) -> None:
    finished = require_finished(folder)
    assert finished.license == "apache-2.0"
    assert set(finished.files) == files(folder).keys()


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"gate": []}, "ppl_ratio@1024"),
        ({"gate": [{**GATE, "passed": False}]}, "ppl_ratio@1024"),
        ({"gate": None}, "ppl_ratio@1024"),
        ({"recipe": {}, "gate": [{**GATE, "passed": None}]}, "ppl_ratio@1024"),
    ],
)
def test_gate_not_met(folder: Path, over: dict, said: str) -> None:
    record(folder, **over)
    with pytest.raises(GateError, match="requirements of the recipe are not met") as caught:
        require_finished(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize("reload", [None, {}, {"passed": False}])
def test_reload_not_passed(folder: Path, reload: dict | None) -> None:
    record(folder, reload=reload)
    with pytest.raises(UserError, match="never loaded again"):
        require_finished(folder)


def test_folders_that_changed_since(folder: Path) -> None:
    whole = files(folder)

    def refused(said: str) -> None:
        with pytest.raises(UserError) as caught:
            require_finished(folder)
        assert said in str(caught.value)
        for name, data in whole.items():
            (folder / name).write_bytes(data)

    data = bytearray(whole["model-00001-of-00002.safetensors"])
    data[-1] ^= 1
    (folder / "model-00001-of-00002.safetensors").write_bytes(data)
    refused("model-00001-of-00002.safetensors: changed since it was measured")
    (folder / "model-00002-of-00002.safetensors").write_bytes(data[:-8])
    refused("truncated")
    (folder / "tokenizer.json").unlink()
    refused("tokenizer.json: missing")
    (folder / "secrets.txt").write_text("x")
    refused("secrets.txt: not part of the published checkpoint")
    (folder / "secrets.txt").unlink()
    edit_card(folder, "# Tiny-mqa-16k", "# [More Information Needed]")
    refused("placeholders")
    (folder / "README.md").unlink()
    refused("no card")
    (folder / "retrofit.json").unlink()
    refused("no retrofit.json")
    require_finished(folder)


def linked(folder: Path, name: str, target: str | Path) -> None:
    (folder / name).symlink_to(target)


ODD = {
    ".env": lambda folder: (folder / ".env").write_text("HF_TOKEN=x"),
    "l": lambda folder: linked(folder, "l", "/etc/hostname"),
    "d": lambda folder: linked(folder, "d", "/etc"),
    "gone": lambda folder: linked(folder, "gone", "/nowhere"),
    "empty": lambda folder: (folder / "empty").mkdir(),
    "pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "s/x": lambda folder: ((folder / "s").mkdir(), (folder / "s/x").write_text("x")),
    "a\\x1b[2J": lambda folder: (folder / "a\x1b[2J").write_text("x"),
    "README.md": lambda folder: (
        (folder / "README.md").rename(folder.parent / "card"),
        linked(folder, "README.md", "../card"),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_folder_that_holds_anything_else_is_not_published(folder: Path, name: str) -> None:
    ODD[name](folder)
    with pytest.raises(UserError) as caught:
        require_finished(folder)
    assert f"{name}: not part of the published checkpoint" in str(caught.value)


def test_a_card_that_was_left_half_written_is_no_part_of_the_folder(folder: Path) -> None:
    (folder / ".README.md.partial").write_text("half")
    assert ".README.md.partial" not in require_finished(folder).files


def test_a_card_with_other_load_lines_is_not_published(folder: Path) -> None:
    edit_card(folder, "output = model", "import os; output = model")
    with pytest.raises(UserError, match="does not show the lines that a fresh process executed"):
        require_finished(folder)
