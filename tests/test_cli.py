"""The command line: instant help, errors in the words of people, and results for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import retrofit
from retrofit.cli.app import app
from retrofit.cli.group import Record, show_exception
from retrofit.escape import visible
from tests.commands import cli
from tests.hostile import HOSTILE
from tests.tiny import save_tiny

COMMANDS = [
    [name, *more]
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    for more in ([[sub] for sub in command.commands] if hasattr(command, "commands") else [[]])
]
HELP = """
import sys
from retrofit.cli.app import app
try:
    app(["--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "numpy", "matplotlib", "rich"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama")


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: retrofit" in done.stdout or "Usage:" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_in_its_help(command: list[str]) -> None:
    assert f"retrofit {' '.join(command)}" in cli(*command, "--help").split("Examples:")[1]


def test_version() -> None:
    assert cli("--version") == f"retrofit {retrofit.__version__}\n"


def test_every_command_is_a_function_even_when_a_subpackage_has_its_name() -> None:
    import retrofit.data.corpora
    import retrofit.evaluation.metrics.perplexity
    import retrofit.publishing.gate

    assert all(callable(getattr(retrofit, name)) for name in retrofit.COMMANDS)
    with pytest.raises(retrofit.UserError, match="is no folder"):
        retrofit.evaluate("./missing/folder/x", lengths=[16], text=["python-docs"])
    with pytest.raises(AttributeError):
        retrofit.nothing  # noqa: B018


def test_schema_is_json_schema_of_every_key() -> None:
    schema = json.loads(cli("schema"))
    assert {"convert", "context", "recover", "evaluate", "publish", "require"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    assert "quickstart" in cli("recipes", "list")
    assert "next: retrofit plan NAME --model MODEL" in cli("recipes", "list")
    assert {entry["name"] for entry in json.loads(cli("recipes", "list", "--json"))} >= {"gqa", "mqa"}
    shown = yaml.safe_load(cli("recipes", "show", "gqa", "--set", "convert.kv_heads=2"))
    assert shown["convert"]["kv_heads"] == 2
    assert shown["recover"]["warmup_ratio"] == 0.05
    target = tmp_path / "mine.yaml"
    cli("recipes", "copy", "gqa", target)
    assert target.read_text().startswith("#")
    assert "exists already" in cli("recipes", "copy", "gqa", target, code=2)


def test_inspect_shows_conversions_and_cache(tiny: Path) -> None:
    text = cli("inspect", tiny)
    assert f"next: retrofit convert {tiny} --kv-heads 2 --out out/kv2" in text
    assert "3 does not divide 4 KV heads" in text
    assert "RoPE linter: nothing" in text
    found = json.loads(cli("inspect", tiny, "--json"))
    assert found["kv_heads"] == 4
    assert found["kv_cache_bytes"]["8192"] == 8192 * 1024


def test_inspect_lints_a_folder_whose_architecture_is_not_known(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    config = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    text = cli("inspect", tmp_path, code=2)
    assert "`falcon` is not supported" in text
    assert "without the original length" in text
    rope["original_max_position_embeddings"] = 512
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    found = json.loads(cli("inspect", tmp_path, "--json", code=2))
    assert {one["severity"] for one in found["findings"]} == {"warning"}  # the older names are not there
    assert {one["verdict"] for one in found["engines"]} == {"not tried"}


def test_inspect_shows_what_each_engine_gave_for_such_a_model(tiny: Path) -> None:
    found = json.loads(cli("inspect", tiny, "--json"))
    assert {one["verdict"] for one in found["engines"]} == {"same"}
    assert {"vllm", "llama.cpp", "mlx"} <= {one["engine"] for one in found["engines"]}
    assert "Engines that were run with such a model" in cli("inspect", tiny)


def test_inspect_says_that_it_does_not_know_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "zzz"}')
    assert "does not know the model type `zzz`" in cli("inspect", tmp_path, code=2)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    text = cli("inspect", tmp_path, code=2)
    assert "`mamba` is not supported" in text
    assert "nothing to complain about" not in text


def test_doctor_names_every_kernel() -> None:
    found = json.loads(cli("doctor", "--json"))
    assert {"eager", "sdpa", "blockwise"} <= {kernel["name"] for kernel in found["kernels"] if kernel["available"]}
    assert "flash_attention_2" in cli("doctor")


def test_a_plan_is_followed_by_its_run(tiny: Path) -> None:
    options = ["kernel-only", "--model", tiny, "--set", "evaluate.lengths=[64, 128]"]
    said = cli("plan", *options)
    assert f"next: retrofit run kernel-only --model {tiny} --set 'evaluate.lengths=[64, 128]'" in said


def test_results_are_tables_in_a_notebook(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    quiet: dict[str, Any] = {"progress": False}
    found = retrofit.inspect(tiny, **quiet)._repr_html_()
    assert "KV heads it can be converted to" in found
    assert (
        "<table>" in retrofit.plan("kernel-only", model=tiny, overrides=["evaluate.lengths=64"], **quiet)._repr_html_()
    )  # type: ignore[attr-defined]
    evaluation = retrofit.evaluate(tiny, text=[text], lengths="64", out=tmp_path / "a.npz", **quiet)
    assert ">95% interval</th>" in evaluation._repr_html_()
    assert "b / a" in retrofit.compare(tmp_path / "a.npz", tmp_path / "a.npz", **quiet)._repr_html_()


def test_python_shows_progress_unless_told_not_to(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retrofit.inspect(tiny)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"  inspect {tiny}\n")
    retrofit.inspect(tiny, progress=False)
    assert capsys.readouterr().err == ""


def test_plan_reads_no_weights(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny / "config.json").read_text())
    short = ["--set", "convert.calibration.sequence_length=64", "--set", "recover.sequence_length=512"]
    found = json.loads(cli("plan", "quickstart", "--model", bare, *short, "--json"))
    assert [step["step"] for step in found["steps"]] == ["convert", "extend", "recover", "evaluate", "publish"]
    assert found["kv_heads"] == [4, 1]
    assert found["positions"] == [512, 16384]
    assert "measured here" in found["throughput"]["how"]


def test_only_the_folder_of_a_finished_run_is_published(tiny: Path) -> None:
    assert "retrofit.json" in cli("publish", tiny, "--repo", "someone/tiny", code=2)


def test_errors_are_three_lines_and_exit_code_2(tmp_path: Path) -> None:
    text = cli("inspect", tmp_path / "missing", code=2)
    assert "Traceback" not in text
    assert "fix:" in text
    assert len(text.strip().splitlines()) <= 3
    said = cli("compare", "a", "b", "--lengths", "1q", code=2)
    assert "--lengths: must be a whole number of tokens, for example 4096 or 32k, not `1q`" in said


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "command",
    [
        ("{}",),
        ("--{}",),
        ("inspect", "m/{}"),
        ("inspect", "x", "{}"),
        ("recipes", "show", "{}"),
        ("run", "gqa", "--set", "{}"),
    ],
)
def test_foreign_words_in_arguments_are_shown_as_words(
    text: str, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(app, [word.format(text) for word in command])
    assert done.exit_code == 2
    said = done.output.replace("\n", "")
    assert visible(said) == said


def test_logs_of_libraries_show_words(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record("transformers", 40, "x.py", 1, "model type %s", ("\x1b[2J",), None)
    assert record.getMessage() == "model type \\x1b[2J"
    try:
        raise ValueError("\x1b[2J")
    except ValueError as error:
        show_exception(ValueError, error, None)
    assert capsys.readouterr().err == "ValueError: \\x1b[2J\n"
