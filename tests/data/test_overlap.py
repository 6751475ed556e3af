"""Copies, excerpts and near-duplicates, told by content: the share of a text that stands in others."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

import pytest

from retrofit.data.overlap import NEAR, Overlap, content

LETTERS = "etaoinshrdlucmfw"


def words(seed: int, count: int) -> list[str]:
    """Made-up words in made-up order."""
    generator = random.Random(seed)
    known = ["".join(generator.choices(LETTERS, k=generator.randint(2, 8))) for _ in range(600)]
    return generator.choices(known, k=count)


def prose(seed: int, count: int) -> str:
    return " ".join(words(seed, count)) + "."


def share(text: str, *others: str) -> float:
    overlap = Overlap([text])
    overlap.see(others)
    return overlap.shares()[0]


BOOK = prose(1, 3000)


def edited(part: float) -> str:
    generator = random.Random(5)
    return " ".join(generator.choice(LETTERS) * 6 if generator.random() < part else word for word in BOOK.split())


@pytest.mark.parametrize(
    "copy",
    [
        lambda text: text,
        str.upper,
        lambda text: text.replace(" ", "\r\n\t"),
        lambda text: text.replace(".", "\u2026 \u201cso\u201d"),
        lambda text: unicodedata.normalize("NFD", text.replace("e", "\u00e9").replace("\u00e9", "e")),
        lambda text: text.replace("a", "&#97;").replace("e ", "e&nbsp;&mdash; "),
        lambda text: text.translate({code: code + 0xFEE0 for code in range(ord("a"), ord("z") + 1)}),
        lambda text: prose(2, 200) + text,
        lambda text: text[5000:9000],
    ],
)
def test_a_copy_is_found_whatever_surrounds_and_separates_it(copy: Callable[[str], str]) -> None:
    assert share(copy(BOOK), prose(3, 500), BOOK, prose(4, 500)) > 0.85


def test_accents_are_the_same_composed_or_not() -> None:
    text = BOOK.replace("e", "\u00e9")
    assert share(unicodedata.normalize("NFD", text), text) == 1
    assert content(unicodedata.normalize("NFD", text)) == content(text)


def test_changes_cost_the_windows_that_hold_them() -> None:
    assert share(edited(0.05), BOOK) > 0.6
    assert NEAR < share(edited(0.1), BOOK) < 0.6
    assert share(edited(0.5), BOOK) < 0.05


def test_other_text_of_the_same_words_is_other_text() -> None:
    shuffled = words(1, 3000)
    random.Random(0).shuffle(shuffled)
    assert share(" ".join(shuffled), BOOK) < 0.02


def test_a_share_is_what_part_of_a_text_stands_in_others() -> None:
    mixed = prose(7, 1000) + BOOK[:6000]
    expected = 6000 / len(mixed)
    assert share(mixed, BOOK) == pytest.approx(expected, abs=0.06)
    assert share(mixed, BOOK, prose(7, 1000)) > 0.95, "of several texts together"


def test_languages_without_spaces_and_texts_without_letters() -> None:
    generator = random.Random(0)
    text = "".join(chr(generator.randrange(0x4E00, 0x9000)) for _ in range(2000))
    assert share(text[300:900], text) == 1
    assert share("\U0001f600 \U0001f680", "\U0001f600\n\U0001f680") == 1
    assert share("\U0001f600 \U0001f680", "\U0001f600") == 0


def test_short_texts_are_compared_whole() -> None:
    assert share("Yes.", "no", "yes") == 1
    assert share("Yes.", "yes indeed") == 0
    assert share("", "") == 1


def test_what_most_texts_share_says_nothing() -> None:
    """Rows made from one template are no copies of each other, and a license in every file makes none either."""
    template = "Below is an instruction that describes a task, write a response that answers it. Response: "
    rows = [template + prose(seed, 12) for seed in range(100, 160)]
    overlap = Overlap(rows[:10])
    overlap.see(rows[10:])
    assert max(overlap.shares()) < 0.1
    overlap = Overlap([rows[0], template])
    overlap.see([*rows, *rows[1:]])
    assert overlap.shares() == [1, 1], "unless a text is made of it, or stands there itself"


def test_the_first_of_copies_has_none_before_it() -> None:
    texts = [BOOK, prose(8, 300), BOOK[100:4000], prose(8, 300)]
    overlap = Overlap(texts)
    overlap.see(texts)
    assert [round(one, 1) for one in overlap.shares(before=range(4))] == [0, 0, 1, 1]


def test_a_text_longer_than_a_piece_is_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrofit.data.overlap._PIECE", 1 << 12)
    long = prose(9, 5000)
    assert len(long) > 5 << 12
    overlap = Overlap([long[4000:4400], long])
    overlap.see([long])
    assert overlap.shares() == [1, 1]
    assert overlap.seen == 1
    assert int(overlap._count_S.max()) == 1
    assert content(long) == content(long.replace(" ", "\n  ")) != content(long[:-5])
