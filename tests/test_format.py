"""One way to write each kind of number."""

from __future__ import annotations

import pytest

from retrofit import format as fmt
from retrofit.recipe.kv_budget import parse_budget


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (fmt.number(0.001), "0.00100"),
        (fmt.number(3.1e-5), "3.10e-05"),
        (fmt.number(0), "0"),
        (fmt.number(0.79), "0.790"),
        (fmt.number(43.51), "43.5"),
        (fmt.number(17521.2), "17,521"),
        (fmt.number(None), "–"),
        (fmt.number(float("inf")), "inf"),
        (fmt.times(3.0), "3×"),
        (fmt.times(100.0), "100×"),
        (fmt.plain(0.001), "0.001"),
        (fmt.plain(2.0), "2"),
        (fmt.plain(1e-4), "1.00e-04"),
        (fmt.nbytes(23040), "22.5 KiB"),
        (fmt.nbytes(12), "12 B"),
        (fmt.duration(200), "3 min 20 s"),
        (fmt.duration(3900), "1 h 5 min"),
        (fmt.duration(0.42), "0.4 s"),
        (fmt.duration(3.21), "3.2 s"),
        (fmt.nbytes(5 << 30), "5.00 GiB"),
        (fmt.count(3), "3"),
        (fmt.count(2.5), "2.5"),
        (fmt.count(12345.6), "12,346"),
        (fmt.count(None), "–"),
        (fmt.amount(3 << 20, "B"), "3.00 MiB"),
        (fmt.amount(250, "tokens"), "250 tokens"),
        (fmt.heads(1), "1 KV head"),
        (fmt.tokens(131072), "128k"),
        (fmt.tokens(1000), "1,000"),
    ],
)
def test_numbers_as_people_read_them(said: str, expected: str) -> None:
    assert said == expected


def test_same_losses_stand_beside_their_tolerance() -> None:
    said = "same losses (a token's differs by at most 2.40e-07 nats, tolerance 0.002)"
    assert fmt.same_losses(2.4e-7, 2e-3, passed=True) == said
    assert fmt.same_losses(2.4e-7, 2e-3, passed=False).startswith("OTHER LOSSES")


def test_a_budget_that_is_written_holds_the_bytes() -> None:
    assert fmt.nbytes_at_least(32_900) == "32.2KiB"
    assert fmt.nbytes_at_least(1 << 20) == "1.00MiB"
    for value in (1, 999, 1023, 1024, 1025, 33_685, 1_046_000, (1 << 20) - 1, 5_368_709_121, 3 << 42):
        held = parse_budget(f"{fmt.nbytes_at_least(value)}@1").nbytes
        assert value <= held <= 1.01 * value
