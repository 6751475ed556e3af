"""What of somebody else's card goes on into ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrofit.model.license import languages_and_tags


def card(folder: Path, front: str) -> Path:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    return folder


def test_plain_codes_and_words_go_on_in_their_order(tmp_path: Path) -> None:
    folder = card(tmp_path, "language: [en, pt-BR, code, en]\ntags: [chat, smollm2, 'arxiv:2502.02737', chat]")
    assert languages_and_tags(folder) == (("en", "pt-BR", "code"), ("chat", "smollm2", "arxiv:2502.02737"))
    assert languages_and_tags(card(tmp_path, "language: en")) == (("en",), ())
    assert languages_and_tags(card(tmp_path, "language: [no, sv]"))[0] == ("no", "sv"), "Norwegian is no switch"
    assert languages_and_tags(tmp_path / "nothing") == ((), ())


@pytest.mark.parametrize(
    "value",
    ["english", "EN", "en\\nlicense: mit", "e", "<script>", "en]", " en", "${x}", "en-", "en-abcdefghijk"],
)
def test_what_is_no_code_of_a_language_is_left_out(tmp_path: Path, value: str) -> None:
    assert languages_and_tags(card(tmp_path, f'language: ["{value}", de]'))[0] == ("de",)


@pytest.mark.parametrize(
    "value",
    ["a b", "a\\nb", "<b>", "[x](y)", "license:mit", "base_model:a/b", "a" * 49, "-a", "\\u202ea", "GGUF", "4-bit"],
)
def test_what_is_no_plain_tag_or_tells_of_the_sources_files_is_left_out(tmp_path: Path, value: str) -> None:
    assert languages_and_tags(card(tmp_path, f'tags: ["{value}", chat]'))[1] == ("chat",)


def test_there_is_an_end_to_them(tmp_path: Path) -> None:
    many = ", ".join(f"tag{i}" for i in range(1000))
    assert len(languages_and_tags(card(tmp_path, f"tags: [{many}]"))[1]) == 32
    assert languages_and_tags(card(tmp_path, "tags: [[a], {b: c}, 1, null]\nlanguage: {a: b}")) == ((), ())
