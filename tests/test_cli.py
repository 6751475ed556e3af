"""The command line: instant help, errors in the words of people, and results for machines."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import retrofit
from retrofit.cli.app import app
from retrofit.cli.group import Record, show_exception
from retrofit.data.measured import _reads, read_before
from retrofit.escape import visible
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.recipe.options import recipe_of
from retrofit.recipe.schema import TextSource
from tests.hostile import HOSTILE
from tests.tiny import save_tiny

COMMANDS = [
    ["run"],
    ["plan"],
    ["inspect"],
    ["convert"],
    ["extend"],
    ["recover"],
    ["evaluate"],
    ["publish"],
    ["compare"],
    ["recipes", "list"],
    ["recipes", "show"],
    ["recipes", "copy"],
    ["schema"],
    ["doctor"],
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


def cli(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout if code == 0 or "--json" in arguments else result.output


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


def test_convert_and_extend_write_folders_that_stock_transformers_loads(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    two = shlex.quote(str(tmp_path / "two"))
    said = cli("convert", tiny, "--kv-heads", 2, "--method", "mean", "--out", tmp_path / "two")
    assert f"next: retrofit evaluate {two}\n  or: retrofit recover {two} --teacher {tiny} --out {two}-recovered" in said
    result = json.loads(
        cli(
            "extend", tmp_path / "two", "--factor", 2, "--method", "ntk", "--attention-factor", 1.2,
            "--out", tmp_path / "long", "--json",
        )
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert model.config.num_key_value_heads == 2
    assert model.config.max_position_embeddings == 1024
    assert result["report"]["length"] == 1024
    assert result["report"]["query_scale"] == pytest.approx(1.44)
    record = json.loads((tmp_path / "long" / "retrofit.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["convert", "extend"]
    assert "not empty" in cli("extend", tiny, "--factor", 2, "--out", tmp_path / "long", code=2)


def test_evaluate_keeps_losses_that_compare_reads(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    for model, name in ((tiny, "a.npz"), (other, "b.npz")):
        out = cli(
            "evaluate", model, "--text", text, "--lengths", "64,128", "--out", tmp_path / name, "--json"
        )  # fmt: skip
        rows = json.loads(out)["rows"]
        assert {row["length"] for row in rows} == {64, 128}
    found = json.loads(cli("compare", tmp_path / "a.npz", tmp_path / "b.npz", "--lengths", "64", "--json"))
    row = found["rows"][0]
    assert row["ratio"] == pytest.approx(row["ppl_b"] / row["ppl_a"], rel=1e-6)
    assert row["low"] < row["ratio"] < row["high"]
    assert "of different texts" in _compare_with_another_text(tiny, tmp_path)


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_a_class_without_sdpa_is_evaluated(tmp_path: Path, kernel: str) -> None:
    model = save_tiny(tmp_path / "gemma2", "gemma2")
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 5)
    options = ("--text", tmp_path / "book.txt", "--lengths", "64", "--kernel", kernel, "--json")
    assert json.loads(cli("evaluate", model, *options))["kernel"] == "eager"


def _compare_with_another_text(tiny: Path, tmp_path: Path) -> str:
    text = tmp_path / "another.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    cli("evaluate", tiny, "--text", text, "--lengths", "64", "--out", tmp_path / "c.npz")
    return cli("compare", tmp_path / "a.npz", tmp_path / "c.npz", code=2)


def test_recover_trains_towards_the_original(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index}.txt").write_text(f"{index} little sentences, again and again. " * 40)
    cli("convert", tiny, "--kv-heads", 2, "--method", "mean", "--out", tmp_path / "two")
    options = ["--tokens", 512, "--sequence-length", 64, "--learning-rate", "0.01", "--text", tmp_path / "text"]
    found = cli("recover", tmp_path / "two", "--teacher", tiny, *options, "--out", tmp_path / "recovered", "--json")
    report = json.loads(found)["report"]
    assert report["best_loss"] < report["start_loss"]
    assert report["tokens"] == 512
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "recovered").config.num_key_value_heads == 2
    record = json.loads((tmp_path / "recovered" / "retrofit.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["convert", "recover"]
    assert not list(tmp_path.glob("*.work"))
    assert not list(tmp_path.glob("*.partial"))


def test_recover_takes_positions_and_what_is_trained_from_options(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index}.txt").write_text(f"{index} little sentences, again and again. " * 40)
    options = ["--tokens", 256, "--sequence-length", 64, "--text", tmp_path / "text", "--out", tmp_path / "long"]
    command = ["recover", tiny, "--teacher", tiny, *options]
    assert "add --positions pose" in cli(*command, "--short-share", 0.5, code=2)
    cli(*command, "--positions", "pose", "--short-share", 0.5, "--norms", "--gradient-checkpointing")
    (step,) = json.loads((tmp_path / "long" / "retrofit.json").read_text())["steps"]
    section = step["config"]
    assert (section["positions"], section["short_share"], section["gradient_checkpointing"]) == ("pose", 0.5, True)
    assert section["adapter"]["norms"]
    assert not section["document_masking"]


def test_what_a_checkpoint_was_trained_on_is_measured_on_its_held_out_part(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index:02}.txt").write_text(f"{index} little sentences, again and again. " * 40)
    options = ["--tokens", 128, "--sequence-length", 64, "--rank", 2, "--text", tmp_path / "text"]
    cli("recover", tiny, "--teacher", tiny, *options, "--out", tmp_path / "recovered")
    evaluate = ["--text", tmp_path / "text", "--lengths", 64, "--documents", 12, "--out"]
    for model, name in ((tiny, "before"), (tmp_path / "recovered", "after")):
        cli("evaluate", model, *evaluate, tmp_path / f"{name}.npz")
    before, after = (TokenLosses.load(tmp_path / f"{name}.npz") for name in ("before", "after"))
    assert len(before.documents) == 12
    assert after.documents == ("11.txt",)

    config = {"text": [{"source": "text", "split": "train"}]}  # as a published record names it
    assert _reads(config, TextSource(source=str(tmp_path / "text")))
    assert not _reads(config, TextSource(source=str(tmp_path / "text" / "00.txt")))
    note = read_before([TextSource(source=str(tmp_path / "text"))], tmp_path / "recovered")
    assert [line.partition(" was read by ")[2] for line in note.values()] == [
        "`recover` of this model: only its held-out part is measured"
    ]


def test_a_kernel_is_measured_without_touching_a_weight(tiny: Path, tmp_path: Path) -> None:
    short = ["--set", "evaluate.lengths=[64,128]", "--no-cost", "--set", "evaluate.tail=16"]
    found = cli("run", "kernel-only", "--model", tiny, *short, "--out", tmp_path / "run", "--json")
    result = json.loads(found)
    assert list(result["models"]) == ["original"]
    assert result["models"]["original"]["cost"] is None
    assert result["models"]["original"]["kernel"] == "blockwise"
    assert result["metrics"]["kernel_max_diff"] < 1e-3
    assert result["final"] is None
    assert result["gate"][0]["passed"]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_suite_sets_lengths_and_options_win_over_it(tiny: Path) -> None:
    found = json.loads(cli("evaluate", tiny, "--suite", "quick", "--lengths", "32", "--no-cost", "--json"))
    assert found["cost"] is None
    assert {(row["kind"], row["length"]) for row in found["rows"]} == {
        ("python-docs", 32),
        ("python-stdlib", 32),
        ("all", 32),
    }


def test_options_of_evaluate_are_laid_over_the_suite(tiny: Path) -> None:
    suite = {"dtype": "float32", "needle": {"lengths": [64], "samples": 2, "depths": 3}}
    found = recipe_of("evaluate", {"depths": "2", "multi_key": True}, {"evaluate": suite}).evaluate
    assert found is not None
    assert found.dtype == "float32"
    assert found.needle is not None
    assert found.needle.model_dump() == {
        "lengths": (64,), "samples": 2, "depths": 2, "test": "needle", "multi_key": True
    }  # fmt: skip
    found = recipe_of("evaluate", {"dtype": "bf16"}, {"evaluate": suite}).evaluate
    assert found is not None
    assert found.dtype == "bfloat16"
    short = ["--text", "python-docs", "--lengths", 32]
    assert "where: --depths" in cli("evaluate", tiny, *short, "--depths", 3, code=2)
    assert "where: --multi-key" in cli("evaluate", tiny, *short, "--suite", "quick", "--multi-key", code=2)


def test_options_of_tasks_are_laid_over_the_suite() -> None:
    suite = {"tasks": {"names": ["arc_easy"], "limit": 100}}
    found = recipe_of("evaluate", {"fewshot": 0, "limit": 50, "tasks": []}, {"evaluate": suite}).evaluate
    assert found is not None
    assert found.tasks is not None
    assert (found.tasks.names, found.tasks.fewshot, found.tasks.limit) == (("arc_easy",), 0, 50)


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
