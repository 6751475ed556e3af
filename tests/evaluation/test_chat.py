"""Dialogues as they are measured: each read by itself, the assistant's tokens scored, none of it trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrofit.data.chat_documents import chat_documents
from retrofit.data.documents import Document, documents_digest
from retrofit.data.measured import scored_documents
from retrofit.data.unseen import Findings
from retrofit.errors import UserError
from retrofit.evaluation.compare import Scored, compare
from retrofit.evaluation.metrics.perplexity import table
from retrofit.evaluation.metrics.required import metrics
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.score import score
from retrofit.recipe.schema import TextSource
from tests.dialogues import CHATML, says, small_talk, write_rows
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = CHATML


def measured(file: Path, *, tokens: int = 2000, lengths: tuple[int, ...] = (100, 200), **how: Any) -> list[Document]:
    options = {"loss_on": "assistant", "trained_on": (), "findings": Findings(), **how}
    return chat_documents([TextSource(source=str(file))], TOKENIZER, tokens=tokens, lengths=lengths, **options)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("talk") / "talk.jsonl", small_talk(30))


def losses_of(documents: list[Document], seed: int = 0, **how: Any) -> TokenLosses:
    return score(tiny_model("llama", seed=seed), documents, meta={"tokenizer_sha256": "x"}, **how)


def test_dialogues_of_so_many_tokens_are_measured_each_by_itself(talk: Path) -> None:
    findings = Findings()
    documents = measured(talk, findings=findings)
    assert 2000 <= sum(len(one.input_ids) for one in documents) < 2400
    assert {one.kind for one in documents} == {"chat"}
    assert TOKENIZER.decode(documents[0].input_ids[:6]) == "<|im_start|>user\n"
    for one in documents:
        assert len(one.input_ids) <= 200
        assert one.nbytes == len(TOKENIZER.decode(one.input_ids).encode())
    assert findings.notes[-1].startswith(f"`chat`: {len(documents)} dialogues of")


def test_the_losses_are_those_of_the_assistants_tokens(talk: Path) -> None:
    documents = measured(talk)
    model, losses = tiny_model("llama"), losses_of(documents)
    for length in (100, 200):
        for document, found in zip(documents, losses.at(length), strict=True):
            ids = torch.from_numpy(document.input_ids[:length])
            with torch.inference_mode():
                log_p = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
            every = -log_p[:-1].gather(1, ids[1:, None])[:, 0].numpy()
            assert document.scored is not None
            np.testing.assert_allclose(found, every[document.scored[1 : len(ids)]], atol=1e-4)
    nbytes = sum(int(one.scored[1:].sum()) for one in documents if one.scored is not None)
    special = sum(int(((one.input_ids >= 256) & one.scored).sum()) for one in documents if one.scored is not None)
    assert sum(int(one.sum()) for one in losses.bytes_at(200)) == nbytes + (len("<|im_end|>") - 1) * special


def test_all_tokens_can_be_scored(talk: Path) -> None:
    for one in measured(talk, loss_on="all"):
        assert one.scored is not None
        assert one.scored.tolist() == [False] + [True] * (len(one.input_ids) - 1)


def test_tables_and_requirements_know_the_kind_beside_texts_that_are_longer(talk: Path) -> None:
    documents = scored_documents(
        [TextSource(source=str(talk)), TextSource(source="python-stdlib")],
        TOKENIZER,
        length=200,
        lengths=[100, 200],
        count=5,
    )
    assert [one.kind for one in documents[:5]] == ["python-stdlib"] * 5
    before, after = losses_of(documents), losses_of(documents, seed=1)
    rows = {(row.kind, row.length): row for row in table(after, [100, 200], tail=20, resamples=100)}
    chat = after.of_kind("chat")
    assert rows["chat", 200].tokens == sum(len(one) for one in chat.at(200))
    assert rows["chat", 200].documents == len(documents) - 5
    assert rows["python-stdlib", 200].tokens == 5 * 199
    assert rows["all", 200].tokens == rows["chat", 200].tokens + rows["python-stdlib", 200].tokens
    found = metrics({"a": before, "b": after}, [100, 200], 20, kv_bytes=(2, 1), kernel_max_diff=0)
    expected = np.exp(np.concatenate(chat.at(200)).mean() - np.concatenate(before.of_kind("chat").at(200)).mean())
    assert found["ppl_ratio@200/chat"] == pytest.approx(float(expected), rel=1e-5)
    assert after.prose().documents == after.documents[:5]
    assert after.longest == 200


def test_losses_come_back_from_their_file(talk: Path, tmp_path: Path) -> None:
    losses = losses_of(measured(talk))
    losses.save(tmp_path / "a.npz")
    back = TokenLosses.load(tmp_path / "a.npz")
    for one, other in zip(losses.at(200), back.at(200), strict=True):
        assert np.array_equal(one, other)


def test_positions_that_change_with_the_length_are_those_of_the_dialogue(talk: Path) -> None:
    """A dialogue within the original length is read as one pass over it alone, whatever longer length is asked for."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", max_position_embeddings=128, rope_parameters=rope)
    documents = [one for one in measured(talk) if len(one.input_ids) < 128]
    losses = score(model, documents, lengths=[100, 400])
    for document, found in zip(documents, losses.passed(400), strict=True):
        alone = score(model, [document], lengths=[len(document.input_ids)])
        np.testing.assert_allclose(found, alone.losses[0], atol=1e-5)


def test_other_marks_are_another_measurement(talk: Path) -> None:
    documents, every = measured(talk), measured(talk, loss_on="all")
    assert documents_digest(documents) != documents_digest(every)
    a, b = (Scored(name, losses_of(some), {}) for name, some in (("a", documents), ("b", every)))
    with pytest.raises(UserError, match="of different texts"):
        compare(a, b, "here")
    found = compare(a, Scored("c", losses_of(documents, seed=1), {}), "here", resamples=100)
    assert {row.kind for row in found.rows} == {"chat", "all"}
    with pytest.raises(UserError, match="not known to be of the same texts"):
        compare(a, replace(a, label="d"), "here", bits=True)


def test_what_was_trained_on_is_not_measured(tmp_path: Path) -> None:
    rows = small_talk(30)
    trained = TextSource(source=str(write_rows(tmp_path / "train.jsonl", rows[:20])))
    prose = TextSource(source=str(tmp_path / "prose.txt"))
    (tmp_path / "prose.txt").write_text("\n".join(turn["content"] for turn in rows[25]["messages"]))
    findings = Findings()
    other = write_rows(tmp_path / "other.jsonl", [{"conversations": row["messages"]} for row in rows[12:]])
    documents = measured(other, tokens=10**6, trained_on=(trained, prose), findings=findings)
    names = {one.name for one in documents}
    assert "other.jsonl:14" not in names  # prose that is trained on holds it
    assert "other.jsonl:1" not in names
    assert {"other.jsonl:9", "other.jsonl:18"} <= names
    assert "not measured, because text that was trained or calibrated on holds it" in findings.notes[0]
    assert findings.shared == {"chat": {"train.jsonl", "prose.txt"}}


def test_of_dialogues_that_are_trained_on_the_held_out_side_is_measured(talk: Path) -> None:
    documents = measured(talk, trained_on=(TextSource(source=str(talk)),), tokens=10**6)
    assert [one.name for one in documents] == [f"talk.jsonl:{number}" for number in (28, 29, 30)]


def test_dialogues_that_say_nothing_early_enough_are_left_out(tmp_path: Path) -> None:
    late = says("x" * 300, "y")
    findings = Findings()
    documents = measured(write_rows(tmp_path / "a.jsonl", [late, says("a", "b")]), findings=findings)
    assert [one.name for one in documents] == ["a.jsonl:2"]
    assert "left out, as nothing is scored within the first 100 tokens: 1 dialogue" in findings.notes[0]
    with pytest.raises(UserError, match="no dialogue is left to measure"):
        measured(write_rows(tmp_path / "b.jsonl", [late]))
