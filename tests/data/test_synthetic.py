"""Synthetic long text: exact lengths, answers that stand far before, and nothing of what is measured."""

from __future__ import annotations

import re

import pytest
import torch

from retrofit.data.packing import training_rows
from retrofit.data.synthetic import TASKS, synthetic_rows
from retrofit.data.texts import read_texts
from retrofit.errors import UserError
from retrofit.evaluation.tasks.needle import KEYS, WORDINGS
from retrofit.evaluation.tasks.ruler_problems import TASKS as RULER
from retrofit.evaluation.tasks.ruler_problems import problem
from retrofit.recipe.load import validate
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.schema import Evaluate, Recover, TextSource
from tests.tiny import BOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LENGTH = 2048
SOURCE = TextSource(source="synthetic")


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    made = synthetic_rows(TOKENIZER, 8, LENGTH, seed=0)
    return made.ids_NT, made.counted_NT


def answers(ids_T: torch.Tensor, counted_T: torch.Tensor) -> list[str]:
    """The runs of tokens that follow a counted token."""
    found, run = [], []
    for index, counted in enumerate([*counted_T.tolist()[:-1], False]):
        if counted:
            run.append(int(ids_T[index + 1]))
        elif run:
            found.append(TOKENIZER.decode(run))
            run = []
    return found


def test_rows_have_the_length_and_the_seed_decides(rows) -> None:
    ids_NT, counted_NT = rows
    assert ids_NT.shape == counted_NT.shape == (8, LENGTH)
    assert (ids_NT[:, 0] == BOS_ID).all()
    assert counted_NT.any(1).all()
    assert not counted_NT[:, -1].any()
    again, other = (synthetic_rows(TOKENIZER, 8, LENGTH, seed).ids_NT for seed in (0, 1))
    assert torch.equal(ids_NT, again)
    assert not any(torch.equal(one, two) for one, two in zip(ids_NT, other, strict=True))
    held_out = synthetic_rows(TOKENIZER, 8, LENGTH, 0, split="held_out").ids_NT
    assert not any(torch.equal(one, two) for one, two in zip(ids_NT, held_out, strict=True))


@pytest.mark.parametrize("row", [0, 4])
def test_answers_about_facts_stand_in_the_text_once(rows, row: int) -> None:
    ids_T, counted_T = rows[0][row], rows[1][row]
    text = TOKENIZER.decode(ids_T)
    found = [answer.strip(" .") for answer in answers(ids_T, counted_T)]
    assert len(found) >= 2
    for value in found:
        assert re.fullmatch(r"\d{3}-[a-z]{3}", value)
        assert text.count(value) == 2  # where it is hidden, and the answer
    hidden = text[: text.rindex("\n\n")]
    assert all(value in hidden for value in found)


@pytest.mark.parametrize("row", [1, 5])
def test_a_repeated_passage_is_marked_from_its_second_word_on(rows, row: int) -> None:
    ids_T, counted_T = rows[0][row], rows[1][row]
    [copy] = answers(ids_T, counted_T)
    text = TOKENIZER.decode(ids_T)
    assert text.index(copy) < LENGTH // 2 < text.rindex(copy)
    assert len(copy) > LENGTH // 16


@pytest.mark.parametrize("row", [2, 6])
def test_names_that_are_exchanged_are_listed(rows, row: int) -> None:
    ids_T, counted_T = rows[0][row], rows[1][row]
    text, [copy] = TOKENIZER.decode(ids_T), answers(ids_T, counted_T)
    listed = re.search(r"with other names: (.*)\.\n", text)
    assert listed is not None
    pairs = [one.split(" for ") for one in listed[1].split(", ")]
    back = copy
    for new, old in pairs:
        back = re.sub(rf"\b{new}\b", old, back)
    assert back in text[: listed.start()]
    assert any(new in copy for new, _ in pairs)


@pytest.mark.parametrize("row", [3, 7])
def test_sentences_go_on_as_they_did(rows, row: int) -> None:
    ids_T, counted_T = rows[0][row], rows[1][row]
    text, found = TOKENIZER.decode(ids_T), answers(ids_T, counted_T)
    assert found
    for rest in found:
        assert text.count(rest.rstrip('"').strip()) >= 2


def test_nothing_of_the_tests_is_trained_on(rows) -> None:
    """Neither keys, values nor words of needle, passkey and RULER, whatever the seed; only the docs' own prose is left
    out of account."""
    made = [TOKENIZER.decode(row) for row in synthetic_rows(TOKENIZER, 24, LENGTH, seed=3).ids_NT]
    prose = "\n".join(
        text.text
        for kind in ("python-docs", "python-stdlib")
        for text in read_texts(TextSource(source=kind), split="train")
    )
    words = " ".join(prose.split())
    asked = [part for one in WORDINGS.values() for part in (one.opening, one.fact, one.question)]
    asked += [question.text for task in RULER for question in problem(task, TOKENIZER, prose[:20_000], 4096).questions]

    def phrases(text: str) -> set[str]:
        found = re.sub(r"\{\w+\}", " ", text).split()
        return {" ".join(found[i : i + 3]) for i in range(len(found) - 2)}

    measured = {phrase for text in asked for phrase in phrases(text) if phrase not in words}
    for text in made:
        assert not measured & phrases(text)
        assert not [key for key in KEYS if re.search(rf"\b{key}\b", text) and not re.search(rf"\b{key}\b", prose)]
        for number in re.findall(r"\b(?:\d{5}|\d{7})\b", text):
            assert number in prose


def test_short_rows_say_what_they_need() -> None:
    with pytest.raises(UserError, match="rows of 64 tokens have no room"):
        synthetic_rows(TOKENIZER, len(TASKS), 64, 0)


@pytest.mark.parametrize(("loss_on", "share"), [("assistant", 0.3), ("all", 1.0)])
def test_the_loss_is_on_answers_or_on_everything(loss_on, share: float) -> None:
    mix = [SOURCE, TextSource(source="python-docs", weight=3)]
    rows = training_rows(mix, TOKENIZER, 8 * 1024, 1024, seed=0, loss_on=loss_on)
    counted = torch.ones_like(rows.ids_NT) if rows.counted_NT is None else rows.counted_NT
    made = counted.float().mean(1) < 0.99
    assert int(made.sum()) == (2 if loss_on == "assistant" else 0)
    assert (counted.float().mean(1)[made] < share).all()
    assert any("`synthetic`: the loss counts" in note for note in rows.read)


def test_only_a_training_names_it() -> None:
    assert Recover(text=("synthetic",)).text == (SOURCE,)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"only `recover\.text` may name it"):
        validate({"text": ["synthetic"]}, Evaluate, "options")
