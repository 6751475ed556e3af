"""Weights of LongCE against the formula, in the loss, in its sum over processes, and in a whole training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retrofit.evaluation.metrics.longppl import soft_weights
from retrofit.recipe.load import validate
from retrofit.recipe.problems import RecipeError
from retrofit.recipe.schema import Recover
from retrofit.recovery import token_weights
from retrofit.recovery.batches import MicroBatches
from retrofit.recovery.layout import ONE_PROCESS
from retrofit.recovery.objectives import IGNORED, Head, lm_loss, token_losses
from retrofit.recovery.schedule import TrainRows
from retrofit.recovery.token_weights import short_context, text_weights, weighed
from tests.tiny import save_tiny

LENGTH = 64


def plain(model, ids_1T: torch.Tensor) -> torch.Tensor:
    """Losses of the tokens from the second on, by transformers."""
    with torch.no_grad():
        logits = model(ids_1T).logits.double()
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids_1T[0, 1:], reduction="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("m"), "llama"), dtype=torch.float32)


def ids(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_weights_are_those_of_the_formula(model) -> None:
    ids_T = ids()[0]
    found = text_weights(lambda ids_1T: plain(model, ids_1T).float(), ids_T)
    k = short_context(LENGTH)
    assert k == 16
    long_T = plain(model, ids_T[None])
    expected = torch.ones(LENGTH)
    first = k + k // 4  # as long as a window: all before it is short context too
    for token in range(first, LENGTH):
        begin = (token - first) // (k // 4) * (k // 4) + k // 4
        seen = token - begin
        assert k <= seen < first
        short = plain(model, ids_T[None, begin : token + 1])[-1]
        expected[token - 1] = min(float((short - long_T[token - 1]).exp()), 5.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[:first].tolist() != found[first:].tolist()


def test_weights_are_those_of_the_authors_loop(model) -> None:
    """github.com/PKU-ML/LongPPL, finetune/finetune.py: windows of K and a quarter of K more, whose end is scored."""
    ids_T, k = ids(length=60)[0], short_context(60)
    scored = k // 4
    full_T = plain(model, ids_T[None])
    ratio_T = torch.ones(60, dtype=torch.float64)
    for start in range(0, 60 - k, scored):
        end = min(start + k + scored, 60)
        short = plain(model, ids_T[None, start:end])[k - 1 :]
        ratio_T[start + k : end] = torch.exp(short - full_T[start + k - 1 : end - 1])
    found = text_weights(lambda ids_1T: plain(model, ids_1T).float(), ids_T)
    torch.testing.assert_close(found[:-1], ratio_T[1:].clamp(max=5).float(), rtol=1e-4, atol=1e-5)


def test_five_is_the_most_and_no_weight_overflows() -> None:
    weights = soft_weights(np.array([1.0, 1.0, 900.0, 0.0]), np.array([1.0, 2.0, 0.0, 900.0]))
    np.testing.assert_allclose(weights, [1.0, np.e, 0.0, 5.0])


def test_short_contexts_are_4096_tokens_or_a_quarter_of_the_row() -> None:
    assert short_context(32_768) == 4096
    assert short_context(8192) == 2048


@pytest.mark.parametrize("chunk", [5, 64])
def test_a_weighted_loss_and_its_gradient(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    head = Head(torch.randn(30, 8, generator=generator), softcap=4.0)
    labels = torch.randint(0, 30, (20,), generator=generator)
    labels[3] = IGNORED
    weights = torch.rand(20, generator=generator) * 5
    loss = lm_loss(hidden, head, labels, chunk, weights)
    [gradient] = torch.autograd.grad(loss, hidden)
    logits = 4.0 * torch.tanh(hidden @ head.weight.T / 4.0)
    each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    reference = (each * weights).sum()
    [expected] = torch.autograd.grad(reference, hidden)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(gradient, expected)
    labels[3] = 0
    alone = token_losses(hidden, head, labels, chunk)
    torch.testing.assert_close(alone, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))


def lines(counted: torch.Tensor | None = None) -> TrainRows:
    ids_NT = ids(4, 32)
    weights_NT = torch.rand(4, 32, generator=torch.Generator().manual_seed(1)) * 5
    learned = (True, True, False, False)
    return TrainRows(ids_NT, None, (32, 32, 32, 32), counted, learned, weights_NT)


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_divides_by_the_weights_of_all_processes(masked: bool) -> None:
    counted = torch.arange(4 * 32).view(4, 32) % 3 > 0 if masked else None
    rows = lines(counted)
    assert rows.weights_NT is not None
    counts = torch.ones(4, 32) if counted is None else counted.float()
    expected = float((rows.weights_NT * counts)[:2, :-1].sum())
    for rank in range(2):
        batches = MicroBatches(rows, 2, every_token=True, rank=rank, ranks=2)
        item = batches[0]
        assert item["tokens"] == pytest.approx(expected)
        assert torch.equal(item["weights"], rows.weights_NT[rank : rank + 1])
        followed = batches[1]
        assert "weights" not in followed
        assert followed["tokens"] == (64 if counted is None else int(counts[2:].sum()))


def test_only_rows_that_are_learned_are_weighed_once(tmp_path, model) -> None:
    calls = []

    def losses(ids_1T: torch.Tensor) -> torch.Tensor:
        calls.append(ids_1T.shape[1])
        return plain(model, ids_1T).float()

    rows = TrainRows(ids(4, LENGTH), None, (64, 32, 64, 64), None, (True, True, False, True))
    kept = tmp_path / "work" / "weights.safetensors"
    found = weighed(rows, losses, layout=ONE_PROCESS, kept=kept)
    assert found.shape == (4, LENGTH)
    assert (found[2] == 1).all()
    assert torch.equal(found[0], text_weights(losses, rows.ids_NT[0]))
    assert torch.equal(found[1, 32:], text_weights(losses, rows.ids_NT[1, 32:]))
    before = len(calls)
    assert torch.equal(weighed(rows, losses, kept=kept), found)
    assert len(calls) == before


def test_a_kill_while_weights_are_kept_leaves_no_half_of_them(tmp_path, model, monkeypatch) -> None:
    rows = TrainRows(ids(1, LENGTH), None, (LENGTH,), None, (True,))
    kept = tmp_path / "weights.safetensors"

    def killed(_tensors: object, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            weighed(rows, lambda ids_1T: plain(model, ids_1T).float(), kept=kept)
    assert not kept.exists()
    found = weighed(rows, lambda ids_1T: plain(model, ids_1T).float(), kept=kept)
    assert torch.equal(load_file(kept)["weights"], found)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"token_weights": "long"}, "rows that are learned"),
        ({"token_weights": "long", "loss": "lm", "document_masking": True}, "no token sees a whole row"),
    ],
)
def test_weights_that_have_no_meaning(values, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        validate(values, Recover, "options")
