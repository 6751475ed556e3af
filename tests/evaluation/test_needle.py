"""Synthetic tests: texts are what they claim, and answers through a shared cache are those of one pass."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from retrofit.errors import UserError
from retrofit.evaluation.long_context import require_room
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import reading
from retrofit.evaluation.tasks import needle as needle_module
from retrofit.evaluation.tasks import ruler_problems
from retrofit.evaluation.tasks.asking import Question, ask
from retrofit.evaluation.tasks.haystack import NOISE, boundaries, encode, filler
from retrofit.evaluation.tasks.needle import KEYS, WORDINGS, _prompt, depths, needle
from retrofit.evaluation.tasks.ruler import ruler
from retrofit.evaluation.tasks.ruler_problems import TASKS, problem
from retrofit.recipe.schema import NEEDLE_KEYS, Evaluate, Needle
from tests.tiny import BOS_ID, tiny_model, tiny_tokenizer

PROSE = " ".join(
    f"The {a} of the {b} is never what it seems. A {b} without a {a} would be stranger still."
    for a in ("river", "garden", "engine", "letter", "winter", "mirror", "castle", "number")
    for b in ("city", "father", "question", "market", "island", "teacher", "machine", "morning", "paper")
)


def whole(model, ids: list[int], answer: list[int]) -> tuple[float, float]:
    """(mean loss, share of tokens that are the likeliest) of an answer, from one pass over everything."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].double()
    targets = torch.tensor(answer)
    losses = -logits.log_softmax(-1).gather(1, targets[:, None])
    return float(losses.mean()), float((logits.argmax(-1) == targets).double().mean())


@pytest.mark.parametrize("multi_key", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
def test_a_grid_through_one_cache_is_that_of_a_pass_per_needle(family: str, multi_key: bool) -> None:
    model, tokenizer = tiny_model(family, max_position_embeddings=1024), tiny_tokenizer()
    lengths, grid = (400, 300), depths(3)
    found = needle(model, tokenizer, PROSE, lengths=lengths, depths=grid, samples=2, multi_key=multi_key, chunk=32)
    assert [(c.length, c.depth, c.sample) for c in found.cells] == [
        (n, d, s) for n in (300, 400) for d in (0.0, 0.5, 1.0) for s in (0, 1)
    ]
    hay = filler(tokenizer, PROSE, 400)
    ends = boundaries(tokenizer, hay)
    everything = 0
    for cell in found.cells:
        hidden = grid if multi_key else (cell.depth,)
        prompt = _prompt(tokenizer, WORDINGS["needle"], hay, ends, cell.length, hidden, cell.sample, 0)
        (one,) = [one for one in prompt.needles if one.depth == cell.depth]
        assert cell.position == one.position
        ids = prompt.ids + encode(tokenizer, one.question.text)
        answer = encode(tokenizer, one.question.right[0])
        assert len(ids) + len(answer) == cell.length or (multi_key and len(ids) + len(answer) <= cell.length)
        loss, match = whole(model, ids, answer)
        assert cell.answer.loss == pytest.approx(loss, abs=1e-4)
        assert cell.answer.token_match == match
        wrong = [whole(model, ids, encode(tokenizer, text))[0] for text in one.question.wrong]
        assert len(wrong) == (2 if multi_key else 1)
        assert cell.answer.margin == pytest.approx(min(wrong) - loss, abs=1e-4)
        assert cell.found == (cell.answer.margin > 0 if multi_key else cell.answer.starts)
        with torch.inference_mode():
            first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        assert cell.answer.answered.startswith(tokenizer.decode([first]).strip())
        everything += len(prompt.ids)
    assert found.read < 0.9 * everything  # what stands before a needle is read once
    assert found.scores[300] == np.mean([c.found for c in found.cells if c.length == 300])


def test_an_answer_ends_where_learned_positions_end() -> None:
    model, tokenizer = tiny_model("gpt_bigcode"), tiny_tokenizer()
    window = model.config.max_position_embeddings
    found = needle(model, tokenizer, PROSE, lengths=[window], depths=[0.5], samples=1)
    assert all(np.isfinite(cell.answer.loss) for cell in found.cells)


@pytest.mark.parametrize("test", ["needle", "passkey"])
def test_the_needle_stands_once_at_its_depth_and_a_seed_gives_the_same_text(test: str) -> None:
    tokenizer, wording = tiny_tokenizer(), WORDINGS[test]
    prose = NOISE if test == "passkey" else PROSE
    hay = filler(tokenizer, prose, 2000)
    ends = boundaries(tokenizer, hay)
    prompts = [_prompt(tokenizer, wording, hay, ends, 2000, (depth,), 0, 0) for depth in depths(5)]
    for prompt in prompts:
        (one,) = prompt.needles
        text = tokenizer.decode(prompt.ids)
        value = one.question.expected[0]
        fact = re.escape(wording.fact).replace(r"\{key\}", r"\w+").replace(r"\{value\}", value)
        (place,) = [m.start() for m in re.finditer(fact, text)]
        assert place / len(text) == pytest.approx(one.depth, abs=0.15)
        assert prompt.ids[0] == BOS_ID
        assert text[place - 1] in ".!?" or one.depth in (0.0, 1.0)
        assert one.question.wrong[0].strip() not in text
    assert _prompt(tokenizer, wording, hay, ends, 2000, (0.5,), 0, 0) == prompts[2]
    assert _prompt(tokenizer, wording, hay, ends, 2000, (0.5,), 0, 1) != prompts[2]


def test_needles_together_have_keys_of_their_own() -> None:
    tokenizer = tiny_tokenizer()
    hay = filler(tokenizer, PROSE, 2000)
    prompt = _prompt(tokenizer, WORDINGS["needle"], hay, boundaries(tokenizer, hay), 2000, depths(5), 0, 0)
    assert len({one.question.text for one in prompt.needles}) == 5
    for one in prompt.needles:
        said = tokenizer.decode(prompt.ids[one.position :])
        asked = one.question.text.strip() + one.question.right[0]
        assert said.strip().startswith(asked)
        # A model that only knows which numbers stand in the text prefers one of the others as readily.
        others = {other.question.right for other in prompt.needles} - {one.question.right}
        assert {(text,) for text in one.question.wrong} == others
    assert [one.position for one in prompt.needles] == sorted(one.position for one in prompt.needles)
    model = tiny_model("llama", max_position_embeddings=1024)
    for asked in ({"test": "passkey", "depths": depths(2)}, {"depths": depths(13)}):
        with pytest.raises(UserError, match="keys to tell needles apart"):
            needle(model, tokenizer, PROSE, lengths=(512,), multi_key=True, **asked)


class Oracle:
    """Stands in for a reader: answers with given text and finds given tokens likely."""

    def __init__(self, tokenizer, text: str) -> None:
        self.ids, self.position = encode(tokenizer, text), 0
        self.model = torch.nn.Linear(1, 1)
        self.model.device = torch.device("cpu")

    def read(self, ids) -> None:
        self.position += len(ids)

    def mark(self) -> int:
        return self.position

    def rewind(self, tokens: int) -> None:
        self.position = tokens

    def greedy(self, tokens: int) -> list[int]:
        return self.ids[:tokens]

    def judged(self, ids):
        right = torch.tensor([a == b for a, b in zip(ids.tolist(), self.ids, strict=False)])
        return torch.where(right, 0.1, 3.0), right

    def losses(self, ids):
        return self.judged(ids)[0]


@pytest.mark.parametrize(
    ("said", "starts", "recall"),
    [(" 12345.", True, 1.0), (" 123456", False, 1.0), (" is 12345", False, 1.0), (" 12344 ", False, 0.0)],
)
def test_an_answer_is_exact_only_when_nothing_goes_on(said: str, starts: bool, recall: float) -> None:
    tokenizer = tiny_tokenizer()
    question = Question("?", ("12345",), (" 12345",), (" 54321",), 9)
    reader = Oracle(tokenizer, said)
    found = ask(reader, tokenizer, question)
    assert (found.starts, found.recall) == (starts, recall)
    assert reader.position == 0
    assert found.token_match == np.mean([a == b for a, b in zip(" 12345", said, strict=False)])
    assert (found.margin > 0) == (said[:4] == " 123")


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_ruler_texts_are_exactly_as_long_as_asked_for(task: str, length: int) -> None:
    tokenizer = tiny_tokenizer()
    found = problem(task, tokenizer, PROSE * 3, length, seed=1)
    room = max(question.room(tokenizer) for question in found.questions)
    assert len(found.ids) + room == length
    assert problem(task, tokenizer, PROSE * 3, length, seed=1) == found != problem(task, tokenizer, PROSE * 3, length)
    text = tokenizer.decode(found.ids)
    if task.startswith("niah"):
        for question in found.questions:
            assert len(found.questions) == (4 if task == "niah_multikey" else 1)
            assert text.count(f"is: {question.expected[0]}.") == 1
            assert (question.wrong[0].strip() in text) == (task == "niah_multikey")
    if task == "variable_tracking":
        value = re.search(r"assigned the value (\d+)", found.questions[0].text)[1]
        bound = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text))
        expected = [name for name in bound if _resolved(bound, name) == value]
        assert sorted(expected) == sorted(found.questions[0].expected)
        assert len(bound) == 6
    if task == "common_words":
        listed = re.findall(r"\d+\. (\w+)", text)
        counts = {word: listed.count(word) for word in set(listed)}
        top = sorted(counts, key=lambda word: -counts[word])[:10]
        assert set(top) == set(found.questions[0].expected)
        assert all(counts[word.strip()] < counts[top[-1]] for word in found.questions[0].wrong)
    if task == "frequent_words":
        words = re.findall(r"\b[a-z]{6}\b", text.partition("coded word.\n")[2])
        counts = {word: words.count(word) for word in set(words)}
        assert sorted(counts, key=lambda word: -counts[word])[:3] == list(found.questions[0].expected)


def _resolved(bound: dict[str, str], name: str) -> str:
    while name in bound:
        name = bound[name]
    return name


def test_ruler_answers_are_those_of_one_pass_per_question() -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer()
    result = ruler(model, tokenizer, PROSE, tasks=["niah_multikey"], lengths=[1024], chunk=64)
    found = problem("niah_multikey", tokenizer, PROSE, 1024)
    for question, (_, _, _, answer) in zip(found.questions, result.answers, strict=True):
        ids = found.ids + encode(tokenizer, question.text)
        loss, _ = whole(model, ids, encode(tokenizer, question.right[0]))
        wrong, _ = whole(model, ids, encode(tokenizer, question.wrong[0]))
        assert answer.loss == pytest.approx(loss, abs=1e-4)
        assert answer.margin == pytest.approx(wrong - loss, abs=1e-4)
    (row,) = result.rows
    assert row.questions == 4
    assert row.loss == pytest.approx(np.mean([a.loss for *_, a in result.answers]))


def test_greedy_answers_are_the_models_own() -> None:
    model, ids = tiny_model("gemma3_text"), torch.arange(50) % 200
    with reading(model, None, None):
        reader = Reader(model, 60, chunk=16)
        reader.read(ids[:20])
        early = reader.mark()
        reader.read(ids[20:])
        late = reader.mark()
        first = reader.greedy(8)
        reader.rewind(late)
        assert reader.greedy(8) == first
        reader.rewind(early)
        reader.read(ids[20:])
        assert reader.greedy(8) == first
    with torch.inference_mode():
        expected = model.generate(ids[None], max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert expected[0, 50:].tolist() == first


def test_impossible_tests_are_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(UserError, match="no room for the needle"):
        needle(model, tokenizer, PROSE, lengths=[64], depths=[0.5])
    with pytest.raises(UserError, match="not a needle test"):
        needle(model, tokenizer, PROSE, test="pin", lengths=[64], depths=[0.5])
    with pytest.raises(UserError, match="not a task"):
        ruler(model, tokenizer, PROSE, tasks=["qa"], lengths=[1024])
    with pytest.raises(UserError, match="no room for the task"):
        ruler(model, tokenizer, PROSE, tasks=["common_words"], lengths=[512])
    with pytest.raises(UserError, match="needs prose"):
        filler(tokenizer, " \n", 10)


def test_needles_together_are_refused_by_the_recipe_before_anything_is_read() -> None:
    assert len(KEYS) == NEEDLE_KEYS
    assert Needle(lengths=(512,), depths=NEEDLE_KEYS, multi_key=True).multi_key
    for asked in ({"test": "passkey"}, {"depths": NEEDLE_KEYS + 1}):
        with pytest.raises(ValueError, match="a key for each"):
            Needle(lengths=(512,), multi_key=True, **asked)


def test_the_room_of_a_large_grid_is_checked_on_a_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    for module, name in ((needle_module, "_prompt"), (ruler_problems, "problem")):
        whole = getattr(module, name)

        def counted(*given: object, whole: Callable[..., object] = whole, **how: object) -> object:
            made.append(how)
            return whole(*given, **how)

        monkeypatch.setattr(module, name, counted)
    grids = {"needle": {"lengths": [256], "depths": 1000, "samples": 10_000}}
    grids["ruler"] = {"lengths": [512], "samples": 10_000, "tasks": ["niah_single"]}
    require_room(Evaluate.model_validate(grids), tiny_tokenizer(), seed=0)
    assert len(made) == 3 * 3 + 3
    too_short = Evaluate.model_validate({"needle": {**grids["needle"], "lengths": [64]}})
    with pytest.raises(UserError, match="no room for the needle"):
        require_room(too_short, tiny_tokenizer(), seed=0)
