"""What travels with the weights: bytes as they are, and a tokenizer's settings under names that all releases know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from retrofit.checkpoint.side_files import copy_side_files, portable_tokenizer
from tests.tiny import FAMILIES, SPECIAL_TOKENS, tiny_config, tiny_tokenizer

EXTRA = [SPECIAL_TOKENS["start"], SPECIAL_TOKENS["end"]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with special tokens of its own, as transformers 5 saves it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_tokenizer(chat_template=True)
    tokenizer.add_special_tokens({"extra_special_tokens": EXTRA})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_the_same_tokenizer_under_names_of_transformers_4(tmp_path: Path, saved: Path, family: str) -> None:
    for name in ("source", "out"):
        tiny_config(family).save_pretrained(tmp_path / name)
    for path in saved.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    before = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert before["extra_special_tokens"] == EXTRA
    copy_side_files(tmp_path / "source", tmp_path / "out")
    after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert after["additional_special_tokens"] == EXTRA
    assert "extra_special_tokens" not in after
    names = ("tokenizer_class", "extra_special_tokens", "additional_special_tokens")
    assert {k: v for k, v in after.items() if k not in names} == {k: v for k, v in before.items() if k not in names}
    source, out = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out"))
    text = "<|im_start|>user\nwarum? h\u00e9<|im_end|>"
    assert type(source) is type(out)
    assert source(text).input_ids == out(text).input_ids
    assert source.all_special_tokens == out.all_special_tokens
    assert source.decode(source(text).input_ids, skip_special_tokens=True) == out.decode(
        out(text).input_ids, skip_special_tokens=True
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": EXTRA},
        {"extra_special_tokens": {"image_token": "<image>"}},  # names for tokens, as both know them
        {},
    ],
)
def test_settings_that_all_know_are_copied_byte_for_byte(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "out").mkdir()
    text = json.dumps(settings, indent=7)
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert copy_side_files(tmp_path, tmp_path / "out") == ("tokenizer_config.json",)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == text


def test_a_later_list_stands_in_for_an_earlier_one() -> None:
    both = {"additional_special_tokens": ["<old>"], "extra_special_tokens": EXTRA}
    assert portable_tokenizer(both) == {"additional_special_tokens": EXTRA}
