"""The commands that write checkpoints and measure them, from the command line on a tiny model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from retrofit.data.measured import _reads, read_before
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.recipe.options import recipe_of
from retrofit.recipe.schema import TextSource
from tests.commands import cli
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama")


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
