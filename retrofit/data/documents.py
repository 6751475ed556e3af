"""Texts to documents: tokens with one BOS, and the exact UTF-8 bytes of every token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrofit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Document:
    """One text as tokens.

    name: what it is called in messages and results. kind: the text source it came from.
    input_ids: int64 [T], one BOS in front if the tokenizer has one. nbytes: UTF-8 bytes these tokens cover.
    token_bytes: int32 [T], the bytes of each token (0 for the BOS), sum nbytes; without it bits per byte is unknown.
    text_sha256: of the whole text, however far its tokens go; tells whether another tokenizer read the same text.
    scored: bool [T], the tokens of a dialogue whose losses count; None for a text, all of whose tokens do.
    """

    name: str
    kind: str
    input_ids: np.ndarray
    nbytes: int
    token_bytes: np.ndarray | None = None
    text_sha256: str | None = None
    scored: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.input_ids.ndim == 1, f"input_ids must be [T], got {self.input_ids.shape}"
        assert self.token_bytes is None or self.token_bytes.shape == self.input_ids.shape

    def cut(self, tokens: int) -> Document:
        """The first `tokens` tokens; the document itself when it is no longer."""
        if len(self.input_ids) <= tokens:
            return self
        token_bytes = None if self.token_bytes is None else self.token_bytes[:tokens]
        nbytes = 0 if token_bytes is None else int(token_bytes.sum())
        scored = None if self.scored is None else self.scored[:tokens]
        return Document(self.name, self.kind, self.input_ids[:tokens], nbytes, token_bytes, self.text_sha256, scored)


def make_documents(
    texts: Sequence[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase, *, length: int | None, count: int
) -> list[Document]:
    """Tokenize (name, kind, text) triples; of each kind the first `count` that are long enough, cut to `length` tokens.

    length: the longest context length that will be asked for, BOS included; None keeps whole texts.

    Raises: UserError for no text at all, an empty text, or a kind of which no text reaches `length`.
    """
    if not texts:
        raise UserError("there is no text to score", fix="name at least one text source under `evaluate: text:`")
    chosen: dict[str, list[Document]] = {}
    short: dict[str, list[tuple[str, int]]] = {}
    for name, kind, text in texts:
        if len(chosen.setdefault(kind, [])) >= count:
            continue
        if not text.strip():
            raise UserError("this text is empty", where=name, fix="remove it or give a file with text in it")
        document = _document(name, kind, text, tokenizer, length)
        if len(document.input_ids) < (length or 2):
            short.setdefault(kind, []).append((name, len(document.input_ids)))
        else:
            chosen[kind].append(document)
    for kind, documents in chosen.items():
        if not documents:
            longest = max(tokens for _, tokens in short[kind])
            listed = ", ".join(f"{name}: {tokens} tokens" for name, tokens in short[kind][:5])
            raise UserError(
                f"no text of `{kind}` is as long as the longest length, {length or 2} tokens ({listed})",
                where=short[kind][0][0],
                fix=f"give a longer text, or lengths of at most {longest}",
            )
    return [document for documents in chosen.values() for document in documents]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary with its ids and the BOS: token losses under two tokenizers cannot be compared.

    Without a BOS a document's first token is given, so the same vocabulary leaves one loss less.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(repr((vocabulary, tokenizer.bos_token_id)).encode()).hexdigest()


def documents_digest(documents: Sequence[Document]) -> str:
    """sha256 over names, tokens and which of them count: two `TokenLosses` may be compared when theirs agree."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0")
        digest.update(np.ascontiguousarray(document.input_ids, dtype="<i8").tobytes())
        if document.scored is not None:
            digest.update(np.packbits(document.scored).tobytes())
    return digest.hexdigest()


def _document(name: str, kind: str, text: str, tokenizer: PreTrainedTokenizerBase, length: int | None) -> Document:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids: list[int] = encoded["input_ids"]
    sizes = token_sizes(text, ids, encoded.get("offset_mapping"), tokenizer)
    if tokenizer.bos_token_id is not None:
        ids, sizes = [tokenizer.bos_token_id, *ids], [0, *sizes]
    token_bytes = np.array(sizes[:length], np.int32)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Document(name, kind, np.array(ids[:length], np.int64), int(token_bytes.sum()), token_bytes, digest)


def token_sizes(
    text: str, ids: list[int], offsets: list[tuple[int, int]] | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """UTF-8 bytes of each token; their sum is exactly the bytes of the text.

    Byte-level vocabularies write every byte as one character, so a token's bytes are its length, also where a token
    ends inside a character. Elsewhere a token's bytes are those from the end of the token before it to its own end.
    """
    total = len(text.encode())
    pieces = [len(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    if sum(pieces) == total and _is_byte_level(tokenizer):
        return pieces
    if offsets is None:
        raise UserError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers",
            fix="use a model folder that has a tokenizer.json",
        )
    byte_at = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    ends = np.maximum.accumulate(byte_at[[stop for _, stop in offsets]]) if offsets else np.array([], int)
    if len(ends):
        ends[-1] = total
    return np.diff(ends, prepend=0).tolist()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """A newline is the character U+010A in every byte-level vocabulary and in no other."""
    return tokenizer.convert_tokens_to_ids("\u010a") not in (None, tokenizer.unk_token_id)
