"""Which texts stand in others: copies, excerpts and near-duplicates, recognised by content alone.

A text is its letters and digits without case, white space and punctuation, so that line breaks, quotes, encodings and
HTML's names of characters do not matter. It is known by the hashes of its windows of WINDOW bytes, shingles of about
eight words (Broder, "On the resemblance and containment of documents", 1997), a long one by the SKETCH smallest of
them, which are a random sample. The texts that are asked about are sketched and all others stream past: memory is
bounded by the former, time is linear in both.

Legend: W windows, S hashes of all sketches.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 32
"""Bytes of letters and digits in a window: seven or eight English words."""
SKETCH = 1024
"""Most hashes that stand for a text; the error of a share is then below 0.02."""
NEAR = 0.4
"""Share of a text found elsewhere that makes it a copy. One word in ten changed leaves 0.45 of the windows."""
COMMON = 40
"""A window that more texts than this share (a license header, a template) says nothing, as in `corpora`."""
_MANY = 4  # from so many texts on, what more than half of them share says nothing either
_TELLING = 0.2  # share of a text's windows that must be left to go by them alone
_PIECE = 1 << 20  # characters hashed at once
_SLOTS = 22  # bits of the table that sorts out windows of no sketch

Hashes = NDArray[np.uint64]

_ODD = np.uint64(0x9E3779B97F4A7C15)
_OTHERS = re.compile(r"[\W_]+")


class Overlap:
    """How much of each of some texts stands in the texts that `see` is shown.

    Texts too short for a window, or without letters and digits, count as found where the same one is seen.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        sketches = [_sketch(text) for text in texts]
        owners = np.repeat(np.arange(len(texts)), [len(one) for one in sketches])
        self.hashes_S, self._slot = np.unique(np.concatenate([np.empty(0, np.uint64), *sketches]), return_inverse=True)
        self._bounds = np.searchsorted(owners, np.arange(len(texts) + 1))
        self._table = np.zeros(1 << _SLOTS, bool)
        self._table[self.hashes_S >> np.uint64(64 - _SLOTS)] = True
        self._count_S = np.zeros(len(self.hashes_S), np.int64)
        self._last_S = np.full(len(self.hashes_S), -1)
        self._first_S = np.full(len(self.hashes_S), np.iinfo(np.int64).max)
        self.seen = 0

    def see(self, texts: Iterable[str]) -> None:
        """Look for the sketched texts in further ones."""
        waiting: list[tuple[int, bytes]] = []  # (number of the text, a piece of its letters)
        size = 0
        for text in texts:
            for piece in _pieces(text):
                waiting.append((self.seen, piece))
                size += len(piece)
                if size >= _PIECE:
                    self._look(waiting)
                    waiting, size = [], 0
            self.seen += 1
        self._look(waiting)

    def shares(self, *, before: Sequence[int] | None = None) -> list[float]:
        """Of each sketched text, the share of its windows that was seen; in texts before the given numbers only.

        What most texts share does not count, unless the text is made of little else.
        """
        common_S = self._count_S > COMMON
        if self.seen >= _MANY:
            common_S |= self._count_S > self.seen / 2
        found = []
        for index in range(len(self._bounds) - 1):
            slots = self._slot[self._bounds[index] : self._bounds[index + 1]]
            limit = self.seen if before is None else before[index]
            seen, telling = self._first_S[slots] < limit, ~common_S[slots]
            found.append(float(seen[telling].mean() if telling.mean() >= _TELLING else seen.mean()))
        return found

    def _look(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Count, for every hash of a sketch, the texts that hold it."""
        if not pieces or not len(self.hashes_S):
            return
        hashes, texts = [], []
        data = np.frombuffer(b"".join(piece for _, piece in pieces), np.uint8)
        ends = np.cumsum([len(piece) for _, piece in pieces])
        numbers = np.array([number for number, _ in pieces])
        windows_W = _windows(data)
        at = np.flatnonzero(self._table[windows_W >> np.uint64(64 - _SLOTS)])
        owner = np.searchsorted(ends, at, side="right")
        inside = at + WINDOW <= ends[owner]  # a window across two texts is of neither
        hashes.append(windows_W[at[inside]])
        texts.append(numbers[owner[inside]])
        short = [(number, piece) for number, piece in pieces if len(piece) < WINDOW]
        hashes.append(np.array([_whole(piece) for _, piece in short], np.uint64))
        texts.append(np.array([number for number, _ in short], np.int64))
        found, numbers = np.concatenate(hashes), np.concatenate(texts)
        slots = np.minimum(np.searchsorted(self.hashes_S, found), len(self.hashes_S) - 1)
        known = self.hashes_S[slots] == found
        pairs = np.unique(np.stack([numbers[known], slots[known]]), axis=1)
        new = pairs[:, self._last_S[pairs[1]] != pairs[0]]  # a text's next piece is no other text
        np.add.at(self._count_S, new[1], 1)
        np.minimum.at(self._first_S, new[1], new[0])
        np.maximum.at(self._last_S, new[1], new[0])


def content(text: str) -> bytes:
    """A digest of a text's content: equal for texts that differ in case, white space and punctuation alone."""
    digest = hashlib.blake2b(digest_size=16)
    given = False
    for letters in _letters(text):
        digest.update(letters)
        given = given or bool(letters)
    if not given:
        digest.update(_words(text))
    return digest.digest()


def _sketch(text: str) -> Hashes:
    """The SKETCH smallest distinct hashes of a text's windows; of a short text the hash of all of it."""
    found = np.empty(0, np.uint64)
    for piece in _pieces(text):
        if len(piece) < WINDOW:
            return np.array([_whole(piece)], np.uint64)
        found = np.unique(np.concatenate([found, _windows(np.frombuffer(piece, np.uint8))]))[:SKETCH]
    return found


def _letters(text: str) -> Iterator[bytes]:
    """The letters and digits of a text without case, piece by piece."""
    for start in range(0, len(text), _PIECE):
        part = text[start : start + _PIECE]
        part = unicodedata.normalize("NFKC", (html.unescape(part) if "&" in part else part).casefold())
        yield _OTHERS.sub("", part).encode("utf-8", "surrogatepass")


def _words(text: str) -> bytes:
    """What stands for a text without letters and digits: all of it, each white space as one blank."""
    return b" " + " ".join(unicodedata.normalize("NFKC", text[:_PIECE]).split()).encode("utf-8", "surrogatepass")


def _pieces(text: str) -> Iterator[bytes]:
    """The letters and digits of a text in pieces that share WINDOW - 1 bytes."""
    rest = b""
    given = False
    for letters in _letters(text):
        rest += letters
        if len(rest) >= 2 * WINDOW:
            yield rest
            given, rest = True, rest[len(rest) - WINDOW + 1 :]
    if len(rest) >= WINDOW or (rest and not given):
        yield rest
    elif not given:
        yield _words(text)


def _whole(piece: bytes) -> int:
    """The hash of all of a short text, its length in it."""
    padded = np.frombuffer(piece.ljust(WINDOW, b"\0"), np.uint8)
    return int(_mixed(_windows(padded)[:1] + np.uint64(len(piece)))[0])


def _windows(data_N: NDArray[np.uint8]) -> Hashes:
    """The hash of each window of WINDOW bytes, [N - WINDOW + 1], built of halves; none for fewer bytes."""
    if len(data_N) < WINDOW:
        return np.empty(0, np.uint64)
    hashes = _BYTES[data_N]
    width = 1
    while width < WINDOW:
        hashes = _mixed(hashes[:-width] * _ODD + hashes[width:])
        width *= 2
    return hashes


def _mixed(hashes: Hashes) -> Hashes:
    """Every bit made to depend on every other (the end of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(27))


_BYTES = _mixed(np.arange(1, 257, dtype=np.uint64) * _ODD)
