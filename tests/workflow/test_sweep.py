"""The price list: budgets, what is measured and kept, and the command it ends with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import retrofit
from retrofit.data.calibration import CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.sweep import pilot
from retrofit.kv_heads.sweep.budget import within
from retrofit.kv_heads.sweep.costs import LayerCost, Measured
from retrofit.kv_heads.sweep.price_list import price_list
from retrofit.model.families import describe
from retrofit.recipe.kv_budget import Budget, parse_budget
from retrofit.recipe.schema import Calibration, TextSource
from retrofit.workflow import sweep as module
from retrofit.workflow import sweep_cache
from tests.tiny import save_tiny, tiny_config
from tests.workflow.conftest import retrofit as command
from tests.workflow.conftest import sentences


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2GiB@32k", Budget(2 << 30, 32_768)),
        ("1.5 MB @ 1000", Budget(1_500_000, 1000)),
        ("512B@1m", Budget(512, 1 << 20)),
    ],
)
def test_budgets_are_bytes_at_a_length(text: str, want: Budget) -> None:
    assert parse_budget(text) == want


@pytest.mark.parametrize("text", ["", "2GiB", "2@32k", "GiB@32k", "2GiB@", "-1GiB@32k", "0GiB@32k", "2GiB@0", "2XB@1"])
def test_what_is_no_budget_says_how_one_is_written(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    assert "2GiB@32k" in str(caught.value.fix)


def test_the_most_heads_that_fit_are_chosen() -> None:
    caches = {8: 800, 4: 400, 2: 200, 1: 100}
    assert within(Budget(799, 10), caches) == 4
    assert within(Budget(400, 10), caches) == 4
    assert within(Budget(399, 10), caches) == 2
    assert within(Budget(100, 10), caches) == 1
    with pytest.raises(UserError, match="inside this budget as it is: its 8 KV heads need 800 B"):
        within(Budget(800, 10), caches)
    with pytest.raises(UserError, match="even 1 KV head needs 100 B") as caught:
        within(Budget(50, 10), caches)
    assert caught.value.fix == "allow 100 B, or about 5 tokens"


def test_every_third_sequence_of_a_kind_is_scored_and_not_fitted() -> None:
    ids = torch.arange(8)[:, None].expand(8, 16)
    fit, scored = pilot.split(CalibrationText(ids, tuple("aaaaabbb"), ("not calibrated on `self`",)))
    assert fit.notes == ("not calibrated on `self`",)
    assert scored.input_ids_NT[:, 0].tolist() == [2, 7]
    assert scored.kinds == ("a", "b")
    assert fit.input_ids_NT[:, 0].tolist() == [0, 1, 3, 4, 5, 6]


def test_a_source_with_too_little_to_hold_out_says_how_many_tokens_are_needed() -> None:
    text = (TextSource(source="a", weight=3), TextSource(source="b"))
    enough = Calibration(text=text, tokens=1032, sequence_length=128)
    pilot.require_enough(enough)
    with pytest.raises(UserError, match="`b` would give 2 sequences") as caught:
        pilot.require_enough(enough.model_copy(update={"tokens": 1024}))
    assert caught.value.fix == "give at least --tokens 1028"


def test_rows_are_measured_or_lie_on_the_curve() -> None:
    spec = describe(tiny_config("llama", num_attention_heads=8, num_key_value_heads=8))
    costs = {8: 0.0, 4: 0.01, 2: 0.02, 1: 0.08}
    layers = [
        {g: LayerCost(i, (), 0.1, 0.1, cost * share) for g, cost in costs.items()} for i, share in enumerate((3, 1))
    ]
    found = (Measured(1, 0.64, 0.1), Measured(2, 0.04, 0.1))  # sixteen times the loss at four times the cost
    calibrated = pilot.Calibrated(2.0, found, "o_proj", 12, 4, ("a",), {})
    rows, curve = price_list(spec, layers, calibrated, {g: 100 * g for g in costs}, 4)
    assert curve is not None
    assert curve.exponent == pytest.approx(2)
    assert [(row.kv_heads, row.how) for row in rows] == [
        (8, "original"),
        (4, "predicted"),
        (2, "measured"),
        (1, "measured"),
    ]
    assert [row.increase for row in rows] == pytest.approx([0, 0.01, 0.04, 0.64])
    assert [row.error for row in rows] == [None, 0.1, 0.1, 0.1]
    assert [row.significant for row in rows] == [True, False, False, True]
    assert rows[3].ratio == pytest.approx(math.exp(0.64))
    assert rows[0].ratio == 1
    assert rows[3].worst_layers(1) == [(0, pytest.approx(0.75))]
    assert rows[0].worst_layers() == []
    unmeasured, none = price_list(spec, layers, None, {g: 100 * g for g in costs}, 4)
    assert none is None
    assert [row.increase for row in unmeasured] == [0, None, None, None]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with 8 KV heads."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return save_tiny(tmp_path_factory.mktemp("eight") / "model", "llama", **shape)


@pytest.fixture(scope="module")
def options(eight: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    kept = tmp_path_factory.mktemp("kept") / "moments"
    other = kept.with_name("other.txt")
    other.write_text(sentences(70, 1000))
    text = ["--calibrate", texts / "train", "--calibrate", other]
    return ["plan", eight, "--kv-heads", "--tokens", 4096, *text, "--moments", kept, "--json"]


@pytest.fixture(scope="module")
def listed(options: list[object]) -> dict[str, object]:
    done = command(*options)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_list_for_machines(listed: dict[str, object]) -> None:
    rows = {row["kv_heads"]: row for row in listed["prices"]}  # type: ignore[attr-defined]
    assert list(rows) == [8, 4, 2, 1]
    assert listed["length"] == 512
    how = {count: row["how"] for count, row in rows.items()}
    # A random model may lose nothing by a conversion, and then nothing is predicted.
    assert how == {
        8: "original",
        4: "predicted" if listed["curve"] else "not measured",
        2: "measured",
        1: "measured",
    }
    per_token = 2 * 8 * 4 * 2  # K and V, head dim, bytes of float32, layers
    assert all(row["kv_bytes_per_token"] == per_token * count for count, row in rows.items())
    assert all(row["kv_cache_bytes"] == per_token * count * 512 for count, row in rows.items())
    assert rows[8]["cost"] == 0
    assert rows[8]["increase"] == 0
    assert rows[8]["ratio"] == 1
    assert 0 < rows[4]["cost"] < rows[2]["cost"] < rows[1]["cost"]
    assert [layer["index"] for layer in rows[1]["layers"]] == [0, 1]
    assert sum(layer["cost"] for layer in rows[1]["layers"]) == pytest.approx(rows[1]["cost"])
    assert [probe["kv_heads"] for probe in listed["calibrated"]["probes"]] == [1, 2]  # type: ignore[index]
    assert listed["kv_heads"] is None
    assert listed["command"] is None


def test_kept_moments_give_the_same_list_without_a_pass_over_text(
    options: list[object], listed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(sweep_cache, "calibration_text", never)
    for name in ("layerwise_pass", "convert_heads"):
        monkeypatch.setattr(pilot, name, never)
    done = command(*options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == listed


def test_kept_moments_say_which_options_they_were_not_made_with(
    options: list[object], listed: dict[str, object]
) -> None:
    notes: list[str] = listed["notes"]  # type: ignore[assignment]
    assert [note.partition(":")[0] for note in notes[:3]] == [
        "calibrated on sequences of 512 tokens instead of 1,024",
        "the probe with 1 KV head, on two thirds of the text",
        "the probe with 2 KV heads, on two thirds of the text",
    ]
    assert all("fits 64 columns on 3,072 calibration tokens, 48.0 a column" in note for note in notes[1:3])
    kept = options[-2]
    done = command(*options[:3], "--tokens", 8192, "--calibrate", "python-docs", "--moments", kept, "--json")
    found = json.loads(done.stdout)
    text = f"{options[6]}, {options[8]}"
    said = f"were made with text {text}, not python-docs; tokens 4096, not 8192: these"
    assert any(said in note for note in found["notes"])
    assert found["prices"] == listed["prices"]


def test_a_budget_picks_and_names_the_next_command(options: list[object], eight: Path) -> None:
    done = command(*options, "--kv-budget", "150KiB@256")
    found = json.loads(done.stdout)
    assert found["kv_heads"] == 4
    assert found["prices"][1]["kv_cache_bytes"] == 512 * 256
    text = [str(option) for option in options[6:9:2]]
    named = f"--calibrate {text[0]} --calibrate {text[1]}"
    assert found["command"] == f"retrofit convert {eight} --kv-heads 4 {named} --out out/kv4"
    done = command("plan", "gqa", "--model", *options[1:-1], "--kv-budget", "70KiB@256")
    named = f"--set 'convert.calibration.text={json.dumps(text)}'"
    assert f"retrofit run gqa --model {eight} {named} --set convert.kv_heads=2" in done.output
    assert "measured: 1 KV head +" in done.output.replace("head -", "head +")
    assert "before any recovery" in done.output


def test_moments_of_other_weights_and_of_no_loss(options: list[object], tmp_path: Path, eight: Path) -> None:
    kept = Path(str(options[-2]))
    other = save_tiny(tmp_path / "other", "llama", seed=1, num_attention_heads=8, num_key_value_heads=8)
    done = command("plan", other, "--kv-heads", "--moments", kept)
    assert done.exit_code == 2
    assert "of other weights" in done.output
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (*kept.glob("layer-*"), kept / "moments.json"):
        (alone / path.name).write_bytes(path.read_bytes())
    found = json.loads(command("plan", eight, "--kv-heads", "--moments", alone, "--json").stdout)
    assert [row["increase"] for row in found["prices"]] == [0.0, None, None, None]
    assert found["prices"][3]["cost"] > 0
    assert "no loss was measured" in found["notes"][-1]
    four = save_tiny(tmp_path / "four", "llama")
    done = command("plan", four, "--kv-heads", "--moments", alone)
    assert done.exit_code == 2
    assert "of other weights" in done.output
    (alone / "moments.json").unlink()
    done = command("plan", eight, "--kv-heads", "--moments", alone)
    assert done.exit_code == 2
    assert "do not say which weights" in done.output


def test_moments_that_a_conversion_kept_price_its_own_model_alone(texts: Path, tmp_path: Path, eight: Path) -> None:
    kept = tmp_path / "moments"
    text = ["--calibrate", texts / "train", "--tokens", 4096]
    done = command("convert", eight, "--kv-heads", 2, "--out", tmp_path / "out", "--moments", kept, *text)
    assert done.exit_code == 0, done.output
    found = json.loads(command("plan", eight, "--kv-heads", "--moments", kept, "--json").stdout)
    assert any("a model converted to 2 KV heads layer by layer" in note for note in found["notes"])
    other = save_tiny(tmp_path / "other", "llama", seed=1, num_attention_heads=8, num_key_value_heads=8)
    done = command("plan", other, "--kv-heads", "--moments", kept)
    assert done.exit_code == 2
    assert "of other weights" in done.output


def test_bad_input_is_told_before_any_work(tmp_path: Path, eight: Path) -> None:
    def error(*arguments: object) -> str:
        done = command("plan", *arguments)
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        return done.output

    assert "belongs to a list" in error("gqa", "--model", eight, "--tokens", 4096)
    assert "is not a KV-cache budget" in error(eight, "--kv-heads", "--kv-budget", "lots")
    assert "as it is" in error(eight, "--kv-heads", "--kv-budget", "1GiB@256")
    assert "even 1 KV head needs" in error(eight, "--kv-heads", "--kv-budget", "1KiB@256")
    assert "too few tokens" in error(eight, "--kv-heads", "--tokens", 512)
    single = save_tiny(tmp_path / "single", "llama", num_key_value_heads=1)
    assert "nothing to choose" in error(single, "--kv-heads")
    assert "names no model" in error("gqa", "--kv-heads")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("words")
    both = ["--calibrate", tmp_path / "a" / "notes.txt", "--calibrate", tmp_path / "b" / "notes.txt"]
    assert "are both called `notes.txt`" in error(eight, "--kv-heads", *both)


def test_a_family_that_cannot_hold_fewer_heads_is_refused_or_re_expressed(tmp_path: Path) -> None:
    refused = tmp_path / "bloom"
    refused.mkdir()
    (refused / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(UserError, match="`bloom` is not supported"):
        retrofit.prices(refused, measure=False)


def test_the_probe_needs_room_for_a_checkpoint(eight: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=1))
    with pytest.raises(UserError, match="free"):
        retrofit.prices(eight, tokens=4096, calibrate=[str(texts / "train")], measure=False)


def test_the_next_command_is_for_the_same_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "prices", lambda recipe, **options: said.append(options["command"]))
    monkeypatch.setattr("retrofit.entry.require_there", lambda model, revision: None)
    retrofit.prices("someone/model", revision="v1.0", measure=False)
    retrofit.prices("someone/model", recipe="gqa", revision="v1.0", measure=False)
    assert said[0].startswith("retrofit convert someone/model --revision v1.0 --kv-heads {kv_heads}")
    assert said[1].startswith("retrofit run gqa --model someone/model --revision v1.0 --set")
