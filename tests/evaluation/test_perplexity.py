"""Perplexities and intervals against their formulas, on losses made up by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from retrofit.errors import UserError
from retrofit.evaluation.metrics.bootstrap import perplexity_interval, ratio_interval
from retrofit.evaluation.metrics.perplexity import bits_per_byte, prefix_ppl, table, tail_ppl
from retrofit.evaluation.scoring.losses import TokenLosses

IDS = (np.arange(7, dtype=np.int32),)


def made_up(documents: int = 2, tokens: int = 64, *, seed: int = 0) -> TokenLosses:
    rng = np.random.default_rng(seed)
    return TokenLosses(
        documents=tuple(f"d{i}" for i in range(documents)),
        kinds=tuple("ab"[i % 2] for i in range(documents)),
        losses=tuple(rng.gamma(2, 1, tokens - 1).astype(np.float32) for _ in range(documents)),
        nbytes=tuple([4 * (tokens - 1)] * documents),
        token_bytes=tuple(np.full(tokens - 1, 4, np.int32) for _ in range(documents)),
        token_ids=tuple(rng.integers(0, 50, tokens - 1, np.int32) for _ in range(documents)),
    )


def test_perplexities_follow_their_formulas() -> None:
    losses = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 2.0, 6.0])]
    assert prefix_ppl(losses, 5) == pytest.approx(math.exp(22 / 8))
    assert prefix_ppl(losses, 3) == pytest.approx(math.exp(7 / 4))
    assert tail_ppl(losses, 5, 1) == pytest.approx(math.exp(10 / 2))
    assert tail_ppl(losses, 4, 2) == pytest.approx(math.exp(9 / 4))
    assert tail_ppl(losses, 4, 99) == pytest.approx(prefix_ppl(losses, 4))


def test_a_document_too_short_is_refused() -> None:
    with pytest.raises(UserError, match="at 6 tokens"):
        prefix_ppl([np.zeros(4)], 6)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight() -> None:
    uniform = [np.full(7, 2 * math.log(256))]  # every token is two bytes, each one of 256
    losses = TokenLosses(("d",), ("k",), tuple(uniform), (14,), (np.full(7, 2, np.int32),), IDS)
    assert bits_per_byte(losses, 8) == pytest.approx(8)
    assert bits_per_byte(losses, 3) == pytest.approx(8)
    unknown = TokenLosses(("d",), ("k",), tuple(uniform), (14,), (np.zeros(7, np.int32),), IDS)
    assert bits_per_byte(unknown, 8) is None


def test_table_has_each_kind_and_all() -> None:
    losses = made_up()
    rows = table(losses, [64, 16], tail=8, resamples=200)
    assert [(row.kind, row.length) for row in rows] == [(k, n) for k in ("a", "b", "all") for n in (16, 64)]
    last = rows[-1]
    assert last.tokens == 126
    assert last.documents == 2
    assert last.tail == 8
    assert last.ppl == pytest.approx(prefix_ppl(losses.losses, 64))
    assert last.tail_ppl == pytest.approx(tail_ppl(losses.losses, 64, 8))
    assert rows[1].ppl == pytest.approx(prefix_ppl(losses.losses[:1], 64))
    assert all(row.low < row.ppl < row.high for row in rows)
    assert all(row.tail_low < row.tail_ppl < row.tail_high for row in rows)
    assert rows == table(losses, [64, 16], tail=8, resamples=200)


def test_the_unit_is_the_document_from_five_on() -> None:
    assert perplexity_interval(made_up(5).losses).unit == "document"
    few = perplexity_interval(made_up(2, 1025).losses)
    assert few.unit == "block of 256 tokens"
    assert few.units == 8
    assert perplexity_interval(made_up(4, 4097).losses).unit == "block of 512 tokens"


def test_interval_agrees_with_the_normal_one_for_many_documents() -> None:
    rng = np.random.default_rng(1)
    losses = [rng.normal(2.0, 1.0, 50) for _ in range(400)]
    found = perplexity_interval(losses, resamples=4000)
    means = np.array([a.mean() for a in losses])
    half = 1.96 * means.std(ddof=1) / math.sqrt(len(means))
    assert math.log(found.low) == pytest.approx(means.mean() - half, abs=0.15 * half)
    assert math.log(found.high) == pytest.approx(means.mean() + half, abs=0.15 * half)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        found = perplexity_interval([rng.normal(1.0, 1.0, 20) for _ in range(40)], resamples=300, seed=trial)
        hits += found.low <= math.e <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_ratio_is_paired() -> None:
    losses = made_up(6, 200)
    worse = [a + 0.1 for a in losses.losses]
    found = ratio_interval(worse, losses.losses)
    assert found.value == pytest.approx(math.exp(0.1), rel=1e-5)
    assert found.high - found.low < 1e-5  # the same shift everywhere: nothing to resample
    assert ratio_interval(losses.losses, losses.losses).value == 1.0


def test_arithmetic_needs_no_torch() -> None:
    code = (
        "import sys, retrofit.evaluation.metrics.perplexity, retrofit.evaluation.metrics.bootstrap, "
        "retrofit.evaluation.scoring.losses, retrofit.data.documents, "
        "retrofit.kernels.registry; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
