"""`retrofit window` as a user meets it: on the command line, in a recipe, refused, and after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from retrofit.kv_heads.disk import StreamFolder
from retrofit.model.folder import ModelFolder
from retrofit.windows.ablation import _Pass
from tests.tiny import save_tiny
from tests.workflow.conftest import retrofit

SIZE = 32
READ = ("--size", SIZE, "--tokens", 1024, "--measured-tokens", 256, "--device", "cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2, which has windows by layer: 3 layers, 512 positions."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2", num_hidden_layers=3)


def text(texts: Path) -> tuple[object, ...]:
    return ("--calibrate", texts / "train")


def windows_of(folder: Path) -> list[int | None]:
    return [layer.window for layer in ModelFolder(folder).spec.layers]


def test_windows_are_written_and_what_was_measured_is_on_record(qwen: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = retrofit("window", qwen, *READ, *text(texts), "--full-layers", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Round 1" in result.stdout
    assert "sees everything" in result.stdout
    assert not out.with_name("out.work").exists()
    (step,) = json.loads((out / "retrofit.json").read_text())["steps"]
    found = step["result"]
    assert step["step"] == "window"
    assert step["read"] == {"calibration": ["train"]}
    assert sum(window is None for window in windows_of(out)) == 1
    assert [i for i, window in enumerate(windows_of(out)) if window is None] == found["full_layers"]
    assert {part for part, value in found["rise"].items() if value is not None} == {"near", "far", "answers"}
    assert set(found["choice"]["tokens"]) == {"near", "far", "answers", "needles", "keys"}
    assert found["choice"]["tokens"]["needles"] == 0, "a window of 32 bytes has no room for one"
    assert found["choice"]["rounds"][0]["windowed"] == []
    again = retrofit("window", qwen, *READ, *text(texts), "--full-layers", 1, "--out", out)
    assert again.exit_code == 0, again.output


def test_layers_that_are_named_are_not_measured(qwen: Path, texts: Path, tmp_path: Path) -> None:
    result = retrofit("window", qwen, *READ, *text(texts), "--full-layers", "0,2", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    assert report["choice"] is None
    assert windows_of(tmp_path / "out") == [None, SIZE, None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", 512), "holds all of the model's 512 positions"),
        (("--size", 300), "measured on sequences of 600"),
        (("--full-layers", 3), "no layer would get a window: 3 of 3 stay full"),
        (("--full-layers", "0,1,2"), "no layer would get a window"),
        (("--full-layers", "1,7"), "there is no layer 7"),
        (("--full-layers", "some"), "must be auto, a number of layers, a share such as 1/4, or a list of layers"),
        (("--sequence-length", 48), "sequences of 48 tokens are too short to look beyond a window of 32"),
        (("--tokens", 512), "gives fewer than 6 sequences of 128 tokens"),
        (("--text-loss", 0), "greater than 0"),
        (("--calibrate", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(
    qwen: Path, texts: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    given: dict[object, object] = dict(zip(READ[::2], READ[1::2], strict=True))
    given |= {"--calibrate": texts / "train", **dict(zip(options[::2], options[1::2], strict=True))}
    values = [word for pair in given.items() for word in pair]
    result = retrofit("window", qwen, *values, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "fix:" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "over", "options", "words"),
    [
        ("phi", {}, (), "has no sliding windows, and cannot become `granite_swa`: its norms subtract the mean"),
        ("phi", {}, (), "choose a model that can have windows: gemma2, gemma3_text, granite, granite_swa,"),
        ("mixtral", {}, ("--target", "mistral"), "in all of its layers or in none, and cannot become `ministral`"),
        ("phi3", {}, (), "give every layer a window: --full-layers 0"),
        ("qwen3", {}, ("--target", "granite_swa"), "leave --target out: it keeps its own architecture then"),
        ("mistral", {"sliding_window": 32}, (), "every layer has a window of 32 tokens already"),
        (
            "mistral",
            {"sliding_window": 48},
            ("--full-layers", 1),
            "at most 0 of the layers can stay full, not 1",
        ),
        (
            "gemma2",
            {"sliding_window": 48},
            ("--full-layers", 2),
            "not 2; the others have a window already",
        ),
        ("gemma3_text", {}, ("--size", 16, "--full-layers", 0), "another position encoding"),
        ("gemma2", {"sliding_window": 24}, (), "already looks back 24 tokens only"),
        ("gemma2", {"sliding_window": 48}, ("--full-layers", "0,"), "layer 0 has a window already"),
    ],
)
def test_models_without_a_target_are_refused_by_name(
    texts: Path, tmp_path: Path, family: str, over: dict[str, Any], options: tuple[object, ...], words: str
) -> None:
    source = save_tiny(tmp_path / "source", family, **over)
    result = retrofit("window", source, *READ, *text(texts), *options, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert family in result.output or family in ("gemma2", "mistral")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "`gpt_oss` is not supported: its published weights are MXFP4, which is not read"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ],
)
@pytest.mark.parametrize("command", ["window", "plan"])
def test_gpt_oss_which_has_windows_and_sinks_of_its_own_is_refused_by_name(
    tmp_path: Path, command: str, fields: dict[str, Any], words: str
) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    raw = AutoConfig.for_model("gpt_oss", hidden_size=64, num_hidden_layers=2).to_dict()
    (source / "config.json").write_text(json.dumps({**raw, **fields}))
    options = ("--windows",) if command == "plan" else ("--out", tmp_path / "out")
    result = retrofit(command, source, "--size", SIZE, *options)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("family", "options", "written"),
    [
        ("llama", (), "granite_swa"),
        ("llama", ("--target", "mistral"), "ministral"),
        ("llama", ("--sinks", "none"), "ministral"),
        ("mistral", ("--target", "mistral"), "ministral"),
        ("mixtral", (), "granitemoe_swa"),
        ("granitemoe", ("--sinks", "none"), "granitemoe_swa"),
    ],
)
def test_models_without_windows_by_layer_become_one_that_has_them(
    texts: Path, tmp_path: Path, family: str, options: tuple[object, ...], written: str
) -> None:
    source = save_tiny(tmp_path / "source", family)
    command = ("window", source, *READ, *text(texts), *options, "--full-layers", "1,", "--out", tmp_path / "out")
    result = retrofit(*command)
    assert result.exit_code == 0, result.output
    assert ModelFolder(tmp_path / "out").config.model_type == written
    assert windows_of(tmp_path / "out") == [SIZE, None]


def test_windows_that_a_model_has_become_shorter_where_they_are(texts: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gemma2", sliding_window=48)
    result = retrofit("window", source, *READ, *text(texts), "--full-layers", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert windows_of(source) == [48, None]
    assert windows_of(tmp_path / "out") == [SIZE, None]


def test_a_window_that_a_layer_has_already_is_no_full_layer(texts: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gemma2", num_hidden_layers=4, sliding_window=SIZE)
    command = ("window", source, *READ, *text(texts), "--full-layers", "3,", "--out", tmp_path / "out")
    result = retrofit(*command)
    assert result.exit_code == 0, result.output
    assert windows_of(tmp_path / "out") == [SIZE, SIZE, SIZE, None]
    assert f"windows of {SIZE} tokens in layers 0-2; layer 3 sees everything" in result.stdout
    assert "of 1 output projections" in result.stdout
    assert result.output.count("`gemma2` has no sinks") == 2, "while it works, and with what was done"


def test_a_command_that_was_stopped_again_and_again_ends_with_the_same_bytes(
    qwen: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("window", qwen, *READ, *text(texts), "--full-layers", 1, "--out")
    assert retrofit(*command, tmp_path / "calm").exit_code == 0
    for owner, name, call in ((StreamFolder, "finished", 2), (_Pass, "losses", 2), (StreamFolder, "finished", 3)):
        work, calls = getattr(owner, name), 0

        def stopped(*args: Any, work: Any = work, call: int = call) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return work(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopped)
            assert retrofit(*command, tmp_path / "hunted").exit_code == 130
        assert not (tmp_path / "hunted").exists()
    last = retrofit(*command, tmp_path / "hunted")
    assert last.exit_code == 0, last.output
    calm, hunted = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("calm", "hunted"))
    assert calm == hunted


def test_a_run_windows_then_extends_full_layers_alone(recipe: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    source = save_tiny(
        tmp_path / "source", "granite_swa", layer_types=["full_attention"] * 2, layer_rope_theta=[1e4] * 2
    )
    window = {
        "size": SIZE,
        "full_layers": [1],
        "calibration": {"text": [str(texts / "train")], "tokens": 1024, "measured_tokens": 256},
    }
    file = recipe(model=str(source), convert=None, recover=None, publish=None, window=window, require={})
    refused = retrofit("run", file, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "`yarn` would change the sliding-window layers too" in refused.output
    result = retrofit("run", file, "--set", "context.method=ntk", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    made = ModelFolder(next((tmp_path / "run").glob("*-extend")))
    assert [layer.window for layer in made.spec.layers] == [SIZE, None]
    assert made.config.layer_rope_theta[0] == 1e4
    assert made.config.layer_rope_theta[1] > 1e4


def test_a_plan_lists_windows_before_anything_is_written(
    recipe: Callable[..., Path], qwen: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    window = {"size": 64, "calibration": {"measured_tokens": 256, "text": ["python-docs"]}}
    file = recipe(model=str(qwen), window=window)
    command = ("plan", file, "--windows", "--size", SIZE, "--tokens", 1024, *text(texts), "--device", "cpu", "--json")
    listed = json.loads(retrofit(*command, "--moments", tmp_path / "moments").stdout)
    assert listed["size"] == SIZE
    assert listed["prices"][0]["how"] == "original"
    measured = [row for row in listed["prices"] if row["how"] == "measured"]
    assert len(measured) == 1
    assert measured[0]["full_layers"] == listed["choice"]["full"]
    assert f"retrofit window {qwen} --size {SIZE} --full-layers" in listed["command"]
    monkeypatch.setattr(_Pass, "losses", lambda self: pytest.fail("nothing is measured again"))
    again = json.loads(retrofit(*command, "--moments", tmp_path / "moments").stdout)
    assert again["prices"] == listed["prices"]
    shown = retrofit(*command[:-1], "--moments", tmp_path / "moments").stdout
    assert "KV at 32k" in shown
    assert not list((tmp_path / "cache").glob("windows-*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", 32), "--size belongs to windows"),
        (("--windows", "--kv-heads"), "these are two lists"),
        (("--windows", "--size", 512), "holds all of the model's 512 positions"),
        (("--windows", "--gpu", "h100"), "the lists are made on this machine"),
    ],
)
def test_mistakes_in_a_list_are_told(qwen: Path, options: tuple[object, ...], words: str) -> None:
    result = retrofit("plan", qwen, *options)
    assert result.exit_code == 2, result.output
    assert words in result.output


def test_a_list_of_windows_that_hold_everything_names_its_option(qwen: Path) -> None:
    for options in ((), ("--size", 9999)):
        result = retrofit("plan", qwen, "--windows", *options)
        assert result.exit_code == 2, result.output
        assert "holds all of the model's 512 positions" in result.output
        assert "where: --size" in result.output
