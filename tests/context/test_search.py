"""The search of a position encoding: what may be tried, what a trial measures, and which one is chosen."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import GPTBigCodeConfig

from retrofit.context import rope
from retrofit.context.engines import unread
from retrofit.context.methods import extended
from retrofit.context.rope import extend
from retrofit.context.search import halving
from retrofit.context.search.candidates import PUBLISHED, candidates, rungs
from retrofit.context.search.encoded import encoded
from retrofit.context.search.halving import search
from retrofit.context.search.text import rung_text
from retrofit.errors import UserError
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import reading
from retrofit.recipe.schema import Search
from tests.tiny import BOS_ID, tiny_config, tiny_model, tiny_tokenizer

LENGTH = 2048
SECTION = Search(tokens=6 * LENGTH)


def text(length: int = LENGTH) -> torch.Tensor:
    ids = torch.randint(5, 60, (length,), generator=torch.Generator().manual_seed(1))
    ids[0] = BOS_ID
    return ids


@pytest.mark.parametrize("family", ["llama", "qwen3", "stablelm", "phi"])
def test_a_skip_moves_positions_and_hides_nothing(family: str) -> None:
    model, ids = tiny_model(family, max_position_embeddings=1024), text(96)
    skip = 500
    positions = torch.arange(96) + skip * (torch.arange(96) >= 40)
    mask = torch.full((96, 96), -torch.inf).triu(1)[None, None]
    with torch.inference_mode():
        whole = model(ids[None], position_ids=positions[None], attention_mask=mask).logits[0]
    expected = torch.nn.functional.cross_entropy(whole[:-1].float(), ids[1:], reduction="none")
    with reading(model, None, None):
        reader = Reader(model, 96, chunk=16)
        found = [losses for _, losses in reader.predicted(ids[:40], ids[1:41])]
        reader.mark()
        reader.skip(skip)
        found += [losses for _, losses in reader.predicted(ids[40:95], ids[41:96])]
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)
        # Back before the skip: what is read then stands where it did.
        reader.rewind(40)
        again = torch.cat([losses for _, losses in reader.predicted(ids[40:95], ids[41:96])])
        reader.rewind(0)
        plain = torch.cat([losses for _, losses in reader.predicted(ids[:95], ids[1:])])
    torch.testing.assert_close(again, plain[40:], atol=1e-4, rtol=1e-4)
    assert (again - expected[40:]).abs().max() > 1e-3


def test_a_budget_is_shared_by_the_rungs() -> None:
    assert rungs(32768, Search().tokens_for(32768)) == ((2048, 64), (8192, 16), (32768, 4))
    assert rungs(512, 6 * 512) == ((256, 6), (512, 3))  # short windows are read whole sooner
    with pytest.raises(UserError, match="196608 tokens at least"):
        rungs(32768, 100_000)
    most = 10_000 * 3 * 2048
    assert rungs(32768, most)[0] == (2048, 10_000)
    with pytest.raises(UserError, match="at most 10,000 are tried") as caught:
        rungs(32768, 10**12)
    assert f"lower it to {most} at most" in str(caught.value.fix)


@pytest.mark.parametrize("family", ["llama", "qwen2", "stablelm", "gemma3_text", "mixtral"])
def test_candidates_are_read_alike_everywhere(family: str) -> None:
    config = tiny_config(family)
    length = 4 * config.max_position_embeddings
    found = candidates(config, length=length, count=24, seed=3)
    known = unread(config)
    for candidate in found:
        assert unread(candidate.config) <= known
        assert candidate.config.max_position_embeddings == length
    assert len(found) == 24 == len({candidate.label for candidate in found})
    assert found == candidates(config, length=length, count=24, seed=3)
    assert found[1:] != candidates(config, length=length, count=24, seed=4)[1:]
    assert [c.label for c in found if c.published] == [c.method for c in found if c.published]
    methods = Counter(candidate.method for candidate in found if not candidate.published)
    assert methods["ntk"] >= 3
    assert methods["yarn"] >= 3
    thetas = [candidate.settings.theta for candidate in found if candidate.method == "ntk" and not candidate.published]
    assert max(thetas) > 2 * min(thetas)


def test_an_encoding_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, object]] = []

    def counted(text, *, method, settings, **how):
        asked.append((method, settings))
        return extended(text, method=method, settings=settings, **how)

    monkeypatch.setattr(rope, "extended", counted)
    found = candidates(tiny_config("llama"), length=LENGTH, count=24)
    assert len(found) == 24
    assert max(asked.count(one) for one in asked) == 1


def test_transformers_alone_has_more_to_choose_from() -> None:
    found = candidates(tiny_config("llama"), length=LENGTH, count=24, portable=False)
    yarn = [candidate.settings for candidate in found if candidate.method == "yarn" and not candidate.published]
    assert len({settings.attention_factor for settings in yarn}) > 3
    assert len({settings.scale for settings in yarn}) > 3
    assert found[0].label == PUBLISHED[0]


def test_clamped_queries_are_searched_without_attention_factors() -> None:
    found = candidates(tiny_config("olmo", clip_qkv=8.0), length=LENGTH, count=24)
    assert len(found) == 24 == len({candidate.label for candidate in found})
    assert {candidate.settings.attention_factor for candidate in found} == {None}


def test_models_without_a_choice_are_refused() -> None:
    with pytest.raises(UserError, match="no rotary position encoding"):
        candidates(GPTBigCodeConfig(n_positions=512), length=LENGTH, count=4)
    extended = extend(tiny_config("llama"), factor=2, method="linear")
    assert {c.method for c in candidates(extended, length=LENGTH, count=8, portable=False)} == {"linear"}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_encoding_is_that_of_its_configuration_and_is_put_back(family: str) -> None:
    model, ids = tiny_model(family), text(64)[None]
    longer = extend(model.config, factor=4, method="yarn")
    with torch.inference_mode():
        before = model(ids).logits
        expected = type(model)(longer).eval()
        expected.load_state_dict(model.state_dict())
        with encoded(model, longer):
            torch.testing.assert_close(model(ids).logits, expected(ids).logits)
        torch.testing.assert_close(model(ids).logits, before)
        assert (expected(ids).logits - before).abs().max() > 1e-4


def test_the_search_keeps_its_reference_and_takes_the_least_objective(tmp_path, monkeypatch) -> None:
    model, tokenizer, ids = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), text()
    before = dict(model.config.rope_parameters)
    asked = {"seed": 3, "section": SECTION, "identity": {"model.safetensors": "a"}, "partial": tmp_path / "trials"}
    found = search(model, tokenizer, ids, **asked)
    by_rung = {rung: [trial for trial in found.trials if trial.rung == rung] for rung in (1, 2, 3)}
    assert [len(trials) for trials in by_rung.values()] == [16, 8, 2]
    assert [trials[0].tokens for trials in by_rung.values()] == [256, 512, 2048]
    assert all("yarn" in {trial.label for trial in trials} for trials in by_rung.values())
    ranked = sorted(by_rung[1], key=lambda trial: trial.objective)
    kept = {trial.label for trial in by_rung[2]}
    # Yarn's encoding with gentler factors, then published, small, middling and large ones (yarn's own is 1.139).
    gentler = {"yarn attention_factor 1.07", "yarn attention_factor 1.1", "yarn attention_factor 1.03"}
    assert gentler | {"yarn"} <= kept
    for low, high in ((None, None), (1.0, 1.069), (1.07, 1.138), (1.139, 1.21)):
        factors = [(t.label, t.settings.get("attention_factor")) for t in ranked if t.label not in gentler | {"yarn"}]
        inside = [label for label, f in factors if (f is None if low is None else f is not None and low <= f <= high)]
        assert inside
        assert inside[0] in kept
    assert "yarn" in kept
    assert len(kept) == 8
    assert found.winner == min(by_rung[3], key=lambda trial: trial.objective)
    assert found.reference.label == "yarn"
    assert found.reference.rung == 3
    assert found.read == sum(trial.tokens for trial in found.trials) <= SECTION.tokens
    for trial in found.trials:
        expected = trial.tail + 0.1 * trial.needle
        assert trial.objective >= expected - 1e-9
    assert found.winner.objective == pytest.approx(
        found.winner.tail + 0.1 * found.winner.needle + max(0, found.winner.native - found.native)
    )
    assert model.config.rope_parameters == before
    assert model.config.max_position_embeddings == 512
    # The same question again reads nothing; another one starts anew.
    monkeypatch.setattr(halving, "Reader", None)
    assert search(model, tokenizer, ids, **asked) == found
    weights = SECTION.model_copy(update={"needle_weight": 0})
    # The weights of the objective are no part of the question: what was measured serves others as well.
    weights = SECTION.model_copy(update={"needle_weight": 0.1001})
    again = search(model, tokenizer, ids, **{**asked, "section": weights})
    assert again.winner.objective - found.winner.objective == pytest.approx(0.0001 * found.winner.needle)
    trials = {path.name: path.read_bytes() for path in (tmp_path / "trials").iterdir()}
    for change in ({"seed": 1}, {"identity": {"model.safetensors": "b"}}):
        with pytest.raises(TypeError):
            search(model, tokenizer, ids, **{**asked, **change})
        for name, content in trials.items():
            (tmp_path / "trials" / name).write_bytes(content)


def test_the_last_rung_is_the_loss_of_one_plain_pass() -> None:
    model, tokenizer, ids = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), text()
    found = search(model, tokenizer, ids, section=SECTION)
    read = rung_text(tokenizer, ids, 3, rungs(LENGTH, SECTION.tokens), 512, 0)
    config = extend(model.config, length=LENGTH, method="yarn")
    longer = type(model)(config).eval()
    longer.load_state_dict(model.state_dict())
    with torch.inference_mode():
        logits = longer(read.ids_T[None]).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, read.ids_T[1:], reduction="none")
    kept = read.text_T
    assert 0.7 < kept.double().mean() < 1  # the facts are no text
    assert found.reference.native == pytest.approx(float(losses[:512][kept[:512]].mean()), abs=1e-4)
    assert found.reference.tail == pytest.approx(float(losses[-512:][kept[-512:]].mean()), abs=1e-4)  # half of the text
    answers = []
    for question, answer in read.questions:
        whole = torch.cat([read.ids_T, question, answer])
        with torch.inference_mode():
            logits = longer(whole[None]).logits[0, -len(answer) - 1 : -1].float()
        answers.append(float(torch.nn.functional.cross_entropy(logits, answer)))
    assert found.reference.needle == pytest.approx(np.mean(answers), abs=1e-4)


def test_every_token_that_passes_read_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_model("llama", max_position_embeddings=512), []
    hidden = Reader.hidden

    def counted(self: Reader, ids_T: torch.Tensor):
        read.append(len(ids_T))
        return hidden(self, ids_T)

    monkeypatch.setattr(Reader, "hidden", counted)
    found = search(model, tiny_tokenizer(), text(), section=SECTION, name="book")
    assert found.tokens_read == sum(read) > found.read
    assert found.text == "book"
    assert len(found.baselines) == 3
    assert found.baselines[-1] == found.native
    for trial in found.trials:
        assert trial.excess == pytest.approx(trial.native - found.baselines[trial.rung - 1])


def test_the_second_rung_reads_the_middle_with_attention_to_nearby_tokens() -> None:
    model, tokenizer, ids = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), text()
    plan = rungs(LENGTH, SECTION.tokens)
    read = rung_text(tokenizer, ids, 2, plan, 512, 0)
    assert len(read.ids_T) == LENGTH
    assert read.cost == plan[1][0] == 512
    assert not read.skip
    assert (read.cut, read.resume, read.near, read.tail) == (512, 1536, 64, 512)
    config = extend(model.config, length=LENGTH, method="yarn")
    with encoded(model, config), reading(model, None, None):
        native, tail, _ = halving._Rung(model, tokenizer, read, 2, 512, SECTION, None)._read(read)
    # Chunks are 512 tokens long: those in the middle see themselves and 64 tokens before.
    position = torch.arange(LENGTH)
    first = torch.where((position >= 512) & (position < 1536), position - position % 512 - 64, 0)
    visible = (position[None] <= position[:, None]) & (position[None] >= first[:, None])
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~visible, -torch.inf)[None, None]
    with encoded(model, config), torch.inference_mode():
        logits = model(read.ids_T[None], attention_mask=mask).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, read.ids_T[1:], reduction="none")
    assert native == pytest.approx(float(losses[:512][read.text_T[:512]].mean()), abs=1e-4)
    assert tail == pytest.approx(float(losses[-512:][read.text_T[-512:]].mean()), abs=1e-4)


def test_a_model_of_nan_is_refused() -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="not a finite number"):
        search(model, tiny_tokenizer(), text(), section=SECTION)
