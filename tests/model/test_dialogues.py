"""What the assistant wrote of a dialogue: the template's own blocks, or what each turn adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retrofit.data.chat_tokens import chat_tokens, check_dialogues
from retrofit.data.texts import read_texts
from retrofit.errors import UserError
from retrofit.model import dialogues
from retrofit.recipe.schema import TextSource
from tests.dialogues import ASK, CHATML, FORGETS, GENERATION, WEATHER, says, write_rows
from tests.tiny import tiny_tokenizer

ROWS = [
    says("Why?", "Because\nof that. "),
    says("Un caf\u00e9?", "Oui, \u2615!", "Again?", "No.", system="Be short."),
    {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather_at"}}]},
            {"role": "tool", "content": "dry"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Thanks"},
        ],
        "tools": [WEATHER],
    },
]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tokens(tmp_path: Path, template: str | None, rows: list[Any], loss_on: str = "assistant") -> list[Any]:
    file = write_rows(tmp_path / "a.jsonl", rows)
    return chat_tokens(read_texts(TextSource(source=str(file)), split="all"), tokenizer_with(template), loss_on)


@pytest.mark.parametrize("row", ROWS)
def test_masks_are_the_templates_own(tmp_path: Path, row: dict[str, Any]) -> None:
    tokenizer = tokenizer_with(GENERATION)
    expected = tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    [found] = tokens(tmp_path, GENERATION, [row])
    assert list(found.ids) == expected["input_ids"]
    assert [int(one) for one in found.scored] == expected["assistant_masks"]


@pytest.mark.parametrize("row", ROWS)
def test_without_blocks_they_are_what_the_turns_add(tmp_path: Path, row: dict[str, Any]) -> None:
    [told], [found] = tokens(tmp_path, GENERATION, [row]), tokens(tmp_path, CHATML, [row])
    assert found == told
    assert found.turns[-1] == max(i for i, one in enumerate(found.scored) if one) + 1


def test_the_loss_on_all_is_on_all_but_the_first(tmp_path: Path) -> None:
    [found] = tokens(tmp_path, FORGETS, ROWS[:1], "all")
    assert found.scored == (False, *[True] * (len(found.ids) - 1))


def test_a_template_that_rewrites_earlier_turns_is_refused_for_the_assistant(tmp_path: Path) -> None:
    thought = says("1?", "<think>hm</think>1", "2?", "<think>hm</think>2")
    with pytest.raises(UserError, match="writes turn 2 another way when turns follow it") as caught:
        tokens(tmp_path, FORGETS, [ROWS[0], thought])
    assert caught.value.where.endswith("a.jsonl:2")
    assert "loss_on: all" in caught.value.fix
    assert len(tokens(tmp_path, FORGETS, [thought], "all")) == 1
    assert len(tokens(tmp_path, FORGETS, [says("1?", "<think>hm</think>1")])) == 1


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('no system role') if messages[0].role == 'system' }}" + CHATML, "no system role"),
        ("{% for m in messages %}{{ m.role + m.content + m.mood }}{% endfor %}", "has no attribute 'mood'"),
        ("{% for m in messages %}{{ m.content if m.role != 'system' }}{% endfor %}", "leaves out turn 1, of the role"),
    ],
)
def test_a_dialogue_that_the_template_cannot_write_is_refused_with_its_line(
    tmp_path: Path, template: str, what: str
) -> None:
    rows = [says("a", "b"), ROWS[1]] if "mood" not in template else [ROWS[1]]
    with pytest.raises(UserError) as caught:
        tokens(tmp_path, template, rows)
    assert what in caught.value.what
    assert caught.value.where.endswith(f"a.jsonl:{len(rows)}")


def test_tools_that_are_left_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves out the tool `weather_at`"):
        tokens(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}" + ASK, [{**ROWS[0], "tools": [WEATHER]}])


def test_a_template_without_the_assistant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="writes nothing of the assistant's turns"):
        tokens(
            tmp_path, GENERATION.replace("m['role'] == 'assistant'", "false").replace("{{ m['tool", "{{ m['x"), ROWS[:1]
        )


def test_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model has no chat template"):
        tokens(tmp_path, None, ROWS)


def test_a_template_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "SECONDS", 1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="takes longer than 1 seconds"):
        tokens(tmp_path, endless, ROWS[:1])


def test_a_template_that_writes_too_much(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="writes more than 16 times"):
        tokens(tmp_path, CHATML + "{{ 'a' * 3000000 }}", ROWS[:1])


def test_every_dialogue_is_checked_up_to_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrofit.data.chat_tokens.AT_A_TIME", 2)
    template = "{{ raise_exception('no') if messages[0].role == 'system' }}" + CHATML
    source = TextSource(source=str(write_rows(tmp_path / "a.jsonl", [*[ROWS[0]] * 5, ROWS[1]])))
    check_dialogues(source, tokenizer_with(template), "assistant", limit_chars=1)
    with pytest.raises(UserError) as caught:
        check_dialogues(source, tokenizer_with(template), "assistant", limit_chars=10**6)
    assert caught.value.where.endswith("a.jsonl:6")
