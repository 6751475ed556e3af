"""Tokens, and their bytes to the last one."""

from __future__ import annotations

import numpy as np
import pytest

from retrofit.data.documents import make_documents, tokenizer_digest
from retrofit.errors import UserError
from tests.tiny import BOS_ID, tiny_tokenizer

TEXT = "  Grüße, 世界 🙂\n\tline — two\n" * 3 + " "


def unigram_tokenizer():
    """Pieces of several characters and a metaspace, not byte-level; a character it does not know is <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("\u2581", -3.0), ("line", -1.0), ("Gr", -2.0), ("ü", -2.0), ("ße", -2.0), ("世界", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_bytes_of_a_byte_level_tokenizer_are_exact_at_every_length() -> None:
    tokenizer, raw = tiny_tokenizer(), TEXT.encode()
    (document,) = make_documents([("t", "k", TEXT)], tokenizer, length=None, count=1)
    assert document.input_ids[0] == BOS_ID
    assert document.token_bytes[0] == 0
    assert document.token_bytes.sum() == document.nbytes == len(raw)
    assert (document.token_bytes[1:] == 1).all()
    (cut,) = make_documents([("t", "k", TEXT)], tokenizer, length=11, count=1)
    assert len(cut.input_ids) == 11
    assert cut.nbytes == 10


def test_one_bos_also_when_the_tokenizer_adds_one_itself() -> None:
    (document,) = make_documents([("t", "k", TEXT)], tiny_tokenizer(add_bos=True), length=None, count=1)
    assert (document.input_ids == BOS_ID).sum() == 1


def test_bytes_of_another_tokenizer_add_up_and_follow_its_pieces() -> None:
    tokenizer = unigram_tokenizer()
    (document,) = make_documents([("t", "k", TEXT)], tokenizer, length=None, count=1)
    assert document.token_bytes.sum() == document.nbytes == len(TEXT.encode())
    ids = tokenizer("Grüße 世界 line", add_special_tokens=False)["input_ids"]
    (document,) = make_documents([("t", "k", "Grüße 世界 line")], tokenizer, length=None, count=1)
    sizes = dict(zip(tokenizer.convert_ids_to_tokens(ids), document.token_bytes.tolist(), strict=True))
    assert sizes["ü"] == 2
    assert sizes["世界"] == 6
    assert sizes["line"] == 4


def test_count_is_per_kind_and_short_texts_are_passed_over() -> None:
    texts = [
        ("a1", "a", "x" * 50),
        ("a2", "a", "y" * 5),
        ("a3", "a", "z" * 50),
        ("a4", "a", "w" * 50),
        ("b1", "b", "v" * 60),
    ]
    documents = make_documents(texts, tiny_tokenizer(), length=32, count=2)
    assert [(d.name, d.kind, len(d.input_ids)) for d in documents] == [
        ("a1", "a", 32),
        ("a3", "a", 32),
        ("b1", "b", 32),
    ]


def test_too_short_empty_and_no_text_are_refused_with_counts() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="11 tokens") as error:
        make_documents([("short.txt", "a", "x" * 10)], tokenizer, length=32, count=1)
    assert "short.txt" in str(error.value)
    assert "at most 11" in error.value.fix
    for text in ("", " \n\t"):
        with pytest.raises(UserError, match="empty"):
            make_documents([("empty.txt", "a", text)], tokenizer, length=None, count=1)
    with pytest.raises(UserError, match="no text"):
        make_documents([], tokenizer, length=None, count=1)


def test_tokenizer_digest_tells_tokenizers_apart() -> None:
    assert tokenizer_digest(tiny_tokenizer()) == tokenizer_digest(tiny_tokenizer())
    assert tokenizer_digest(tiny_tokenizer()) != tokenizer_digest(unigram_tokenizer())
    assert np.int64 is make_documents([("t", "k", TEXT)], tiny_tokenizer(), length=4, count=1)[0].input_ids.dtype.type
