"""`evaluate --kv-cache-dtype`: every pass and test reads through it, it is said everywhere, and kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from retrofit.evaluation.folders import ready, run_costs, score_folder
from retrofit.evaluation.result import EvaluationResult
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.score import score
from retrofit.kernels.rounded_cache import round_cache
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Evaluate
from retrofit.system.sequence_groups import sequence_groups
from retrofit.system.world import ALONE, World
from retrofit.workflow.steps import evaluate as step
from tests.evaluation.test_dealt_out import documents
from tests.ranks import on_ranks
from tests.tiny import save_tiny, tiny_model
from tests.workflow.conftest import model, recipe, retrofit, sections, texts  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads are blocks of 32."""
    return save_tiny(tmp_path_factory.mktemp("blocks") / "tiny", "llama", num_attention_heads=2, num_key_value_heads=2)


def section(**values: Any) -> Evaluate:
    return Evaluate(lengths=[24, 32], chunk=8, tail=8, cost_lengths=[], continuation_tokens=0, **values)


def test_losses_and_needles_are_read_through_the_cache(blocks: Path) -> None:
    folder, usual = ModelFolder(blocks), {"label": "tiny", "kernel": "auto", "device": "cpu"}
    asked = {"needle": {"lengths": [256], "depths": 2}}
    plain = score_folder(folder, documents(), section(**asked), **usual)
    stored = score_folder(folder, documents(), section(kv_cache_dtype="q4_0", **asked), **usual)
    assert plain.losses.meta.get("kv_cache_dtype") is None
    assert stored.losses.meta["kv_cache_dtype"] == "q4_0"
    for a, b in zip(plain.losses.losses, stored.losses.losses, strict=True):
        assert a[0] != b[0] or np.abs(a - b).max() > 1e-4
    assert plain.measured.needle is not None
    assert stored.measured.needle is not None
    pairs = zip(plain.measured.needle.cells, stored.measured.needle.cells, strict=True)
    assert all(a.answer.loss != b.answer.loss for a, b in pairs)


def test_costs_are_those_of_the_models_own_cache(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[str] = []
    monkeypatch.setattr("retrofit.evaluation.folders.round_cache", lambda _, kind: rounded.append(kind))
    costed = section(kv_cache_dtype="q4_0").model_copy(update={"cost_lengths": (16,), "decode_tokens": 1})
    run_costs({"a": ModelFolder(blocks)}, costed, kernel="auto", device="cpu", seed=0)
    assert rounded == []
    ready(ModelFolder(blocks), costed, "auto", "cpu")
    assert rounded == ["q4_0"]


def shared(world: World) -> list[TokenLosses]:
    """Documents shared out among the ranks of a ring."""
    found = tiny_model("llama", num_key_value_heads=2)
    round_cache(found, "int8")
    sequences = sequence_groups(world, world.size) if world.size > 1 else None
    return [score(found, documents(), world=world, sequences=sequences)]


def test_a_ring_reads_through_it_as_one_process_does(tmp_path: Path) -> None:
    [alone], [plain] = shared(ALONE), [score(tiny_model("llama", num_key_value_heads=2), documents())]
    for [found] in on_ranks(tmp_path, 2, shared):
        assert found.meta["kernel"] == "ring"
        for a, b, c in zip(found.losses, alone.losses, plain.losses, strict=True):
            assert np.linalg.norm(a - b) < 0.15 * np.linalg.norm(c - b)


def test_it_is_said_and_counted_in_bytes(blocks: Path, texts: Path, tmp_path: Path) -> None:  # noqa: F811
    usual = ("evaluate", blocks, "--text", texts / "held.txt", "--lengths", "64", "--documents", "1")
    found = {}
    for name in ("auto", "q8_0"):
        out = tmp_path / f"{name}.npz"
        done = retrofit(*usual, "--kv-cache-dtype", name, "--out", out, "--json")
        assert done.exit_code == 0, done.output
        found[name] = json.loads(done.stdout)
        assert found[name]["kv_cache_dtype"] == name
    assert found["auto"]["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 4
    assert found["q8_0"]["kv_bytes_per_token"] == 2 * 2 * 2 * 34
    shown = retrofit(*usual, "--kv-cache-dtype", "q8_0")
    assert "llama.cpp, --cache-type-k q8_0" in shown.output.replace("\n", " ")
    compared = retrofit("compare", tmp_path / "auto.npz", tmp_path / "q8_0.npz", "--lengths", "64").output
    assert "a was read with a KV cache of auto, b with q8_0" in " ".join(compared.split())
    other = retrofit(*usual, "--kv-cache-dtype", "q4_0", "--out", tmp_path / "q8_0.npz")
    assert other.exit_code == 2, "another type is another question"


def test_a_run_keeps_the_types_apart_and_publishes_none(recipe: Any, model: Path, texts: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    changed = {**sections(model, texts)["evaluate"], "kv_cache_dtype": "int8", "cost_lengths": []}
    alone = {"convert": None, "context": None, "recover": None, "require": {}, "publish": None}
    changed["lengths"] = [64]
    refused = retrofit("run", recipe(**{**alone, "publish": {}}, evaluate=changed), "--out", out)
    assert refused.exit_code == 2
    assert "evaluate.kv_cache_dtype" in refused.output
    first = retrofit("run", recipe(**alone, evaluate=changed), "--out", out)
    assert first.exit_code == 0, first.output
    stored = json.loads((next(out.glob("*-evaluate")) / step.METRICS).read_text())
    assert EvaluationResult.restored(stored).models[0].kv_cache_dtype == "int8"
    assert "nothing of it is in the checkpoint" in (out / "report.md").read_text()
    before = TokenLosses.load(out / "losses" / "original.npz").losses[0]
    again = retrofit("run", recipe(**alone, evaluate={**changed, "kv_cache_dtype": "auto"}), "--out", out)
    assert again.exit_code == 0, again.output
    assert not np.array_equal(TokenLosses.load(out / "losses" / "original.npz").losses[0], before)


def test_blocks_that_do_not_fit_the_heads_are_refused(model: Path, texts: Path) -> None:  # noqa: F811
    done = retrofit("evaluate", model, "--text", texts / "held.txt", "--lengths", "64", "--kv-cache-dtype", "q8_0")
    assert done.exit_code == 2
    assert "head dim of 16 is no multiple" in " ".join(done.output.split())
    assert "--kv-cache-dtype" in done.output


def test_a_recipe_names_a_type_that_there_is(recipe: Any, tmp_path: Path) -> None:  # noqa: F811
    path = recipe(evaluate={"kv_cache_dtype": "int4"})
    assert yaml.safe_load(path.read_text())["evaluate"] == {"kv_cache_dtype": "int4"}
    done = retrofit("run", path, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "fp8_e4m3" in done.output
