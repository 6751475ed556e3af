"""A GGUF file that stands where another is to be written is named for what it is, and stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.model.folder import ModelFolder
from retrofit.publishing.gguf.existing import described, require_no_files
from tests.tiny import save_tiny

writer = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama"))


def header(path: Path, model: ModelFolder, tokens: list[str], **sizes: int) -> Path:
    """A file of the model's sizes but for those that are given."""
    spec, out = model.spec, writer.GGUFWriter(path, "llama")
    known = {
        "block_count": len(spec.layers),
        "embedding_length": spec.hidden_size,
        "attention.head_count_kv": spec.layers[0].kv_heads,
        **sizes,
    }
    for key, value in known.items():
        out.add_uint32(f"llama.{key}", value)
    if tokens:
        out.add_token_list(tokens)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def own_tokens(model: ModelFolder) -> list[str]:
    return [model.tokenizer.convert_ids_to_tokens(i) or f"[PAD{i}]" for i in range(model.spec.vocab_size)]


def test_what_a_file_is(model: ModelFolder, tmp_path: Path) -> None:
    own = own_tokens(model)
    swapped = [own[1], own[0], *own[2:]]
    path = tmp_path / "x.gguf"
    for tokens, sizes, words in (
        (own, {}, "a file of such a model, whose weights may be others"),
        (own[:-1], {}, f"another tokenizer; it has {len(own) - 1} tokens, and the folder {len(own)}"),
        (swapped, {}, "another tokenizer; it has `.*` as token 0, and the folder"),
        ([], {}, "without a tokenizer"),
        (own, {"block_count": 7}, "another model, with 7 layers, where this folder has 2"),
        (own, {"context_length": 16}, "another model, with 16 positions, where this folder has 512"),
    ):
        found = described(header(path, model, tokens, **sizes), model)
        assert re.search(words, found), found
    path.write_text("no such thing")
    assert described(path, model) == "it cannot be read (the file is not a GGUF file)"


def test_files_of_somebody_else_are_in_the_way_and_ours_are_not(model: ModelFolder, tmp_path: Path) -> None:
    require_no_files(tmp_path / "not there", model)
    header(tmp_path / "ours.gguf", model, own_tokens(model))
    require_no_files(tmp_path, model, ours=["ours.gguf"])
    with pytest.raises(
        UserError, match=r"`ours.gguf` is there already, and this program did not write it: a file of su"
    ):
        require_no_files(tmp_path, model)
