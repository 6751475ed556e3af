"""The built-in task: its questions, and how it is scored against a plain reference."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import TaskAnswers, TaskScore, at_least, changes
from retrofit.evaluation.tasks.common_knowledge import (
    CHANCE,
    NAME,
    OPTIONS,
    CommonKnowledge,
    Question,
    ask,
    choices_of,
    chosen,
    questions,
)
from retrofit.evaluation.tasks.haystack import encode
from retrofit.evaluation.tasks.multiple_choice import Choice, batches, log_likelihoods, tokenized
from retrofit.recipe.evaluation import COMMON_KNOWLEDGE
from retrofit.system.world import World
from retrofit.views.measured import tasks
from tests.ranks import on_ranks
from tests.tiny import tiny_model, tiny_tokenizer

FOURS = [questions()[start : start + OPTIONS] for start in range(0, len(questions()), OPTIONS)]


def test_there_are_as_many_questions_as_a_recipe_may_ask() -> None:
    assert len(questions()) == COMMON_KNOWLEDGE
    assert len(questions()) >= 320


def test_no_question_stands_twice() -> None:
    words = ["".join(filter(str.isalnum, one.text.lower())) for one in questions()]
    assert [text for text, times in Counter(words).items() if times > 1] == []


def test_the_options_of_a_question_differ() -> None:
    assert [one.text for one in questions() if len({option.lower() for option in one.options}) != OPTIONS] == []


def test_four_at_a_time_share_their_options_and_each_answers_one() -> None:
    """So whoever prefers options for themselves is right in exactly a quarter."""
    for four in FOURS:
        assert {one.options for one in four} == {four[0].options}, four[0].text
        assert sorted(one.right for one in four) == list(range(OPTIONS)), four[0].text
        assert len({one.topic for one in four}) == 1, four[0].text


def test_no_four_has_the_options_of_another() -> None:
    assert len({frozenset(four[0].options) for four in FOURS}) == len(FOURS)


def test_every_place_holds_a_quarter_of_the_answers() -> None:
    assert set(Counter(one.right for one in questions()).values()) == {len(questions()) // OPTIONS}


def test_lengths_give_no_answer_away() -> None:
    sizes = [sorted(map(len, four[0].options)) for four in FOURS]
    assert [four[0].options for four, size in zip(FOURS, sizes, strict=True) if size[-1] > 2.5 * size[0]] == []
    for pick in (min, max):
        right = sum(one.options.index(pick(one.options, key=len)) == one.right for one in questions())
        assert right == len(questions()) // OPTIONS


def test_no_question_names_its_answer() -> None:
    named = [
        one.text
        for one in questions()
        if f" {one.options[one.right].lower().removeprefix('a ').removeprefix('an ').removeprefix('the ')} "
        in f" {''.join(letter if letter.isalnum() else ' ' for letter in one.text.lower())} "
    ]
    assert named == []


def test_texts_are_plain_and_ready_for_a_space_and_an_option() -> None:
    for one in questions():
        for text in (one.text, *one.options):
            assert text == " ".join(text.split())
            assert text.isascii()
        assert not one.text.endswith(".")
        assert one.prompt.endswith("\nAnswer:") == one.text.endswith("?")


def test_topics_vary() -> None:
    topics = Counter(one.topic for one in questions())
    assert len(topics) >= 15
    assert max(topics.values()) < len(questions()) / 8


def test_fewer_questions_are_whole_fours_spread_over_the_file() -> None:
    some = CommonKnowledge.of(40)
    assert len(some.questions) == 40
    assert {one.right for one in some.questions[:4]} == set(range(OPTIONS))
    assert len({one.topic for one in some.questions}) >= 7
    assert some.digest != CommonKnowledge.of(True).digest
    assert CommonKnowledge.of(COMMON_KNOWLEDGE).questions == questions()


def reference(model: torch.nn.Module, tokenizer: object, question: Choice) -> list[float]:
    """Each option by itself, from the logits of one whole pass."""
    found = []
    for option in question.options:
        prompt, whole = (encode(tokenizer, text) for text in (question.prompt, f"{question.prompt} {option}"))  # type: ignore[arg-type]
        ids = torch.tensor([[tokenizer.bos_token_id, *whole]])  # type: ignore[attr-defined]
        with torch.no_grad():
            log_probabilities = model(input_ids=ids).logits[0].float().log_softmax(-1)
        places = range(len(prompt) + 1, ids.shape[1])
        found.append(sum(float(log_probabilities[i - 1, ids[0, i]]) for i in places))
    return found


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("cohere", {}),
        ("gpt_bigcode", {}),
        ("mistral", {"sliding_window": 16}),
    ],
)
def test_log_likelihoods_are_those_of_one_pass_for_each_option(family: str, over: dict[str, int]) -> None:
    model, tokenizer = tiny_model(family, **over), tiny_tokenizer()
    asked = choices_of(CommonKnowledge.of(16))
    found = log_likelihoods(model, tokenizer, asked, name=NAME, tokens=300)
    for question, row in zip(asked, found, strict=True):
        assert row == pytest.approx(reference(model, tokenizer, question), abs=2e-4)


def test_batches_change_nothing() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    asked = choices_of(CommonKnowledge.of(16))
    alone, many = (log_likelihoods(model, tokenizer, asked, name=NAME, tokens=tokens) for tokens in (1, 10_000))
    for one, other in zip(alone, many, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_question_is_read_once_and_batches_need_no_padding_before_options() -> None:
    tokenizer = tiny_tokenizer()
    asked = [tokenized(tokenizer, one) for one in choices_of(CommonKnowledge.of(80))]
    parts = list(batches(asked, 600))
    assert sorted(i for part in parts for i in part) == list(range(80))
    assert all(len({len(asked[i].shared) for i in part}) == 1 for part in parts)
    first = asked[0]
    assert first.read == len(first.shared) + sum(map(len, first.rests)) - len(first.rests)


class Merging:
    """A tokenizer that joins the end of a question with the beginning of an option: one token for "s d"."""

    bos_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text.replace("s d", "\x01")]}


def test_an_option_that_changes_the_question_s_last_token_takes_it_along() -> None:
    found = tokenized(Merging(), Choice("is", ("dog", "cat"), 0))  # type: ignore[arg-type]
    assert found.shared == (ord("i"),)
    assert found.rests == ((1, ord("o"), ord("g")), tuple(map(ord, "s cat")))


def test_the_highest_log_likelihood_a_byte_is_chosen() -> None:
    assert chosen(("ab", "abcd"), (-2.0, -3.0)) == 1
    assert chosen(("ab", "abcd"), (-1.0, -3.0)) == 0
    assert chosen(("é", "abc"), (-2.0, -3.0)) == 0


def answered(world: World) -> TaskAnswers:
    return ask(CommonKnowledge.of(24), tiny_model("llama"), tiny_tokenizer(), tokens=300, world=world)


def test_several_processes_share_the_questions(tmp_path: Path) -> None:
    alone = ask(CommonKnowledge.of(24), tiny_model("llama"), tiny_tokenizer(), tokens=300)
    assert on_ranks(tmp_path, 2, answered) == [alone, alone]


def test_the_answers_of_a_model() -> None:
    model, tokenizer, task = tiny_model("llama"), tiny_tokenizer(), CommonKnowledge.of(24)
    found = ask(task, model, tokenizer)
    (score,) = found.scores
    assert (found.task, score.metric, score.chance) == (NAME, "acc_norm", CHANCE)
    assert score.questions is not None
    expected = [float(chosen(one.options, reference(model, tokenizer, one)) == one.right) for one in choices_of(task)]
    assert list(score.questions) == expected
    assert score.value == pytest.approx(sum(expected) / 24)
    assert score.stderr == pytest.approx(math.sqrt(score.value * (1 - score.value) / 23))
    (same,) = changes(found, found)
    assert same.questions == 24
    assert len(changes(found, ask(CommonKnowledge.of(8), model, tokenizer))) == 1


def test_who_ignores_the_question_is_right_in_a_quarter() -> None:
    """Whatever an option is worth by itself, however it is divided by its length."""
    fixed = {option: -float(zlib.crc32(option.encode()) % 97) for one in questions() for option in one.options}
    right = sum(chosen(one.options, [fixed[option] for option in one.options]) == one.right for one in questions())
    assert right == len(questions()) // OPTIONS


def test_learned_positions_that_end_too_early_are_refused() -> None:
    model = tiny_model("gpt_bigcode", max_position_embeddings=32)
    with pytest.raises(UserError, match="learned positions"):
        ask(CommonKnowledge.of(8), model, tiny_tokenizer())


@pytest.mark.parametrize(("right", "n"), [(0, 4), (1, 4), (4, 4), (7, 12)])
def test_guesses_that_give_so_many_right_answers(right: int, n: int) -> None:
    expected = sum(math.comb(n, k) * 0.25**k * 0.75 ** (n - k) for k in range(right, n + 1))
    assert at_least(right, n, 0.25) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "by_chance"), [(0.20, True), (0.25, True), (0.28, True), (0.30, False)])
def test_a_score_is_shown_to_be_more_than_chance_or_not(share: float, by_chance: bool) -> None:
    assert TaskScore("x", "acc", share, None, 500, 0, CHANCE).by_chance is by_chance
    assert not TaskScore("x", "acc", share, None, 500, 0).by_chance


def test_a_question_is_known_by_its_words() -> None:
    one = Question("t", "Two plus two is", ("four", "five"), 0)
    assert one.digest == Question("other", "Two plus two is", ("four", "five"), 0).digest
    assert one.digest != Question("t", "Two plus two is", ("four", "five"), 1).digest


def test_a_terminal_says_that_a_score_is_by_chance() -> None:
    def lines(share: float) -> list[object]:
        return [
            part for part in tasks([TaskScore(NAME, "acc_norm", share, 0.02, 504, 0, CHANCE)]) if isinstance(part, str)
        ]

    assert lines(0.26) == ["common_knowledge, acc_norm: not distinguishable from chance"]
    assert lines(0.44) == []
