"""The chunked scoring pass against one whole forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.evaluation.scoring import reader
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import score
from retrofit.kernels.registry import choose
from retrofit.model.families import describe
from tests.tiny import FAMILIES, VARIANTS, VOCAB_SIZE, tiny_model


def document(tokens: int, name: str = "a", *, seed: int = 0) -> Document:
    ids = np.random.default_rng(seed).integers(0, VOCAB_SIZE - 8, tokens)
    return Document(name, "random", ids.astype(np.int64), tokens - 1, np.array([0] + [1] * (tokens - 1), np.int32))


def whole(model: nn.Module, doc: Document) -> np.ndarray:
    """-log_softmax(logits)[next token] of one forward pass over the whole document."""
    ids = torch.from_numpy(doc.input_ids)
    with torch.inference_mode():
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    return -logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()


@pytest.mark.parametrize(("family", "over"), [*((f, {}) for f in FAMILIES), *VARIANTS], ids=lambda value: str(value))
def test_chunks_equal_one_whole_forward_pass(family: str, over: dict) -> None:
    model, doc = tiny_model(family, **over), document(100)
    expected = whole(model, doc)
    for chunk in (7, 32, 512):
        losses = score(model, [doc], chunk=chunk, logits_rows=5)
        np.testing.assert_allclose(losses.losses[0], expected, rtol=0, atol=1e-4)
    assert losses.meta["kernel"] == ("eager" if family == "gemma2" else "blockwise")
    assert model.config._attn_implementation == "eager"
    assert not model.training


@pytest.mark.parametrize("group", [2, 3, 100])
def test_losses_that_are_read_in_groups_of_chunks_are_the_same(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, doc = tiny_model("llama"), document(100)
    expected = score(model, [doc], chunk=7).losses[0]
    monkeypatch.setattr(reader, "chunks_between_readings", lambda device: group)
    assert np.array_equal(score(model, [doc], chunk=7).losses[0], expected)


def test_a_cpu_reads_chunks_of_512_tokens() -> None:
    assert score(tiny_model("llama"), [document(20)]).meta["chunk"] == 512
    assert Reader(tiny_model("llama"), 600).chunk == 512


def test_a_prefix_scores_the_same_as_the_document_it_starts() -> None:
    model, long = tiny_model("llama"), document(100)
    short = Document("b", "random", long.input_ids[:40], 39, long.token_bytes[:40])
    losses = score(model, [long, short], chunk=16).losses
    np.testing.assert_allclose(losses[0][:39], losses[1], rtol=0, atol=1e-4)


def test_a_training_model_and_its_kernel_are_put_back() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    model.train()
    score(model, [document(20)])
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert type(model.model).__name__ == "LlamaModel"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_kernel_that_is_asked_for_is_the_one_that_scores(family: str, kernel: str) -> None:
    model, doc = tiny_model(family), document(70)
    own = score(model, [doc], chunk=16)
    asked = score(model, [doc], chunk=16, kernel=choose(kernel, describe(model.config), "cpu"))
    assert (own.meta["kernel"], asked.meta["kernel"]) == ("blockwise", kernel)
    np.testing.assert_allclose(asked.losses[0], own.losses[0], rtol=0, atol=1e-4)


def test_adapters_are_scored_with_the_model_they_sit_in() -> None:
    from peft import LoraConfig, get_peft_model

    model, doc = tiny_model("llama"), document(30)
    before = score(model, [doc]).losses[0]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    after = score(adapted, [doc]).losses[0]
    np.testing.assert_allclose(after, whole(adapted, doc), rtol=0, atol=1e-4)
    assert np.abs(after - before).max() > 1e-3


def test_logits_exist_for_a_few_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama"), []
    real = nn.Linear.forward

    def watched(self: nn.Linear, x: Tensor) -> Tensor:
        if self.out_features == VOCAB_SIZE:
            rows.append(x.shape[-2])
        return real(self, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    score(model, [document(100)], chunk=64, logits_rows=10)
    assert max(rows) == 10
    assert sum(rows) == 99


def test_a_loss_that_is_not_finite_names_document_and_token() -> None:
    model, doc = tiny_model("llama"), document(50, "broken.txt")
    model.get_input_embeddings().weight.data[doc.input_ids[20]] = torch.nan
    first = int(np.flatnonzero(doc.input_ids == doc.input_ids[20])[0])
    with pytest.raises(UserError, match=rf"token {first + 1} is not a finite number") as error:
        score(model, [doc], chunk=1)
    assert "broken.txt" in error.value.where


def test_reading_past_learned_positions_names_the_command_that_extends() -> None:
    model = tiny_model("gpt_bigcode")
    reading = Reader(model, 600)
    with pytest.raises(UserError, match="512 learned positions") as caught:
        reading.read(torch.full((513,), 5))
    assert "retrofit extend MODEL --length 513" in str(caught.value.fix)
    assert reading.position == 0


def test_length_dependent_encodings_are_refused_beyond_their_static_length() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model = tiny_model("llama", max_position_embeddings=64, rope_parameters=dynamic)
    score(model, [document(64)])
    with pytest.raises(UserError, match="changes with the length"):
        score(model, [document(65)])
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": 64}
    model = tiny_model("phi3", **lengths, rope_parameters=longrope)
    with pytest.raises(UserError, match="changes with the length"):
        score(model, [document(65)])
    same = {**longrope, "long_factor": [1.0] * 8, "attention_factor": 1.0}
    score(tiny_model("phi3", **lengths, rope_parameters=same), [document(65)])


@pytest.mark.parametrize("documents", [[], [document(1)], [Document("x", "k", np.array([1, 10**6]), 1)]])
def test_bad_documents_are_refused(documents: list[Document]) -> None:
    with pytest.raises(UserError):
        score(tiny_model("llama"), documents)


def test_saved_losses_come_back(tmp_path: Path) -> None:
    losses = score(tiny_model("llama"), [document(30), document(20, "b", seed=1)], meta={"model": "tiny"})
    losses.save(tmp_path / "losses.npz")
    again = TokenLosses.load(tmp_path / "losses.npz")
    assert again.documents == ("a", "b")
    assert again.nbytes == losses.nbytes
    assert dict(again.meta) == dict(losses.meta)
    assert again.meta["model"] == "tiny"
    assert again.meta["dtype"] == "float32"
    for ours, theirs in zip(again.losses + again.token_bytes, losses.losses + losses.token_bytes, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    whole_file = (tmp_path / "losses.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole_file[: len(whole_file) // 2])
    np.savez(tmp_path / "pickled.npz", header=np.array({"a": 1}, dtype=object))
    for name in ("cut.npz", "missing.npz", "pickled.npz"):
        with pytest.raises(UserError):
            TokenLosses.load(tmp_path / name)


def test_progress_counts_every_token() -> None:
    class Counter:
        total, done, notes = 0, 0, ()

        def start(self, task: str, total: int | None, unit: str) -> None:
            self.total = total

        def advance(self, n: int, **fields: object) -> None:
            self.done += n

        def finish(self) -> None: ...

        def note(self, text: str) -> None:
            self.notes += (text,)

    counter = Counter()
    score(tiny_model("gemma2"), [document(30), document(21, "b")], chunk=8, progress=counter)
    assert counter.done == counter.total == 51
    assert "soft-capped" in counter.notes[0]
