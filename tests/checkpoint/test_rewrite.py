"""Rules over a checkpoint: identity, change, drop, cast; determinism and bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.rewrite import rewrite
from retrofit.errors import UserError
from retrofit.model.load import stored_dtype

CONFIG = {"model_type": "llama"}


def source(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{i}.{p}.weight" for i in range(3) for p in "qkvo"]
    tensors = {name: torch.randn(8, 6, generator=generator).to(dtype) for name in names}
    tensors["steps"] = torch.arange(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("size", ["5GB", "200B"])
def test_identity(tmp_path: Path, size: str) -> None:
    checkpoint = source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    report = rewrite(checkpoint, tmp_path / "out", {}, config=CONFIG, max_shard_size=size)
    before, after = loaded(tmp_path / "in"), loaded(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(report.copied) == set(before)
    assert not report.changed
    assert not report.dropped
    assert Checkpoint.open(tmp_path / "out").config == {"model_type": "llama", "dtype": "bfloat16"}


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_reads_what_was_rewritten(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import save_tiny

    folder = save_tiny(tmp_path / "in", "llama", max_shard_size="50KB", tie_word_embeddings=tied)
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.shards) > 1
    (tmp_path / "out").mkdir()
    rewrite(checkpoint, tmp_path / "out", {}, config=checkpoint.config, max_shard_size="70KB")
    before = AutoModelForCausalLM.from_pretrained(folder)
    after, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(20)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_rules_change_split_and_drop(tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    rules = {
        "layers.0.k.weight": lambda name, t: [(name, t.float()[:4] * 2)],
        "layers.1.q.weight": lambda name, t: [("layers.1.q1", t[:4]), ("layers.1.q2", t[4:])],
        "layers.2.v.weight": None,
    }
    report = rewrite(checkpoint, tmp_path / "out", rules, config=CONFIG)
    before, after = loaded(tmp_path / "in"), loaded(tmp_path / "out")
    assert torch.equal(after["layers.0.k.weight"], before["layers.0.k.weight"][:4] * 2)
    assert after["layers.0.k.weight"].dtype == torch.bfloat16
    assert torch.equal(torch.cat([after["layers.1.q1"], after["layers.1.q2"]]), before["layers.1.q.weight"])
    assert "layers.2.v.weight" not in after
    assert "layers.1.q.weight" not in after
    assert report.dropped == ("layers.2.v.weight",)
    assert set(report.changed) == {"layers.0.k.weight", "layers.1.q.weight"}


def test_cast(tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "in", torch.float32)
    (tmp_path / "out").mkdir()
    rewrite(checkpoint, tmp_path / "out", {}, config=CONFIG, dtype=torch.bfloat16)
    before, after = loaded(tmp_path / "in"), loaded(tmp_path / "out")
    assert after["steps"].dtype == torch.int64
    assert torch.equal(after["layers.0.q.weight"], before["layers.0.q.weight"].bfloat16())
    assert Checkpoint.open(tmp_path / "out").config["dtype"] == "bfloat16"


def test_the_dtype_of_most_bytes_is_the_checkpoint_s(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    source(folder)
    norms = {f"norm.{i}": torch.ones(6) for i in range(20)}  # more tensors and fewer bytes
    save_file({**loaded(folder), **norms}, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    (tmp_path / "out").mkdir()
    rewrite(checkpoint, tmp_path / "out", {}, config=CONFIG)
    after = Checkpoint.open(tmp_path / "out")
    assert after.config["dtype"] == stored_dtype(folder) == "bfloat16"
    assert checkpoint.main_dtype == torch.bfloat16
    assert after.dtype("norm.0") == torch.float32
    assert after.dtype("layers.0.q.weight") == torch.bfloat16


@pytest.mark.parametrize("through", ["a cast alone", "a rule", "made"])
def test_no_cast_makes_an_infinity(through: str, tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "in", torch.float32)
    (tmp_path / "out").mkdir()
    name, large = "layers.1.k.weight", torch.full((8, 6), 1e5)
    rules = {name: lambda name, t: [(name, large)]} if through == "a rule" else {}
    made = {name: lambda: large} if through == "made" else {}
    if through == "a cast alone":
        save_file({**loaded(tmp_path / "in"), name: large}, tmp_path / "in" / "model.safetensors")
        checkpoint = Checkpoint.open(tmp_path / "in")
    with pytest.raises(UserError, match=r"`layers\.1\.k\.weight` has values beyond the largest float16"):
        rewrite(checkpoint, tmp_path / "out", rules, made=made, config=CONFIG, dtype=torch.float16)
    rewrite(checkpoint, tmp_path / "out", rules, made=made, config=CONFIG, dtype=torch.bfloat16)
    assert float(loaded(tmp_path / "out")[name].max()) == pytest.approx(1e5, rel=0.01)


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "in")
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
        rewrite(checkpoint, tmp_path / out, {"layers.0.k.weight": None}, config=CONFIG, max_shard_size="300B")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    checkpoint = source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="ghost"):
        rewrite(checkpoint, tmp_path / "out", {"ghost": None}, config=CONFIG)
    twice = {"layers.0.k.weight": lambda name, t: [("layers.0.q.weight", t)]}
    with pytest.raises(ValueError, match="already written"):
        rewrite(checkpoint, tmp_path / "out", twice, config=CONFIG)


def test_memory_is_one_tensor(tmp_path: Path) -> None:
    """160 MB of weights in 8 MB tensors, every one through a rule: the peak grows by far less than the model."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({f"t{i:02d}": torch.full((1024, 2048), float(i)) for i in range(20)}, folder / "model.safetensors")
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from retrofit.checkpoint.read import Checkpoint\n"
        "from retrofit.checkpoint.rewrite import rewrite\n"
        "c = Checkpoint.open(sys.argv[1])\n"
        "torch.ones(8).mul(2)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "c.require_finite()\n"
        "rewrite(c, Path(sys.argv[2]), {n: (lambda n, t: [(n, t * 2)]) for n in c.names}, config={})\n"
        "sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )
    (tmp_path / "out").mkdir()
    grown = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out")], capture_output=True, text=True, check=True
    ).stdout
    assert int(grown) * 1024 < 48e6
    assert Checkpoint.open(tmp_path / "out").tensor("t19")[0, 0] == 38
