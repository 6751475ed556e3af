"""Windows of context: spans by their definition, scored losses against one pass per token, other people's loops."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from retrofit.errors import UserError
from retrofit.evaluation.metrics.protocols import prepared, value
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.score import score
from retrofit.evaluation.scoring.windows import Windows, rolling
from tests.evaluation.test_score import document
from tests.tiny import BOS_ID, tiny_model


def defined(model: nn.Module, definition: str, docs: list, length: int, *, bos: bool = True, **over: int):
    scored, windows = prepared(definition, docs, length, bos=bos, **over)
    return value(definition, score(model, scored, windows=windows, chunk=16), length, windows)


@pytest.mark.parametrize("total", [5, 16, 17, 24, 40, 41, 100])
@pytest.mark.parametrize("windows", [Windows(16, 4), Windows(16, 15), Windows(16, 4, repeat_start=True), rolling(16)])
def test_every_token_is_scored_once_with_the_context_promised(total: int, windows: Windows) -> None:
    spans = list(windows.spans(total))
    scored = [token for span in spans for token in range(span.first, span.stop)]
    assert scored == list(range(1, total))
    for span in spans[1:]:
        for token in range(span.first, span.stop):
            context = token - span.begin + span.start
            assert windows.length - windows.stride <= context < windows.length
    if windows.fill_last and total > windows.length:
        assert spans[-1].tokens == windows.length
    assert windows.cost(total) == sum(span.tokens for span in spans)


def test_windows_that_cannot_move_are_refused() -> None:
    for length, stride in ((16, 16), (16, 0), (1, 1)):
        with pytest.raises(UserError, match="cannot move"):
            Windows(length, stride)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("repeat_start", [False, True])
def test_sliding_losses_equal_a_pass_of_its_own_for_every_token(family: str, repeat_start: bool) -> None:
    model, doc = tiny_model(family), document(60)
    windows = Windows(24, 7, repeat_start=repeat_start)
    found = score(model, [doc], windows=windows, chunk=5, logits_rows=3).losses[0]
    ids = torch.from_numpy(doc.input_ids)
    for span in windows.spans(60):
        read = torch.cat([ids[: int(span.start)], ids[span.begin : span.stop]])
        with torch.inference_mode():
            losses = -model(input_ids=read[None]).logits[0, :-1].double().log_softmax(-1)
        losses = losses.gather(1, read[1:, None])[:, 0][span.first - span.stop :]
        np.testing.assert_allclose(found[span.first - 1 : span.stop - 1], losses, rtol=0, atol=1e-4)


def test_known_losses_stand_for_the_first_window() -> None:
    model, doc = tiny_model("llama"), document(60)
    windows = Windows(24, 8)
    alone = score(model, [doc], windows=windows).losses[0]
    full = score(model, [doc])
    given = score(model, [doc], windows=windows, known=full).losses[0]
    np.testing.assert_allclose(given, alone, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(given[:23], full.losses[0][:23])


@pytest.mark.parametrize(("length", "stride"), [(24, 12), (600, 512)])
def test_transformers_guide(length: int, stride: int) -> None:
    """Its stride is 512; a shorter window moves by half of itself."""
    model = tiny_model("llama", max_position_embeddings=1024)
    docs = [document(70), document(53, "b", seed=1)] if length < 512 else [document(1200), document(1100, "b", seed=1)]
    nll_sum, n_tokens = 0.0, 0
    for doc in docs:  # the guide's loop
        ids, previous = torch.from_numpy(doc.input_ids)[None], 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + length, ids.shape[1])
            target = end - previous
            labels = ids[:, begin:end].clone()
            labels[:, :-target] = -100
            with torch.no_grad():
                loss = model(ids[:, begin:end], labels=labels).loss
            count = int((labels != -100).sum()) - 1
            nll_sum, n_tokens, previous = nll_sum + float(loss) * count, n_tokens + count, end
            if end == ids.shape[1]:
                break
    found = defined(model, "transformers", docs, length)
    assert found.ppl == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-5)
    assert found.stride == stride


@pytest.mark.parametrize("bos", [True, False])
def test_yarn(bos: bool) -> None:
    """One mean per window, a BOS in every window, the mean of the means."""
    model, nlls = tiny_model("llama"), []
    text = document(300).input_ids
    doc = document(300)
    if bos:
        doc = document(301)
        doc.input_ids[0], doc.input_ids[1:] = BOS_ID, text
    length, ids, previous = 280, torch.from_numpy(text)[None], 0
    for begin in range(0, ids.shape[1], 256):
        end = min(begin + length - bos, ids.shape[1])
        target = end - previous
        read = torch.cat([torch.full((1, int(bos)), BOS_ID), ids[:, begin:end]], 1)
        labels = read.clone()
        labels[:, :-target] = -100
        with torch.no_grad():
            nlls.append(model(read, labels=labels).loss)
        previous = end
        if end == ids.shape[1]:
            break
    assert len(nlls) == 2
    found = defined(model, "yarn", [doc], length, bos=bos)
    assert found.ppl == pytest.approx(float(torch.stack(nlls).mean().exp()), rel=1e-5)
    assert found.stride == 256


def test_yarn_truncated_is_the_mean_over_documents_of_their_beginnings() -> None:
    model, docs = tiny_model("llama"), [document(70), document(64, "b", seed=1), document(20, "short")]
    with torch.no_grad():
        losses = [
            model(ids, labels=ids).loss for ids in (torch.from_numpy(doc.input_ids[:40])[None] for doc in docs[:2])
        ]
    found = defined(model, "yarn-truncated", docs, 40)
    assert found.ppl == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found.documents == 2
    with pytest.raises(UserError, match="longest has 70"):
        prepared("yarn-truncated", docs, 80, bos=True)


def test_longlora() -> None:
    """Every token of every window of one stream, windows 256 apart, the last of them left out."""
    model, docs = tiny_model("llama", max_position_embeddings=1024), [document(500), document(420, "b", seed=1)]
    stream, length = np.concatenate([doc.input_ids for doc in docs]), 300
    starts = list(range(0, len(stream) - length, 256))
    starts.pop()
    losses = []
    for start in starts:
        x = torch.from_numpy(stream[start : start + length])[None]
        with torch.no_grad():
            losses.append(float(model(input_ids=x, labels=x).loss))
    found = defined(model, "longlora", docs, length)
    assert len(losses) == 2
    assert found.ppl == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.read == 600
    assert found.log_likelihood is None


def harness_windows(tokens: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """lm-evaluation-harness's windows: (tokens read, tokens predicted, which are the last of them)."""
    tokens, found = [prefix, *tokens], []
    for start in range(0, len(tokens) - 1, length):
        stop = min(start + length, len(tokens) - 1)
        found.append((tokens[max(stop - length, 0) : stop], tokens[start + 1 : stop + 1]))
    return found


@pytest.mark.parametrize("bos", [True, False])
def test_rolling_log_likelihood(bos: bool) -> None:
    model, ids = tiny_model("llama"), document(70).input_ids
    total = 0.0
    for read, wanted in harness_windows(ids.tolist(), BOS_ID, 32):
        wanted = torch.tensor(wanted)
        with torch.no_grad():
            logits = model(torch.tensor([read])).logits[0, -len(wanted) :].double()
        total += float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum())
    doc = document(70)
    if bos:
        doc = document(71)
        doc.input_ids[0], doc.input_ids[1:] = BOS_ID, ids
    found = defined(model, "lm-eval", [doc], 32, bos=bos, prefix_id=BOS_ID)
    assert found.tokens == 70
    assert found.log_likelihood == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_change_with_the_length_are_scored_length_by_length(kind: str, tmp_path: Path) -> None:
    if kind == "dynamic":
        parameters = {
            "rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64,
        }  # fmt: skip
        model = tiny_model("llama", max_position_embeddings=64, rope_parameters=parameters)
    else:
        factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
        parameters = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
        lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": 64}
        model = tiny_model("phi3", **lengths, rope_parameters=parameters)
    doc = document(120)
    ids = torch.from_numpy(doc.input_ids)
    losses = score(model, [doc], lengths=[32, 48, 96, 120], chunk=16)
    losses.save(tmp_path / "l.npz")
    losses = TokenLosses.load(tmp_path / "l.npz")
    for length in (120, 32, 96, 48):
        with torch.inference_mode():
            logits = model(input_ids=ids[None, :length], use_cache=False).logits[0].double()
        expected = -logits.log_softmax(-1)[:-1].gather(1, ids[1:length, None])[:, 0].numpy()
        np.testing.assert_allclose(losses.at(length)[0], expected, rtol=0, atol=1e-4)
    first, second = losses.at(120)[0][:31], losses.at(32)[0]
    assert np.abs(first - second).max() > 1e-3  # it does change
    assert sorted(losses.by_length) == ([48, 96, 120] if kind == "dynamic" else [48, 120])
    if kind == "dynamic":
        with pytest.raises(UserError, match="100 tokens were not scored"):
            losses.at(100)
    windowed = score(model, [doc], windows=Windows(96, 10), chunk=16).losses[0]
    np.testing.assert_allclose(windowed[:95], losses.at(96)[0], rtol=0, atol=1e-4)


def test_a_stopped_evaluation_goes_on_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.evaluation.scoring import passes as module

    model = tiny_model("llama")
    docs = [document(40), document(33, "b", seed=1), document(50, "c", seed=2)]
    whole = score(model, docs, chunk=16)
    real, calls = module._score_span, itertools.count()

    def killed(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_score_span", killed)
    with pytest.raises(KeyboardInterrupt):
        score(model, docs, chunk=16, partial=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.npy"))) == 2
    read = []
    monkeypatch.setattr(module, "_score_span", lambda *args: read.append(args[3].name) or real(*args))
    again = score(model, docs, chunk=16, partial=tmp_path / "kept")
    assert read == ["c"]
    for ours, theirs in zip(again.losses, whole.losses, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    read.clear()
    score(model, docs, chunk=8, partial=tmp_path / "kept")  # another question
    assert read == ["a", "b", "c"]


def test_learned_positions_end(tmp_path: Path) -> None:
    model = tiny_model("gpt_bigcode", max_position_embeddings=64)
    score(model, [document(64)])
    with pytest.raises(UserError, match="learned positions"):
        score(model, [document(65)])
    score(model, [document(100)], windows=Windows(64, 16))
