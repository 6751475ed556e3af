"""Quality orderings, on a small model that is trained here on built-in text: random models have no quality to lose."""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from retrofit.kv_heads.convert import CalibrationText, ConvertReport, convert
from tests.tiny import save_tiny, tiny_model

LENGTH = 128
STEPS = 100


def _modules() -> list[ModuleType]:
    return [inspect, json, textwrap, json.decoder, json.encoder]


def _bytes(kind: str) -> torch.Tensor:
    """All of one kind of text as token ids of the byte-level tokenizer, [sequences, LENGTH]."""
    names = sorted(topics)
    text = "".join(topics[n] for n in names) if kind == "docs" else "".join(map(inspect.getsource, _modules()))
    ids = torch.tensor(list(text.encode()))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def _split(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, held out): the last tenth of the text is held out."""
    ids = _bytes(kind)
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level llama, 4 KV heads, that has learnt something of documentation and code."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
    torch.manual_seed(0)
    model = tiny_model("llama", **shape)
    for name, parameter in model.named_parameters():  # the tiny models' norms and scales are odd on purpose
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    model.set_attn_implementation("sdpa")
    text = torch.cat([_split("docs")[0], _split("code")[0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        batch = text[torch.randint(len(text), (12,))]
        logits = model(batch).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_tiny(folder, "llama", **shape)  # for the tokenizer
    model.save_pretrained(folder)
    return folder


@functools.cache
def loss_of(folder: Path, kind: str) -> float:
    """Mean held-out loss in nats per byte."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = _split(kind)[1][:64]
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.fixture(scope="module")
def converted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, ConvertReport]]:
    """Convert the trained model; each conversion is made once."""
    made: dict[tuple[object, ...], tuple[Path, ConvertReport]] = {}
    parts = [_split(kind)[0][::7][:96] for kind in ("docs", "code")]
    text = CalibrationText(torch.cat(parts), ("docs",) * len(parts[0]) + ("code",) * len(parts[1]))

    def make(kv_heads: int, method: str, repair: str = "none") -> tuple[Path, ConvertReport]:
        key = (kv_heads, method, repair)
        if key not in made:
            out = tmp_path_factory.mktemp(f"{method}-{kv_heads}-{repair}")
            report = convert(trained, out, kv_heads=kv_heads, method=method, repair=repair, text=text)  # type: ignore[arg-type]
            made[key] = (out, report)
        return made[key]

    return make


def test_the_model_learnt_something(trained: Path) -> None:
    assert loss_of(trained, "docs") < 2.6, "far below the 5.5 nats of a uniform guess"


@pytest.mark.parametrize("kind", ["docs", "code"])
@pytest.mark.parametrize("kv_heads", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_calibrated_beats_mean_and_the_repair_beats_the_merge(
    trained: Path, converted: Callable[..., tuple[Path, ConvertReport]], kind: str, kv_heads: int
) -> None:
    original = loss_of(trained, kind)
    mean = loss_of(converted(kv_heads, "mean")[0], kind) - original
    merged = loss_of(converted(kv_heads, "calibrated")[0], kind) - original
    repaired = loss_of(converted(kv_heads, "calibrated", "o_proj")[0], kind) - original
    assert repaired < merged < 0.7 * mean


@pytest.mark.parametrize("kind", ["docs", "code"])
def test_more_kv_heads_lose_less(
    trained: Path, converted: Callable[..., tuple[Path, ConvertReport]], kind: str
) -> None:
    assert loss_of(converted(2, "calibrated", "o_proj")[0], kind) < loss_of(
        converted(1, "calibrated", "o_proj")[0], kind
    )


def test_the_report_predicts_which_conversion_costs_more(
    trained: Path, converted: Callable[..., tuple[Path, ConvertReport]]
) -> None:
    def predicted(kv_heads: int) -> float:
        return sum((layer.keys or 0.0) + (layer.values or 0.0) for layer in converted(kv_heads, "calibrated")[1].layers)

    assert 0 < predicted(2) < predicted(1)
