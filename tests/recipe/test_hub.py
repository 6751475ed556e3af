"""Names on the hub: the whole text is a name, or it is none."""

from __future__ import annotations

import pytest

from retrofit.data.sources import hub_dataset, rows
from retrofit.errors import UserError
from retrofit.model.source import resolve
from retrofit.recipe.hub import is_model_or_dataset, is_name, is_repo_id, is_revision, license_problem
from retrofit.recipe.schema import TextSource
from tests.hostile import HOSTILE


def test_names_that_are_used() -> None:
    for text in ("gpt2", "meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-0.6B", "a_b/c.d-e"):
        assert is_model_or_dataset(text), text
    assert is_repo_id("a/b")
    assert not is_repo_id("gpt2")
    for text in ("main", "refs/pr/12", "v1.0+cpu", "0123456789abcdef0123456789abcdef01234567"):
        assert is_revision(text), text
    assert hub_dataset("hub:wikitext:wikitext-2-raw-v1") == ("wikitext", "wikitext-2-raw-v1")
    assert hub_dataset("hub:allenai/c4") == ("allenai/c4", None)


ENDS = ("{}\n", "\n{}", "{} ", "{}\x00", "{}/../x", "../{}", "{}//x", "{}`", "{}\u202e", "{}é")


@pytest.mark.parametrize("text", [*HOSTILE, "", ".", "..", "/", *(end.format("a/b") for end in ENDS)])
def test_what_is_no_name(text: str) -> None:
    assert not any(check(text) for check in (is_name, is_repo_id, is_model_or_dataset, is_revision))
    assert license_problem(text)
    with pytest.raises(UserError):
        hub_dataset(f"hub:{text}")
    with pytest.raises(UserError):
        hub_dataset(f"hub:a/b:{text}")


def test_a_text_source_that_is_no_dataset_is_refused_before_it_is_read() -> None:
    with pytest.raises(UserError, match="no dataset of the hub"):
        rows(TextSource(source="hub:../../data"))


@pytest.mark.parametrize("end", ENDS)
def test_a_revision_that_is_no_name_is_refused(end: str) -> None:
    with pytest.raises(UserError, match="no name of a revision"):
        resolve("someone/none", revision=end.format("main"))
