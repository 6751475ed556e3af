"""YAML of strangers: plain values with their lines, and a problem instead of code, endless work or another value."""

from __future__ import annotations

import datetime

import pytest

from retrofit.yamlfile import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, front_matter, parse

TENS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
CHAIN = "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2 * MAX_DEPTH))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing\n", None),
        ("a: [1, -2, 0x1F, 0b101, 1_000]", {"a": [1, -2, 31, 5, 1000]}),
        ("a: [1.5, .5, 6., 1.5e+3, -.inf]", {"a": [1.5, 0.5, 6.0, 1500.0, float("-inf")]}),
        ("a: [yes, Off, true, ~, null, '', 1e3, 08]", {"a": [True, False, True, None, None, "", "1e3", "08"]}),
        ("a: |\n  x\n  y\n1: 2\n~: 3\n", {"a": "x\ny\n", "1": 2, "~": 3}),
        ("a: !!str 12\nb: !!int '3'\nc: !!seq [1]", {"a": "12", "b": 3, "c": [1]}),
        ("a: 2024-01-31", {"a": datetime.date(2024, 1, 31)}),
        ("a: &x {b: [1]}\nc: *x\n", {"a": {"b": [1]}, "c": {"b": [1]}}),
        ("a: 'x\\y'\r\nb: \"\\u00e9\"\r\n", {"a": "x\\y", "b": "é"}),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    assert parse(text).value == value


def test_what_an_alias_stands_for_is_a_value_of_its_own() -> None:
    value = parse("a: &x [1]\nb: *x\n").value
    value["a"].append(2)
    assert value["b"] == [1]


def test_every_key_has_its_line() -> None:
    parsed = parse("a:\n  b: 1\n  c:\n  - 2\n  - d: 3\n")
    assert parsed.lines == {
        (): 1, ("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5, ("a", "c", 1, "d"): 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a0: &a0 [x, x, x, x]\n" + TENS, 5, "more than 20,000 values"),
        ("a0: &a0 [x]\n" + CHAIN, MAX_DEPTH - 1, "nested more than 40 deep"),
        ("\na: &a [*a]", 2, "has no end"),
        ("m: &m\n  b: *m", 2, "has no end"),
        ("a: *b", 1, "names nothing above it"),
        ("a: &x 1\nb: &x 2", 2, "given twice"),
        ("a: " + "[" * 5000, 1, "nested more than 40 deep"),
        ("a: " + "{a: " * 3000, 1, "nested more than 40 deep"),
        ("- " * 3000, 1, "nested more than 40 deep"),
        ("- a\n" * (MAX_VALUES + 1), MAX_VALUES, "more than 20,000 values"),
        ("x" * (MAX_CHARACTERS + 1), 1, "characters; more than"),
        ("? [a]\n: 1", 1, "a key must be plain text"),
        ("? {a: 1}\n: 1", 1, "a key must be plain text"),
        ("a: 1\n---\nb: 2\n", 2, "a second document"),
        ("a: 1\n\tb: 2", 2, "cannot start any token"),
        ("a: [1\nb: 2", 2, "not YAML"),
        ("%YAML 9.9\n---\na: 1", 1, "not YAML"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", 1, "not YAML"),
        ('a: 1\nb: "\\U00110000"', 2, "not YAML"),
        ('a: 1\nb: "\\UFFFFFFFF"', 2, "not YAML"),
        ("a: 1\nb: \x00", 2, r"\x00 is not allowed"),
        ("a: \x1b[31m", 1, r"\x1b is not allowed"),
        ("a: \ud800", 1, r"\ud800 is not allowed"),
    ],
)
def test_texts_that_are_not_read(text: str, line: int, says: str) -> None:
    (problem,) = parse(text).problems
    assert says in problem.what
    assert problem.line == line
    assert parse(text).value is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("!!python/object/apply:os.system ['touch x']", "`!!python/object/apply:os.system` is not read"),
        ("!own b", "`!own` is not read"),
        ("!!binary aGVsbG8=", "`!!binary` is not read"),
        ("!!set {a, b}", "`!!set` is not read"),
        ("!!omap [a]", "`!!omap` is not read"),
        ("!!map abc", "`!!map` is not read"),
        ("!!int abc", "is no whole number"),
        ("!!int ''", "is no whole number"),
        ("!!float x", "is no number"),
        ("!!bool maybe", "no value for the tag `!!bool`"),
        ("!!null x", "no value for the tag `!!null`"),
        ("2024-13-45", "is no date"),
        ("2001-12-14t21:59:43.10+99:99", "is no date"),
        ("190:20:30", "base of 60"),
        ("1:30.5", "base of 60"),
        ("01000", "octal"),
        ("0x_", "is no whole number"),
        ("0b_", "is no whole number"),
        ("9" * 5000, "has 5,000 digits"),
        ("0x" + "f" * 5000, "has 5,002 digits"),
        ("1.0e+999", "beyond the range"),
        ("=", "if it is text, quote it"),
        ('"\\ud800"', r"holds the character \ud800"),
        ('"\\0"', r"holds the character \x00"),
        ("{b: 1, <<: {c: 2}}", "merge keys are not read"),
        ("{b: 1, b: 2}", "given twice, first in line 2"),
    ],
)
def test_a_value_that_is_not_read_leaves_the_others(value: str, says: str) -> None:
    parsed = parse(f"first: 1\na: {value}\nlast: 2\n")
    assert [says in problem.what for problem in parsed.problems] == [True]
    assert parsed.problems[0].line == 2
    assert (parsed.value["first"], parsed.value["last"]) == (1, 2)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("---\na: 1\n---\nb", "a: 1\n"),
        ("--- \r\na: 1\r\n---", "a: 1\r\n"),
        ("---\n---\n", ""),
        ("\n \n---\na: 1\n---\n", "a: 1\n"),
        ("---\na: 1\n", None),
        ("# a\n---\nb: 1\n---\n", None),
        ("---\n" + "\n" * 20_000, None),
        ("", None),
    ],
)
def test_front_matter(text: str, block: str | None) -> None:
    assert front_matter(text) == block
