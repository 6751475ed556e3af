"""Whole steps on this device, as a person runs them: what each took beside what its plan gave."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evals.gpu.models import SMOLLM2
from evals.gpu.parts import Row, Setting
from tests.tiny import save_tiny, tiny_tokenizer

SEVEN_BILLION: dict[str, Any] = {  # 6.9 billion parameters
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11264,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
_TEXT = ["python-docs", "python-stdlib"]


def demo(setting: Setting) -> Iterator[Row]:
    """The quickstart recipe from the beginning to a published folder."""
    small = {
        "convert": {"kv_heads": 1, "calibration": {"text": _TEXT, "tokens": 1024, "sequence_length": 128}},
        "context": {"length": 1024, "method": "yarn"},
        "recover": _recover(512, 64, 64),
        "evaluate": _evaluate(64, [32]),
        "publish": None,
    }
    full = _quickstart()
    yield from _run("demo", setting, small if setting.reduced else full)


def training(setting: Setting) -> Iterator[Row]:
    """48 steps of 1,024 tokens, distilled from a model with 3 KV heads into one with 1."""
    tokens, length, held = (512, 64, 64) if setting.reduced else (49_152, 1024, 8192)
    recipe = {"convert": {"kv_heads": 1, "method": "mean"}, "recover": _recover(tokens, length, held)}
    yield from _run("training", setting, {**recipe, "evaluate": None, "publish": None})


def search(setting: Setting) -> Iterator[Row]:
    """The position encoding of a window four times as long."""
    length = 1024 if setting.reduced else 32_768
    budget = {"tokens": 4 * length} if setting.reduced else {}
    context = (
        {"length": length, "method": "search", "search": budget} if budget else {"length": length, "method": "search"}
    )
    yield from _run("search", setting, {"context": context, "evaluate": None, "publish": None})


def large(setting: Setting) -> Iterator[Row]:
    """A random model of 6.9 billion parameters: `cp -r`, then 8 KV heads by `mean` and by `calibrated`."""
    from evals.benchmarks import large as big

    source = setting.work / "large"
    _make(source, {} if setting.reduced else SEVEN_BILLION, setting)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    for _ in range(2):  # the first brings it into the page cache
        began = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(setting.work / "copy")], check=True)
        copied = time.perf_counter() - began
        subprocess.run(["rm", "-r", str(setting.work / "copy")], check=True)
    yield Row("cp -r", copied, "s", note=f"{nbytes / 1e9:.3g} GB")
    heads = 1 if setting.reduced else big.KV_HEADS
    for method, tokens in (("mean", 0), ("calibrated", 1024 if setting.reduced else 16_384)):
        convert: dict[str, Any] = {"kv_heads": heads, "method": method}
        if tokens:
            convert["calibration"] = {"text": _TEXT, "tokens": tokens}
            if setting.reduced:
                convert["calibration"]["sequence_length"] = 128
        for row in _run(f"large, {method}", setting, {"convert": convert, "evaluate": None, "publish": None}, source):
            assert isinstance(row.value, float)
            limit = 1.5 * copied if method == "mean" else 300.0
            passed = None if setting.reduced or not row.what.endswith("convert") else row.value <= limit
            note = f"{row.value / copied:.1f} times cp -r; aim 1.5" if method == "mean" else "aim 300 s"
            yield Row(row.what, row.value, row.unit, row.predicted, passed, note)


def _quickstart() -> dict[str, Any]:
    import yaml

    from retrofit import bundled

    loaded: dict[str, Any] = yaml.safe_load((bundled.folder("recipes") / "quickstart.yaml").read_text("utf-8"))
    return {key: value for key, value in loaded.items() if key not in ("name", "description", "model", "require")}


def _recover(tokens: int, length: int, held: int) -> dict[str, Any]:
    return {"tokens": tokens, "sequence_length": length, "text": _TEXT, "eval_tokens": held, "evals": 2}


def _evaluate(length: int, costs: list[int]) -> dict[str, Any]:
    return {"lengths": [length], "text": _TEXT, "documents": 1, "cost_lengths": costs, "decode_tokens": 2, "tail": 32}


def _run(name: str, setting: Setting, steps: Mapping[str, Any], model: Path | None = None) -> Iterator[Row]:
    """Run a recipe; a row for each line of its journal."""
    import yaml

    import retrofit

    source = str(model) if model is not None else setting.model
    if source is None:
        folder = setting.work / "small"
        if not folder.exists():
            _make(folder, {} if setting.reduced else {**SMOLLM2, "max_position_embeddings": 8192}, setting)
        source = str(folder)
    place = setting.work / name.replace(", ", "-")
    written = {"name": place.name, "model": source, "device": setting.device, **steps}
    recipe = setting.work / f"{place.name}.yaml"
    recipe.write_text(yaml.safe_dump(written), encoding="utf-8")
    began = time.perf_counter()
    retrofit.run(recipe, out=place, progress=False)
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (place / "journal.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        if "step" in line:
            yield Row(f"{name}: {line['step']}", float(line["seconds"]), "s", line["predicted_seconds"])
    yield Row(f"{name}: all, checks included", seconds, "s")


def _make(folder: Path, shape: Mapping[str, Any], setting: Setting) -> None:
    """Write a random checkpoint; nothing of `shape` is a tiny one. The tokenizer reads bytes."""
    if not shape:
        save_tiny(folder)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **shape)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    tiny_tokenizer().save_pretrained(folder)
    del model
    if setting.device.startswith("cuda"):
        torch.cuda.empty_cache()
