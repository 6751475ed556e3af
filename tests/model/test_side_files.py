"""Files beside the weights as people have them: one error for each, whatever the library that parses them raises."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.model import side_files
from retrofit.model.load import load_config, load_tokenizer
from retrofit.model.source import resolve
from tests.tiny import save_tiny

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("side") / "m")


@pytest.fixture
def folder(plain, tmp_path):
    for path in plain.iterdir():
        os.link(path, tmp_path / path.name)
    return tmp_path


def rewrite(path, text: str) -> None:
    path.unlink(missing_ok=True)  # it is a link to the file of every other test
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", DEEP, '{"a": NaN}', '{"a": "\ud800"}', '{"a": 1, "a": 2}'])
def test_settings_that_are_no_object_are_refused(folder, name, text):
    rewrite(folder / name, text)
    with pytest.raises(UserError, match=name):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"],
)
def test_a_byte_order_mark_that_transformers_reads_otherwise_is_told(folder, name):
    text = (folder / name).read_text("utf-8") if (folder / name).exists() else "{}"
    rewrite(folder / name, "\ufeff" + text)
    with pytest.raises(UserError, match=f"^{name} begins with a byte order mark"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "\ufeff{}"),
        ("generation_config.json", "[]"),
        ("generation_config.json", "\ufeff{}"),
        ("chat_template.jinja", "\ufeff{{ messages }}"),
    ],
)
def test_a_model_whose_side_files_would_be_copied_broken_is_no_source(folder, name, text):
    rewrite(folder / name, text)
    with pytest.raises(UserError, match=name):
        resolve(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "{}", "[]", "null", DEEP, '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        '{"model": {"type": "Unigram", "vocab": [], "unk_id": 5}}',
        '{"version": "1.0", "model": {"type": "Evil"}}',
    ],
)
def test_a_tokenizer_that_is_none_is_refused(folder, text):
    rewrite(folder / "tokenizer.json", text)
    with pytest.raises(UserError):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"model_max_length": "x"},
        {"bos_token": 5},
        {"eos_token": {"content": 5}},
        {"tokenizer_class": 5},
        {"auto_map": 5},
        {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"},
        {"padding_side": "up"},
        {"added_tokens_decoder": {"x": 5}},
    ],
)
def test_settings_of_no_tokenizer_are_refused(folder, values: dict[str, Any]):
    path = folder / "tokenizer_config.json"
    rewrite(path, json.dumps({**json.loads(path.read_text()), **values}))
    (folder / "evil.py").write_text("raise SystemExit('code ran')")
    with pytest.raises(UserError):
        load_tokenizer(folder)


def test_ids_beyond_the_models_vocabulary_are_refused(folder):
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["vocab"] = {token: index + 5000 for token, index in stored["model"]["vocab"].items()}
    rewrite(path, json.dumps(stored))
    with pytest.raises(UserError, match="ids up to 5255"):
        load_tokenizer(folder)


def test_a_beginning_of_text_beyond_it_is_refused(folder):
    for name, values in (("config.json", {"vocab_size": 261}), ("tokenizer_config.json", {"bos_token": "<new>"})):
        rewrite(folder / name, json.dumps({**json.loads((folder / name).read_text()), **values}))
    with pytest.raises(UserError, match="`<new>` has the id 261"):
        load_tokenizer(folder)


def test_tokens_added_beyond_it_are_left_alone(folder):
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": 400, "content": "<far>"})
    rewrite(path, json.dumps(stored))
    assert load_tokenizer(folder).encode("a", add_special_tokens=False) == [load_tokenizer(folder).get_vocab()["a"]]


def test_what_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(side_files, "_MOST_BYTES_LARGE", 1000)
    with pytest.raises(UserError, match=r"tokenizer\.json has"):
        load_tokenizer(folder)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(folder, make):
    (folder / "tokenizer.json").unlink()
    make(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["{", "[]", DEEP, '{"max_length": Infinity}', '{"max_new_tokens": "x"}'])
def test_settings_of_generation_that_are_none_are_refused(folder, text):
    rewrite(folder / "generation_config.json", text)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        load_config(folder)
