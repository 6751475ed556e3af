"""Programs in the place of llama.cpp's, for tests: a "GGUF file" is an archive of the folder that it was made from.

They are asked and answer as ours do (`engines/programs/to_gguf.py`, `gguf/programs/`), and run under this interpreter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from retrofit.publishing.engines import converter
from retrofit.publishing.engines.environments import Environment
from retrofit.publishing.gguf import quantiser, reading
from retrofit.publishing.gguf.writing import Tools

HERE = Path(sys.executable)
TOOLS = Tools(Environment("convert", HERE, False), Environment("llama.cpp", HERE, False), Environment("q", HERE, False))

CONVERT = """
import json, tarfile
from pathlib import Path

KNOWN = {"LlamaForCausalLM"}

def main(job):
    results = []
    for one in job["files"]:
        folder = Path(one["folder"])
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        assert not list(folder.glob("*.py"))
        assert "auto_map" not in (folder / "config.json").read_text()
        if name not in KNOWN:
            results.append({"error": f"Model {name} is not supported"})
            continue
        if not one["check"]:
            with tarfile.open(one["out"], "w", dereference=True) as archive:
                archive.add(folder, "folder")
        results.append({})
    return {"version": "0.1", "results": results}
"""
QUANTISE = """
import shutil

def main(job):
    for one in job["files"]:
        if one["kind"] == 10:
            open(one["out"], "w").write("half")
            return {"version": "0.2", "error": "no K quants for this shape"}
        shutil.copyfile(job["source"], one["out"])
        with open(one["out"], "ab") as file:
            file.write(b"QUANTISED")
    return {"version": "0.2"}
"""
READ = """
import tarfile, tempfile
from pathlib import Path

def main(job):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = Path(job["file"]).read_bytes()
    with tempfile.TemporaryDirectory() as place, tarfile.open(job["file"]) as archive:
        archive.extractall(place, filter="data")
        folder = f"{place}/folder"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    if data.endswith(b"QUANTISED"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
    losses, greedy = [], []
    for one in job["passages"]:
        ids = torch.tensor([one["ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        found = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(found[one["first"]:].tolist())
        greedy.append(logits.argmax(-1)[one["first"]:].tolist())
    tokens = [tokenizer.convert_ids_to_tokens(i) or "" for i in range(model.config.vocab_size)]
    return {
        "version": "b1",
        "metadata": {
            "general.architecture": "llama",
            "llama.context_length": str(model.config.max_position_embeddings),
            **({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
        },
        "parameters": model.num_parameters(),
        "vocabulary": tokens,
        "texts": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]],
        "losses": losses,
        "greedy": greedy,
    }
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three programs, in a folder where a test may change them."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for module, name, text in (
        (converter, "convert", CONVERT),
        (quantiser, "quantise", QUANTISE),
        (reading, "read", READ),
    ):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(module, "PROGRAM", folder / f"{name}.py")
    monkeypatch.setattr("retrofit.workflow.gguf.tools_for", lambda *_, **__: TOOLS)
    monkeypatch.setattr("retrofit.publishing.gguf.writing._release", lambda environment: "0.1")
    return folder
