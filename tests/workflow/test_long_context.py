"""`retrofit evaluate` on the use of context: every pass, table and refusal, on a tiny model with a doubled window."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from retrofit import bundled
from retrofit.data.corpora import BUILT_IN, built_in_texts
from retrofit.evaluation import folders, summary
from retrofit.evaluation.long_context import further_reading, native_length, questions_read
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.model.families import describe
from retrofit.model.folder import ModelFolder
from retrofit.model.load import load_config
from retrofit.recipe.load import load_suite
from retrofit.recipe.schema import Evaluate
from tests.tiny import save_tiny
from tests.workflow.conftest import retrofit, sections, sentences
from tests.workflow.test_resume import killed_run


@pytest.fixture(scope="module")
def extended(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extended") / "long"
    assert retrofit("extend", model, "--factor", 2, "--method", "ntk", "--out", out).exit_code == 0
    return out


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(sentences(5, 400))
    return path


def test_the_native_length_is_that_of_the_original(model: Path, extended: Path) -> None:
    assert [native_length(ModelFolder(folder)) for folder in (model, extended)] == [512, 512]


def test_learned_positions_end_before_any_pass(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = save_tiny(tmp_path / "table", "gpt_bigcode")
    monkeypatch.setattr(ModelFolder, "load", None)
    asked = ("--text", book, "--lengths", "256", "--needle", "1024", "--allow-extrapolation")
    result = retrofit("evaluate", table, *asked)
    assert result.exit_code == 2, result.output
    assert "512 learned positions" in result.output and "retrofit extend MODEL --length 1024" in result.output


def test_llama3_counts_as_an_extension_where_it_is_one(tmp_path: Path) -> None:
    """Llama 3.1 was trained with it: `original_max_position_embeddings` inside is no window it ever had."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = {**llama3, "rope_theta": 5e5, "original_max_position_embeddings": 128}
    trained = save_tiny(tmp_path / "trained", "llama", max_position_embeddings=2048, rope_parameters=parameters)
    plain = save_tiny(tmp_path / "plain", "llama")
    assert retrofit("convert", trained, "--kv-heads", 2, "--method", "mean", "--out", tmp_path / "heads").exit_code == 0
    for source in (trained, plain):
        asked = ("--factor", 2, "--method", "llama3", "--out", tmp_path / f"long-{source.name}")
        assert retrofit("extend", source, *asked).exit_code == 0
    folders = [trained, tmp_path / "heads", tmp_path / "long-trained", tmp_path / "long-plain"]
    assert [native_length(ModelFolder(folder)) for folder in folders] == [2048, 2048, 2048, 512]
    assert describe(load_config(trained)).max_position_embeddings == 2048  # what a plan calls native
    (tmp_path / "long-plain" / "retrofit.json").unlink()
    assert native_length(ModelFolder(tmp_path / "long-plain")) == 512  # its config.json alone says so too


def test_a_run_divides_out_the_factor_that_its_original_was_extended_with(
    model: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    asked = ("--factor", 2, "--method", "yarn", "--attention-factor", 1.3)
    assert retrofit("extend", model, *asked, "--out", first).exit_code == 0
    file = recipe(model=str(first), context={"factor": 2}, recover=None, evaluate=None, publish=None, require={})
    assert retrofit("run", file, "--out", tmp_path / "run").exit_code == 0
    scales = [
        json.loads((folder / "retrofit.json").read_text())["steps"][-1]["result"]["query_scale"]
        for folder in (first, tmp_path / "run" / "3-extend")
    ]
    assert scales[0] > 1.4 and scales[0] * scales[1] == pytest.approx(1)


def test_everything_at_once(extended: Path, book: Path, tmp_path: Path) -> None:
    file = tmp_path / "l.npz"
    asked = ["--lengths", "256,512,1024", "--needle", "512,1024", "--depths", 2, "--context-gain"]
    defined = ["--definition", "sliding", "--definition", "lm-eval", "--definition", "yarn-truncated"]
    result = retrofit(
        "evaluate", extended, "--text", book, *asked, *defined, "--document-tokens", 1200, "--out", file, "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["long_context"]
    assert found["native"] == 512 and found["long_ppl"] == [] and found["ruler"] is None
    within, gain = [row for row in found["context_gain"] if row["kind"] == "all"]
    full, native = TokenLosses.load(file), TokenLosses.load(tmp_path / "l.native.npz")
    half = TokenLosses.load(tmp_path / "l.half.npz").losses[0]
    assert (within["length"], within["context"], within["tokens"]) == (512, 256, 256)
    assert within["gain"] == pytest.approx(float(np.mean(half[255:511] - full.losses[0][255:511])), abs=1e-5)
    assert np.isnan(half[:255]).all()
    assert np.isnan(half[511:]).all()
    assert found["effective"]["within"] == within
    assert gain["length"] == 1024 and gain["tokens"] == 512
    assert gain["gain"] == pytest.approx(float(np.mean(native.losses[0][511:] - full.losses[0][511:])), abs=1e-5)
    assert np.isnan(native.losses[0][:511]).all() and np.isfinite(native.losses[0][511:]).all()
    rows = {(row["definition"], row["length"]): row for row in found["defined"]}
    assert len(rows) == 9 and rows["sliding", 256]["tokens"] == rows["lm-eval", 256]["tokens"] == 1199
    assert rows["yarn-truncated", 512]["ppl"] == pytest.approx(float(np.exp(full.at(512)[0].mean(dtype=np.float64))))
    assert [(cell["length"], cell["depth"]) for cell in found["needle"]["cells"]] == [
        (512, 0.0), (512, 1.0), (1024, 0.0), (1024, 1.0),
    ]  # fmt: skip
    tests = {test["length"]: test for test in found["effective"]["tests"]}
    assert tests[1024]["gain"] == gain["gain"] and tests[512]["gain"] is None
    # One document and no original beside it; the tiny model finds no needle anywhere.
    none = "the needle against that within the native length (the model finds 0.00 of the needles there)"
    assert found["effective"]["not_tested"] == ["tail at 1024", none]
    assert not list(tmp_path.glob("*.scored"))
    shown = retrofit("evaluate", extended, "--text", book, "--lengths", "512", "--needle", "512", "--depths", 1).output
    assert "effective length" in shown and "exact match" in shown


def test_beyond_the_positions_names_the_command_that_extends(model: Path, book: Path) -> None:
    refused = retrofit("evaluate", model, "--text", book, "--lengths", "1024")
    assert refused.exit_code == 2
    assert f"retrofit extend {model} --length 1024" in refused.output and "--allow-extrapolation" in refused.output
    assert "retrofit extend" in retrofit("evaluate", model, "--text", book, "--needle", "1024").output
    shown = retrofit("evaluate", model, "--text", book, "--lengths", "1024", "--allow-extrapolation", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["claimed_length"] == 512


def test_a_text_too_short_is_refused_with_its_length(extended: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    refused = retrofit("evaluate", extended, "--text", tmp_path / "short.txt", "--lengths", "256")
    assert refused.exit_code == 2 and "10" in refused.output


def test_a_definition_that_needs_a_longer_text_is_refused_before_anything_is_read(
    extended: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "score_folder", lambda *_, **__: pytest.fail("it was scored"))
    refused = retrofit("evaluate", extended, "--text", book, "--lengths", "256", "--definition", "longlora")
    assert refused.exit_code == 2 and "`longlora` at 256 tokens needs a longer text" in refused.output


def test_a_tokenizer_without_a_bos_is_announced_and_not_paired_with_one_that_has_it(
    model: Path, book: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    asked = ["--text", book, "--lengths", "64", "--out"]
    assert "no BOS" not in retrofit("evaluate", model, *asked, tmp_path / "a.npz").output
    said = retrofit("evaluate", other, *asked, tmp_path / "b.npz").output
    assert "this tokenizer has no BOS: the first token of every document is given, not predicted" in said
    refused = retrofit("compare", tmp_path / "a.npz", tmp_path / "b.npz")
    assert refused.exit_code == 2 and "different tokenizers" in refused.output
    assert retrofit("compare", tmp_path / "a.npz", tmp_path / "b.npz", "--bits-per-byte").exit_code == 0


def test_a_killed_evaluation_goes_on_with_the_same_numbers(
    extended: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in every pass in turn; the losses and all that is said of them are those of a call without a stop."""
    from retrofit.evaluation.scoring import passes as module

    asked = ["--text", book, "--lengths", "64,700", "--context-gain", "--definition", "sliding"]
    asked += ["--definition", "lm-eval", "--json", "--out"]
    whole = json.loads(retrofit("evaluate", extended, *asked, tmp_path / "whole.npz").stdout)
    real, out = module.Pass.scored, tmp_path / "killed.npz"
    for _ in range(6):  # after the plain pass, those with less context, and those of the definitions at two lengths
        calls = itertools.count()

        def killed(*args: object, calls: Iterator[int] = calls) -> object:
            if next(calls) == 1:  # what the calls before have finished is not read again
                raise KeyboardInterrupt
            return real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(module.Pass, "scored", killed)
        assert retrofit("evaluate", extended, *asked, out).exit_code != 0
        assert not out.exists() and (tmp_path / "killed.npz.scored").is_dir()
    read = []
    monkeypatch.setattr(module.Pass, "scored", real)
    span = module._score_span
    monkeypatch.setattr(module, "_score_span", lambda *args: read.append(args[2]) or span(*args))
    again = json.loads(retrofit("evaluate", extended, *asked, out).stdout)
    assert len(read) == 1  # the last pass: one window of 700 tokens over as many
    for found in (whole, again):
        del found["losses"], found["cost"]  # its name and clock times
    assert again == whole and not (tmp_path / "killed.npz.scored").exists()
    for name in ("", ".native", ".half"):
        first, second = (TokenLosses.load(tmp_path / f"{stem}{name}.npz") for stem in ("whole", "killed"))
        np.testing.assert_array_equal(first.losses[0], second.losses[0])
        assert dict(first.meta) == dict(second.meta)


def test_a_run_killed_while_it_asks_ends_with_the_same_answers(
    recipe: Callable[..., Path], model: Path, texts: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text(sentences(5, 400))
    asked = {"needle": {"lengths": [512], "depths": 2}, "ruler": {"lengths": [960], "tasks": ["niah_single"]}}
    section = {**sections(model, texts)["evaluate"], "text": [str(book)], "lengths": [256, 600], "cost_lengths": []}
    file = recipe(
        convert=None, recover=None, publish=None, require={}, evaluate={**section, "context_gain": True, **asked}
    )
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    # Of two models in turn: after the first haystack of two, after both, and in RULER's only text.
    limits = ["needle:2", "needle:3", "ruler:1", "needle:2", "ruler:2"]
    assert killed_run(file, calm, hunted, limits) == [limit.partition(":")[0] for limit in limits] + ["done"]
    found = [json.loads((run / "5-evaluate" / "metrics.json").read_text())["models"] for run in (calm, hunted)]
    assert found[0] == found[1] and len(found[0][1]["long_context"]["needle"]["cells"]) == 2
    assert not list(hunted.rglob("*.scored"))


def test_what_was_asked_before_a_stop_is_not_asked_again(
    extended: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofit.evaluation.tasks import asking as module

    out, kept = tmp_path / "l.npz", tmp_path / "l.npz.scored"
    command = ["evaluate", extended, "--text", book, "--lengths", "64", "--needle", "512", "--depths", 3, "--out", out]
    real, calls = module.ask, itertools.count(1)

    def stopped(*args: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "ask", stopped)
    assert retrofit(*command).exit_code != 0
    assert sorted(path.name for path in (kept / "needle").glob("*-*")) == ["512-0.json", "512-1.json"]
    assert json.loads((kept / "needle" / "key.json").read_text())["checkpoint"], "known by the model's digests"
    monkeypatch.setattr(summary, "run_costs", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert retrofit(*command).exit_code != 0 and next(calls) == 5  # the third question, and this call
    assert len(list((kept / "needle").glob("*-*"))) == 3, "a stop while costs are measured loses no answers"
    monkeypatch.setattr(summary, "run_costs", folders.run_costs)
    assert retrofit(*command).exit_code == 0 and next(calls) == 6
    assert out.is_file() and not kept.exists()


def test_bundled_suites_are_valid() -> None:
    suites = {name: load_suite(name).evaluation() for name in bundled.names("suites")}
    assert {"quick", "long", "context", "ruler", "papers"} <= set(suites)
    assert suites["context"].context_gain and suites["ruler"].ruler and suites["papers"].definitions
    longest = {source: max(len(text.text) for text in built_in_texts(source, "held_out")) for source in BUILT_IN}
    for name, suite in suites.items():
        tokens = max(*suite.lengths, suite.document_tokens or 0)
        for text in suite.text:  # four characters a token: what SmolLM2's tokenizer makes of code and documentation
            assert longest[text.source] >= 4 * tokens, f"{name}: no held-out text of {text.source} has {tokens} tokens"


def test_a_run_keeps_the_passes_and_concludes_from_them(
    recipe: Callable[..., Path], model: Path, texts: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book.txt"
    book.write_text(sentences(5, 400))
    section = {**sections(model, texts)["evaluate"], "text": [str(book)], "lengths": [256, 512, 1024]}
    asked = {"context_gain": True, "needle": {"lengths": [512, 1024], "depths": 2}}
    less = {"convert": None, "recover": None, "publish": None, "require": {}}
    path = recipe(**less, evaluate={**section, **asked})
    out = tmp_path / "out"
    assert retrofit("run", path, "--out", out).exit_code == 0
    found = json.loads((out / "5-evaluate" / "metrics.json").read_text())
    uses = {model["label"]: model["long_context"] for model in found["models"]}
    assert list(uses) == ["original", "extended"] and uses["extended"]["native"] == 512
    assert [one.partition(" ")[0] for one in uses["extended"]["effective"]["not_tested"]] == ["the"]  # the needle
    assert uses["extended"]["effective"]["tests"][2]["tail"] is not None
    assert uses["extended"]["effective"]["control"].startswith("that of the original")
    assert uses["extended"]["needle"]["scores"].keys() == {"512", "1024"}
    assert (out / "losses" / "extended.native.npz").is_file()
    (first, second) = next(model for model in found["models"] if model["label"] == "extended")["short_context"]
    assert (first["length"], second["length"]) == (256, 512) and first["low"] <= first["ratio"] <= first["high"]

    recipe(**less, evaluate={**section, **asked, "lengths": [512, 1024], "resamples": 200})
    again = json.loads(retrofit("run", path, "--out", out, "--json").stdout)
    assert {"evaluate:original", "evaluate:extended"} <= set(again["reused"]) and "evaluate" not in again["reused"]
    recipe(**less, evaluate={**section, **asked, "needle": {"lengths": [512], "depths": 1}})
    again = json.loads(retrofit("run", path, "--out", out, "--json").stdout)
    assert not {"evaluate:original", "evaluate:extended"} & set(again["reused"])


def test_the_plan_prices_what_is_read_besides(tmp_path: Path) -> None:
    section = Evaluate(lengths=(256, 1024), context_gain=True, definitions=("sliding", "lm-eval"), stride=64)
    assert further_reading(section, 512) == (
        (8192, 512), (4096, 256), (4096, 256), (16384, 1024), (1024, 256), (1024, 1024),
    )  # fmt: skip
    assert further_reading(Evaluate(lengths=(256,), context_gain=True, long_ppl=True), 512) == ()
    asked = Evaluate(needle={"lengths": [100], "depths": 5}, ruler={"lengths": [1024], "samples": 2})
    assert questions_read(asked) == ((350, 100), (10240, 1024))


def test_the_original_is_not_asked_what_its_window_does_not_hold(
    recipe: Callable[..., Path], tmp_path: Path, model: Path, texts: Path
) -> None:
    section = sections(model, texts)["evaluate"]
    asked = {"needle": {"lengths": [256, 700], "depths": 2}, "ruler": {"tasks": ["niah_single"], "lengths": [700]}}
    evaluate = {**section, "lengths": [64, 600], "cost_lengths": [], **asked}
    file = recipe(recover=None, publish=None, evaluate=evaluate)
    result = retrofit("run", file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = json.loads((tmp_path / "run" / "5-evaluate" / "metrics.json").read_text())
    original, converted = (one["long_context"] for one in found["models"])
    assert original["not_asked"] == [700]
    assert original["needle"]["lengths"] == [256]
    assert original["ruler"] is None
    assert converted["not_asked"] == []
    assert converted["needle"]["lengths"] == [256, 700]
    assert [row["length"] for row in converted["ruler"]["rows"]] == [700]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| 700 | not asked |" in report
    assert "| all | 700 | original | not asked |" in report
    assert "`original` was not asked at 700 tokens: its context is shorter" in report
