"""Stored token losses side by side: what may be compared, what may not and why, and bits over the same bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrofit.errors import UserError
from retrofit.evaluation.metrics.bits import compare_bits
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.workflow.compare import compare_stored
from retrofit.workflow.journal import Entry, Journal, digests_of
from tests.evaluation.test_perplexity import made_up
from tests.workflow.conftest import retrofit

META = {"tokenizer_sha256": "t", "documents_sha256": "d", "texts_sha256": ["x", "y"], "windows": None}


def save(path: Path, losses: TokenLosses, **meta: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(losses, meta={**META, **meta}).save(path)
    return path


def worse(losses: TokenLosses, by: float) -> TokenLosses:
    return replace(losses, losses=tuple(array + np.float32(by) for array in losses.losses))


def test_ratios_are_paired_and_no_torch_is_loaded(tmp_path: Path) -> None:
    import subprocess
    import sys

    losses = made_up(2, 256)
    a, b = save(tmp_path / "a.npz", losses), save(tmp_path / "b.npz", worse(losses, 0.1))
    row = compare_stored(a, b, lengths=[64]).rows[-1]
    assert row.ratio == pytest.approx(math.exp(0.1), rel=1e-5)
    assert row.high - row.low < 1e-5
    assert row.bpb_b - row.bpb_a == pytest.approx(0.1 / math.log(2) / 4, rel=1e-5)
    code = f"import sys, retrofit; retrofit.compare({str(a)!r}, {str(b)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"tokenizer_sha256": "other"}, "different tokenizers"),
        ({"windows": {"length": 64, "stride": 32}}, "different amounts of context"),
        ({"documents_sha256": "other", "texts_sha256": ["x", "z"]}, "another revision of the same"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path: Path, meta: dict, why: str) -> None:
    losses = made_up(2, 256)
    a, b = save(tmp_path / "a.npz", losses), save(tmp_path / "b.npz", losses, **meta)
    with pytest.raises(UserError, match=why):
        compare_stored(a, b)


def dynamic(lengths: list[int]) -> TokenLosses:
    losses, meta = made_up(2, max(lengths)), {"rope_type": "dynamic", "static_until": 64}
    passes = {n: tuple(array[: n - 1] for array in losses.losses) for n in lengths}
    return replace(losses, by_length=passes, meta={**META, "frequencies": meta})


def test_lengths_are_by_default_those_that_both_hold(tmp_path: Path) -> None:
    for name, lengths in (("a", [100, 300, 700]), ("b", [300, 600, 700]), ("c", [200])):
        dynamic(lengths).save(tmp_path / f"{name}.npz")
    plain = save(tmp_path / "plain.npz", made_up(2, 700))
    assert {row.length for row in compare_stored(tmp_path / "a.npz", tmp_path / "b.npz").rows} == {300, 700}
    assert {row.length for row in compare_stored(tmp_path / "a.npz", plain).rows} == {100, 300, 700}
    with pytest.raises(UserError, match="no length was scored in both"):
        compare_stored(tmp_path / "a.npz", tmp_path / "c.npz")


def test_dtype_and_kernel_of_both_are_told_and_a_difference_is_noted(tmp_path: Path) -> None:
    a = save(tmp_path / "a.npz", made_up(2, 256), dtype="float32", kernel="blockwise")
    b = save(tmp_path / "b.npz", made_up(2, 256), dtype="bfloat16", kernel="blockwise")
    shown = " ".join(retrofit("compare", a, b).output.split())
    assert "dtype float32, kernel blockwise" in shown
    assert "dtype bfloat16, kernel blockwise" in shown
    assert "a was read with dtype float32, b with bfloat16" in shown
    assert not compare_stored(a, a).notes


def test_a_file_of_another_revision_of_the_program_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", made_up(2, 256))
    with np.load(path) as stored:
        arrays = dict(stored)
    header = {**json.loads(str(arrays["header"])), "format": 99}
    np.savez(path, **{**arrays, "header": np.array(json.dumps(header))})
    with pytest.raises(UserError, match="another revision of this program, in format 99"):
        compare_stored(path, path)


def entry(run: Path, step: str, artifact: str) -> Entry:
    return Entry(step, step, artifact, digests_of(run, [run / artifact]))


def test_losses_scored_before_the_model_was_made_again_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    good = save(tmp_path / "good.npz", made_up(2, 256))
    path = save(run / "losses" / "converted.npz", made_up(2, 256))
    (run / "1-convert").mkdir()
    (run / "1-convert" / "config.json").write_text("{}")
    journal = Journal(run)
    journal.append(entry(run, "convert", "1-convert"))
    journal.append(entry(run, "evaluate:converted", "losses/converted.npz"))
    assert compare_stored(good, run).rows[-1].ratio == 1.0
    journal.append(entry(run, "convert", "1-convert"))
    with pytest.raises(UserError, match="`convert` was done again"):
        compare_stored(good, run)
    journal.append(entry(run, "evaluate:converted", "losses/converted.npz"))
    save(path, worse(made_up(2, 256), 1.0))
    with pytest.raises(UserError, match="not those that the run recorded"):
        compare_stored(good, run)


def text_losses(sizes: list[list[int]], nats_per_byte: float, given: int) -> TokenLosses:
    """A model that spends the same on every byte; each text's first token has `given` bytes."""
    sizes = [np.array(part, np.int32) for part in sizes]
    return TokenLosses(
        documents=("p", "q"),
        kinds=("k", "k"),
        losses=tuple((part * nats_per_byte).astype(np.float32) for part in sizes),
        nbytes=tuple(int(part.sum()) + given for part in sizes),
        token_bytes=tuple(sizes),
        token_ids=tuple(sizes),
        meta={**META},
    )


def test_bits_per_byte_of_two_tokenizers_are_over_the_same_bytes() -> None:
    a = text_losses([[2] * 3000, [2] * 1000], 0.5, given=0)  # 6000 and 2000 bytes, two a token
    b = text_losses([[3] * 1500, [3, 0, 3] * 300], 0.6, given=3)  # up to 4503 and 1803 bytes, three a token
    found = compare_bits(a, b, "k")
    # From the first to the last byte where both have a token end: 6 to 4500, and 6 to 1800.
    assert found.nbytes == 4494 + 1794
    assert found.documents == 2
    assert found.tokens_a == (4494 + 1794) // 2
    assert found.tokens_b == 1498 + 598 + 299
    assert found.bpb_a == pytest.approx(0.5 / math.log(2))
    assert found.bpb_b == pytest.approx(0.6 / math.log(2))
    assert found.ratio == pytest.approx(1.2)
    assert found.high - found.low < 1e-5


def test_two_tokenizers_need_the_flag_and_the_same_texts(tmp_path: Path) -> None:
    a = save(tmp_path / "a.npz", made_up(2, 256))
    b = save(tmp_path / "b.npz", worse(made_up(2, 256), 0.1), tokenizer_sha256="other", documents_sha256="other")
    refused = retrofit("compare", a, b)
    assert refused.exit_code == 2
    assert "--bits-per-byte" in refused.output
    shown = retrofit("compare", a, b, "--bits-per-byte", "--json")
    (row, *_) = json.loads(shown.stdout)["bits"]
    assert row["bpb_b"] > row["bpb_a"]
    assert row["low"] < row["ratio"] < row["high"]
    assert "bits per byte on the same bytes" in retrofit("compare", a, b, "--bits-per-byte").output.lower()
    save(tmp_path / "c.npz", made_up(2, 256), tokenizer_sha256="other", texts_sha256=["x", "z"])
    with pytest.raises(UserError, match="not known to be of the same texts"):
        compare_stored(a, tmp_path / "c.npz", bits=True)
