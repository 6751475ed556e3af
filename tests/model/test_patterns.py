"""A tokenizer whose patterns backtrack without bound is refused; the patterns of ordinary ones cost nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from retrofit.errors import UserError
from retrofit.model import patterns
from retrofit.model.load import load_tokenizer
from retrofit.model.patterns import KNOWN, REPLACEMENTS, ordinary, require_bounded
from tests.tiny import save_tiny, tiny_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def written(folder: Path, *, split: str | None = None, replace: tuple[object, str] | None = None) -> Path:
    """A folder with a tokenizer.json of bytes and one pattern."""
    vocabulary = {"[UNK]": 0, "Regex": 1, "Replace": 2, "pattern": 3, **{chr(i): i for i in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
    if replace is not None:
        tokenizer.normalizer = normalizers.Replace(*replace)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("split", [GPT2, LLAMA3, QWEN2, r"\p{N}{1,3}"])
def test_ordinary_patterns_are_known(tmp_path: Path, split: str) -> None:
    assert ordinary((written(tmp_path, split=split) / "tokenizer.json").read_bytes())


@pytest.mark.parametrize("split", sorted(KNOWN))
def test_known_patterns_take_time_in_proportion(tmp_path: Path, split: str) -> None:
    assert patterns._trial(written(tmp_path, split=split) / "tokenizer.json") == ""


@pytest.mark.parametrize(("pattern", "content"), sorted(REPLACEMENTS))
def test_known_replacements_make_no_text_longer(pattern: str, content: str) -> None:
    text = "a  b\u2581``c''" * 10
    assert len(normalizers.Replace(Regex(pattern), content).normalize_str(text)) <= len(text)


def test_an_ordinary_tokenizer_costs_less_than_50_ms(tmp_path: Path) -> None:
    raw = json.loads((written(tmp_path, split=LLAMA3) / "tokenizer.json").read_text())
    raw["model"] = {"vocab": {f"Ġtoken{i}": i for i in range(400_000)}, "merges": [["a", "b"]] * 100_000}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw, indent=2))
    require_bounded(tmp_path)
    began = time.process_time()
    require_bounded(tmp_path)
    spent = time.process_time() - began
    assert (tmp_path / "tokenizer.json").stat().st_size > 12e6
    assert spent < 0.05


@pytest.mark.parametrize("split", [r"(a|aa)+$", r"(\w+\s?)+$", r"\s+$", r"(?:a|b)+c", r"(?=(\w+))\1\d"])
def test_a_pattern_that_backtracks_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(UserError, match=r"backtracks|retry-limit") as caught:
        require_bounded(written(tmp_path, split=split))
    assert len(str(caught.value).splitlines()) == 3


def test_a_pattern_of_ones_own_that_does_not_is_taken(tmp_path: Path) -> None:
    require_bounded(written(tmp_path, split=r"[A-Z]?[a-z]+|\d+|\s"))


def test_a_replacement_that_multiplies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="times longer"):
        require_bounded(written(tmp_path, replace=("a", "a" * 100)))
    with pytest.raises(UserError, match="backtracks"):
        require_bounded(written(tmp_path, replace=(Regex(r"\s+$"), "")))


def test_a_pattern_in_the_decoder_or_under_an_escaped_name_is_found(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    tokenizer.decoder = decoders.Replace(Regex(r"\s+$"), "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="backtracks"):
        require_bounded(tmp_path)
    written(tmp_path, split=r"\s+$")
    text = (tmp_path / "tokenizer.json").read_text()
    for name, escaped in (("pattern", "p\\u0061ttern"), ("Regex", "R\\u0065gex"), ("Split", "\\u0053plit")):
        (tmp_path / "tokenizer.json").write_text(text.replace(f'"{name}": ', f'"{escaped}": '))
        (tmp_path / "tokenizer.json").write_text(text.replace(f'"{name}"', f'"{escaped}"', 1))
        assert not ordinary((tmp_path / "tokenizer.json").read_bytes())


def test_loading_tries_first(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    load_tokenizer(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"(a|aa)+$"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"retry-limit|backtracks"):
        load_tokenizer(folder)


def test_the_tokenizer_of_the_tests_is_ordinary(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert ordinary((tmp_path / "tokenizer.json").read_bytes())
