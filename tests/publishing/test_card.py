"""The card: parses as the hub parses it, says the measured numbers, and refuses what is not known."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from huggingface_hub import ModelCard

from retrofit.errors import UserError
from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
from retrofit.publishing.card import render_card
from retrofit.publishing.card_input import CardModel, require_usable_identity
from retrofit.publishing.snippet import (
    TRANSFORMERS,
    front_matter,
    load_snippet,
    placeholders,
    shows_snippet,
    with_model_id,
)
from retrofit.recipe.schema import RopeMethod
from tests.publishing.cards import card_input, row, rows
from tests.report.made_up import effective, task_changes, tasks


def test_front_matter_as_the_hub_reads_it() -> None:
    data = ModelCard(render_card(card_input())).data
    assert data.license == "apache-2.0"
    assert data.base_model == "acme/Tiny"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"multi-query-attention", "long-context", "attention-retrofit"} <= set(data.tags)
    assert data.model_name == "Tiny-mqa-16k"
    found = {(e.dataset_type, e.metric_name): e.metric_value for e in data.eval_results}
    assert found["python-docs", "Perplexity at 16384 tokens"] == pytest.approx(11 * 1.4)
    assert found["all", "Perplexity at 1024 tokens"] == pytest.approx(14.0)
    assert len(found) == 6
    assert all(e.metric_type == "perplexity" for e in data.eval_results)


def test_other_license_carries_name_and_link() -> None:
    text = render_card(card_input(license="other", license_name="acme-1", license_link="https://acme.org/l"))
    found = ModelCard(text).data.to_dict()
    assert found["license_link"] == "https://acme.org/l"
    assert found["license_name"] == "acme-1"


def test_languages_and_tags_of_the_source_go_on() -> None:
    data = ModelCard(render_card(card_input(languages=("en", "no"), tags=("chat", "text-generation")))).data
    assert data.language == ["en", "no"]
    assert "chat" in data.tags
    assert data.tags.count("text-generation") == 1


def test_a_window_that_was_not_measured_to_its_end_is_not_claimed() -> None:
    text = render_card(card_input(title="Tiny-mqa-64k", claimed_length=65536))
    assert "# Tiny-mqa-64k (measured up to 16,384 tokens)\n" in text
    assert "from 8,192 to 65,536 tokens by YaRN; it was measured up to 16,384 tokens." in text
    assert "# Tiny-mqa-16k\n" in render_card(card_input())


def test_the_training_and_the_tolerances_are_told_in_numbers() -> None:
    text = render_card(card_input())
    assert "LoRA adapters of rank 16, merged into the weights, at a learning rate of 0.001 and 498 tokens/s" in text
    assert "the recorded losses, a token's to within 1 and the mean of 1,024 to within 0.02 (in nats)" in text


def test_limits_are_those_of_the_model_and_name_no_file_that_is_not_there() -> None:
    worse = tuple(row("/home/me/notes.txt", n, 99.0) for n in (1024, 16384))
    better = tuple(row("/home/me/notes.txt", n, 10.0) for n in (1024, 16384))
    text = render_card(card_input(models=(CardModel("original", better), CardModel("converted", worse))))
    limits = text.split("## Limits")[1].split("##")[0]
    assert "notes.txt" not in limits
    assert "9.90 times the original's (one of these texts, 1,024 tokens)" in limits


def test_overlapping_intervals_are_not_said_to_show_that_nothing_was_lost() -> None:
    assert "Intervals that overlap do not show that nothing was lost" in render_card(card_input())


def test_a_recipe_of_ones_own_is_said_to_stand_on_the_page() -> None:
    text = render_card(card_input(commands=("retrofit run recipe.yaml --model a/b",)))
    assert "With the recipe at the end of this page as `recipe.yaml`:" in text
    assert "as `recipe.yaml`" not in render_card(card_input())


def test_a_person_finds_what_was_done() -> None:
    text = render_card(card_input())
    assert "1 KV head instead of 3" in text
    assert "3 times smaller" in text
    assert "from 8,192 to 16,384 tokens by YaRN" in text
    assert "distilled from the original model for 300,000 tokens" in text
    assert "| 1,024 | 10.00 (9.00 to 11.00) | 4,000 (3,600 to 4,400) | 14.00 (12.60 to 15.40) | 1.40 |" in text
    assert "| 16,384 (beyond native) |" in text
    assert "![Perplexity by context length: original, converted, recovered](assets/perplexity.svg)" in text
    assert "| 16,384 | 360 MiB | 120 MiB |" in text
    assert "name: quickstart" in text
    assert "retrofit run quickstart --out runs/quickstart" in text
    assert "1.40 times the original's" in text
    assert "/home/someone" not in text
    assert "notes.txt" in text


def test_tasks_are_told_with_the_paired_difference() -> None:
    labels = ("original", "converted", "recovered")
    models = tuple(CardModel(label, rows(1.0), tasks(label), task_changes(label)) for label in labels)
    text = render_card(card_input(models=models))
    assert "| task | metric | questions | examples | original | converted | recovered | recovered - original |" in text
    cells = "| arc_easy | acc | 2,376 | 0 | 0.612 ± 0.01 | 0.381 ± 0.01 | 0.574 ± 0.01 | -0.038 (-0.049 to -0.026) |"
    assert cells in text
    assert "| lambada | perplexity | 5,153 | 0 | 12.5 | 12.5 | 12.5 | – |" in text
    assert "with the questions of arc_easy and lambada only: no other benchmark" in text
    found = {(e.dataset_type, e.metric_type): e.metric_value for e in ModelCard(text).data.eval_results}
    assert found["arc_easy", "acc_norm"] == pytest.approx(0.534)
    assert "no task benchmark" in render_card(card_input())
    assert "harness" not in render_card(card_input())


def test_general_knowledge_stands_in_table_and_limits() -> None:
    def score(value: float) -> tuple[TaskScore, ...]:
        return (TaskScore("common_knowledge", "acc_norm", value, 0.02, 504, 0, 0.25),)

    change = TaskChange("common_knowledge", "acc_norm", 504, 0.66, 0.44, -0.22, -0.27, -0.17, 0.22, 140, 28, 1e-9)
    models = (CardModel("original", rows(1.0), score(0.66)), CardModel("converted", rows(1.4), score(0.44), (change,)))
    text = render_card(card_input(models=models))
    assert "| common_knowledge | acc_norm (chance 0.25) | 504 | 0 | 0.66 ± 0.02 | 0.44 ± 0.02 |" in text
    assert "it answers 44% of 504 common-knowledge questions where the original answers 66% (chance 25%)" in text
    assert "harness" not in text
    both = (*score(0.44), *tasks("converted"))
    models = (replace(models[0], tasks=(*score(0.66), *tasks("original"))), replace(models[1], tasks=both))
    assert "and tasks of lm-evaluation-harness, score" in render_card(card_input(models=models))


def test_the_effective_length_is_told_with_what_shows_it() -> None:
    text = render_card(card_input(effective=effective("recovered")))
    assert "**Effective length: 16,384 tokens.** 16,384 tokens pass: the last 1,024 tokens are predicted as" in text
    assert "| 16,384 | yes | 0.981 (0.952 to 1.010) | +0.041 (+0.031 to +0.051) | 0.90 (0.77) |" in text
    assert "| 2,048 | yes | – | – | 0.90 (0.77) |" in text
    assert "0.90 of the needle's tokens are found, 0.77 are needed" in text
    assert "finds a fact far back" not in text
    less = render_card(card_input(effective=effective("original")))
    assert "Not beyond, at 16384 tokens" in less
    assert "It is shown to use 8,192 tokens of context, not the 16,384 of its context length." in less
    assert "Effective length" not in render_card(card_input())


def test_markdown_is_well_formed() -> None:
    text = render_card(card_input())
    lines = text.splitlines()
    assert "\n\n\n\n" not in text
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    for i, line in enumerate(lines):  # a table needs an empty line before it and as many cells in every row
        if line.startswith("|--"):
            assert lines[i - 2] == ""
            width = line.count("|")
            j = i + 1
            while lines[j].startswith("|"):
                assert lines[j].count("|") == width
                j += 1
    assert placeholders(text) == []


@pytest.mark.parametrize("chat", [False, True])
def test_snippet_is_python_and_can_be_pointed_elsewhere(chat: bool) -> None:
    text = render_card(card_input(snippet=load_snippet(chat=chat)))
    assert shows_snippet(text)
    moved = with_model_id(text, 'a "b"\\c')
    assert shows_snippet(moved)
    block = with_model_id(load_snippet(chat=chat), 'a "b"\\c')
    assert block in moved
    assert next(n.value.value for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Assign)) == 'a "b"\\c'  # type: ignore[attr-defined]
    assert with_model_id(moved, "x/y") == with_model_id(text, "x/y")


def test_a_card_with_other_lines_does_not_show_the_snippet() -> None:
    assert not shows_snippet("# Nothing")
    assert not shows_snippet(render_card(card_input()).replace("output = model", "import os; output = model"))


def trained(kept: tuple[int, int] | None) -> str:
    recovery = card_input().recovery
    assert recovery is not None
    return render_card(card_input(recovery=replace(recovery, kept=kept)))


def test_a_training_that_won_nothing_is_not_said_to_be_in_the_weights() -> None:
    text = trained((0, 40))
    assert "lowered the loss on held-out text at no step, so the weights are those from before it" in text
    assert "merged into the weights" not in text


def test_a_card_names_the_step_whose_weights_were_kept() -> None:
    assert "The weights are those after step 20 of 40" in trained((20, 40))
    for last in ((40, 40), None):
        assert "merged into the weights" in trained(last)
        assert "The weights are those" not in trained(last)


def test_only_what_was_done_is_told() -> None:
    plain = card_input(
        kv_heads=(3, 3),
        conversion=None,
        context_method=None,
        recovery=None,
        claimed_length=8192,
        chart=None,
        kernel=None,
        models=(CardModel("original", (row("all", 1024, 10.0),)),),
    )
    text = render_card(plain)
    assert "unchanged" in text
    assert "KV heads" not in text
    assert "LoRA" not in text
    assert "![" not in text
    assert "| context (tokens) | original |" in text
    assert "between 1,024 and 8,192 tokens were not measured" in text
    assert "long-context" not in front_matter(text)["tags"]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"license": "unknown"}, "not a license id"),
        ({"license": "My Own License"}, "not a license id"),
        ({"base_model": "/home/me/model"}, "not a hub id"),
        ({"models": ()}, "no perplexity was measured"),
        ({"commands": ()}, "commands is empty"),
        ({"versions": {}}, "versions is empty"),
        ({"title": " "}, "title is empty"),
        ({"models": (CardModel("original", rows(1.0)), CardModel("converted", rows(float("nan"))))}, "not finite"),
        ({"models": (CardModel("original", rows(1.0)[1:]), CardModel("converted", rows(2.0)))}, "is missing"),
    ],
)
def test_unknown_values_are_refused_by_name(over: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        render_card(card_input(**over))
    assert said in str(caught.value)


def test_all_unknown_values_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        render_card(replace(card_input(), license="mine", base_model="x", commands=()))
    assert str(caught.value).count("\n  - ") == 3


def test_the_versions_are_a_sentence() -> None:
    assert "With python 3.11.7, transformers 5.23.0.\n" in render_card(card_input())


def test_the_oldest_release_that_a_card_names_is_the_one_that_is_installed_with() -> None:
    assert f"Stock `transformers` {TRANSFORMERS} or newer is enough" in render_card(card_input())
    newer = render_card(card_input(architecture="GraniteSWAForCausalLM"))
    assert "Stock `transformers` 5.23 or newer is enough" in newer
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    assert f'"transformers>={TRANSFORMERS}"' in pyproject.read_text(encoding="utf-8")


def test_early_check() -> None:
    require_usable_identity("mit", "a/b")
    require_usable_identity(None, None)
    with pytest.raises(UserError, match="not a license id"):
        require_usable_identity("mine", "a/b")


def test_a_card_says_what_is_not_known_of_its_source() -> None:
    text = render_card(card_input(license=None, base_model=None))
    data = ModelCard(text).data.to_dict()
    assert not {"license", "base_model", "base_model_relation"} & {key for key, value in data.items() if value}
    assert text.count("is not known: the folder it was made from names none.") == 2
    assert placeholders(text) == []
    assert "\nThis checkpoint was made by attention surgery. Each of its 30 layers" in text
    assert "is not known" not in render_card(card_input())


def test_a_text_called_todo_is_no_placeholder() -> None:
    models = tuple(CardModel(label, (row("TODO.txt", 1024, 10.0),)) for label in ("original", "converted"))
    text = render_card(card_input(models=models, base_model="acme/TBD"))
    assert "TODO.txt" in text
    assert placeholders(text, ["/home/me/TODO.txt", "TODO.txt", "TBD"]) == []


def test_placeholders_are_found_with_their_lines() -> None:
    text = "fine\nTODO: x\n| a | nan | 3 |\n<your name>\n{{ x }}\n```yaml\nTODO: in a recipe\n```\n"
    text += "[more information needed]\n"
    assert [place.split(":")[0] for place in placeholders(text)] == ["line 2", "line 3", "line 4", "line 5", "line 9"]


def test_broken_front_matter() -> None:
    for text in ("# no", "---\na: [\n---\n", "---\n- a\n---\n"):
        with pytest.raises(UserError):
            front_matter(text)


@pytest.mark.parametrize("method", get_args(RopeMethod))
def test_every_context_method_has_words(method: str) -> None:
    if method == "search":  # the card names what the search found
        return
    text = render_card(replace(card_input(), context_method=method, encodings_tried=48))
    assert "tokens by " in text
    assert "best of 48 position encodings measured" in text
