"""The text of a calibration, and what a plan says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retrofit import api
from retrofit.console import Console
from retrofit.data import calibration as calibration_module
from retrofit.data import identity, samples
from retrofit.data.calibration import calibration_text
from retrofit.data.identity import merged
from retrofit.data.samples import Teacher
from retrofit.errors import UserError
from retrofit.kv_heads import disk
from retrofit.kv_heads.calibrate.moments import saved
from retrofit.model.families import describe
from retrofit.model.load import load_config, load_model, load_tokenizer
from retrofit.recipe.schema import Calibration, Recipe, TextSource
from retrofit.system.device import sampled_sequences
from retrofit.views import results
from retrofit.workflow import samples as own_samples
from retrofit.workflow.command import Written
from retrofit.workflow.estimate.cost import ModelFacts
from retrofit.workflow.opening import check_model, open_model
from retrofit.workflow.plan import make_plan
from retrofit.workflow.samples import sampled_tokens
from tests.tiny import save_tiny
from tests.workflow.conftest import sentences


def calibration(**values: Any) -> Calibration:
    return Calibration.model_validate({"tokens": 512, "sequence_length": 64, **values})


def test_text_that_is_too_short_is_not_read_twice_but_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(sentences(1, 40))
    tokenizer, teacher = load_tokenizer(model), Teacher(model)
    with pytest.raises(UserError, match="too little text") as caught:
        calibration_module.calibration_text(
            calibration(text=[str(tmp_path / "short.txt")]), tokenizer, seed=0, teacher=teacher
        )
    assert "short.txt" in str(caught.value) and "fewer tokens" in str(caught.value)


def test_a_model_that_does_not_fit_is_calibrated_without_its_own_samples(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "no samples yet"))
    monkeypatch.setattr(calibration_module, "available_memory", lambda: 1000)
    tokenizer, teacher = load_tokenizer(model), Teacher(model)
    found = calibration_module.calibration_text(
        calibration(text=["python-docs", "self"]), tokenizer, seed=0, teacher=teacher
    )
    assert set(found.kinds) == {"python-docs"} and found.input_ids_NT.numel() == 512
    assert "self" in found.notes[0] and "1000 B of memory are free" in found.notes[0]
    with pytest.raises(UserError, match="to write samples"):
        calibration_module.calibration_text(calibration(text=["self"]), tokenizer, seed=0, teacher=teacher)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_what_samples_need_is_the_model_as_it_is_run(
    stored: str, bfloat16_products: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "llama", dtype=stored)
    own = TextSource(source="self")
    parameters = sum(tensor.numel() for tensor in load_model(folder).parameters())
    as_run = 2 if bfloat16_products else 4
    together = sampled_sequences("cpu", describe(load_config(folder)), 512, as_run)
    needed = as_run * parameters + together * describe(load_config(folder)).kv_cache_bytes(512, as_run)
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "no samples yet"))
    for times, fits in ((1.3, True), (1.1, False)):
        monkeypatch.setattr(calibration_module, "available_memory", lambda times=times: int(times * needed))
        kept, _ = calibration_module._within_memory([own, TextSource(source="python-docs")], Teacher(folder))
        assert (own in kept) == fits


def test_own_samples_are_part_of_the_default_mix_and_of_the_plan(model: Path) -> None:
    assert [source.source for source in Calibration().text] == ["python-docs", "python-stdlib", "self"]
    assert Teacher(model).tokens == own_samples.SAMPLED_TOKENS
    assert own_samples.SAMPLE == samples.SAMPLE_TOKENS
    facts = ModelFacts("tiny", describe(load_config(model)), 10_000_000, "bfloat16")
    costs = {}
    for name, sources in (("own", ["python-docs", "self"]), ("none", ["python-docs"])):
        section = {"kv_heads": 1, "calibration": {"text": sources}}
        recipe = Recipe.model_validate({"name": "x", "convert": section, "evaluate": None, "publish": None})
        costs[name] = make_plan(recipe, facts).steps[0]
    assert "30,720 sampled from the original" in costs["own"].does and "sampled" not in costs["none"].does
    assert costs["own"].seconds > costs["none"].seconds + 2


def test_more_samples_are_asked_for_than_a_large_calibration_reads() -> None:
    large = Calibration.model_validate({"tokens": 400_000, "text": ["python-docs", "self"]})
    assert sampled_tokens(large.text, large.tokens) == 250_000
    assert sampled_tokens(calibration(text=["self"]).text, 512) == own_samples.SAMPLED_TOKENS
    assert sampled_tokens(calibration(text=["python-docs"]).text, 512) == 0


def test_what_a_folder_holds_is_told_apart_by_path(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "books" / folder).mkdir(parents=True)
        (tmp_path / "books" / folder / "notes.txt").write_text(folder)
    sources = [
        TextSource(source=str(tmp_path / "books")),
        TextSource(source=str(tmp_path / "books" / "a" / "notes.txt")),
    ]
    folder, file = (found["content"] for found in identity.identity(sources))
    assert list(folder) == ["a/notes.txt", "b/notes.txt"] and list(file) == ["notes.txt"]  # type: ignore[call-overload]


def test_one_source_under_two_names_is_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    near, far = TextSource(source="notes.txt"), TextSource(source=str(tmp_path / "notes.txt"))
    identity.require_distinct([near, far, TextSource(source="python-docs")], "recover.text")
    with pytest.raises(UserError, match="both called") as caught:
        identity.require_distinct([near, far.model_copy(update={"field": "body"}), near], "recover.text")
    assert caught.value.where == "recover.text"


def test_convert_calibrates_within_a_short_window_and_says_so(model: Path, texts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibrate": [str(texts / "train")], "tokens": 2048}
    written = api.convert(model, out=tmp_path / "out", kv_heads=2, **options)
    assert "calibrated on sequences of 512 tokens instead of 1,024" in written.report["notes"][0]
    with pytest.raises(UserError, match="so nothing is measured"):
        api.convert(model, out=tmp_path / "b", kv_heads=4, moments=tmp_path / "m", **options)
    assert not (tmp_path / "m").exists() and not (tmp_path / "b").exists()
    section = {"kv_heads": 4, "method": "mean"}
    same = Recipe.model_validate(
        {"name": "x", "model": str(model), "convert": section, "evaluate": None, "publish": None}
    )
    context = open_model(same)
    check_model(context)
    assert context.notes == ["the model already has 4 KV heads: its weights are copied unchanged"]


def test_convert_keeps_moments_where_it_is_told_to_and_leaves_no_work_folder(texts: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", max_position_embeddings=1024)
    out, moments = tmp_path / "out", tmp_path / "moments"
    options: dict[str, Any] = {"kv_heads": 2, "calibrate": [str(texts / "train")], "tokens": 4096}
    written = api.convert(model, out=out, moments=moments, **options)
    assert saved(moments) == (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "moments", "out"]
    assert written.report["tokens_by_kind"] == {"train": 4096}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than moments"):
        api.convert(model, out=tmp_path / "b", moments=tmp_path / "other", **options)
    with pytest.raises(UserError, match="measures no moments"):
        api.convert(model, out=tmp_path / "b", kv_heads=2, method="mean", moments=tmp_path / "m")


@pytest.mark.parametrize("place", ["out", "out/moments", "out.work/moments", "."])
def test_moments_never_share_a_folder_with_the_checkpoint(place: str, model: Path, texts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kv_heads": 2, "calibrate": [str(texts / "train")], "tokens": 2048}
    with pytest.raises(UserError, match="neither inside the other"):
        api.convert(model, out=tmp_path / "out", moments=tmp_path / place, **options)
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_told_before_any_work(texts: Path, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", "llama", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    text = [str(texts / "train")]
    for call in (
        lambda out: api.convert(small, out=out, kv_heads=2, calibrate=text, tokens=2048),
        lambda out: api.recover(small, teacher=small, out=out, text=text, tokens=256, sequence_length=64),
    ):
        with pytest.raises(UserError, match="ids up to 255, and the model 100 tokens"):
            call(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_one_source_under_two_names_is_read_once(model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    names = [{"source": "train", "weight": 2}, "python-docs", "./train", str(texts / "train")]
    sources = merged(calibration(text=names).text)
    assert [(source.source, source.weight) for source in sources] == [("train", 4), ("python-docs", 1)]
    tokenizer, teacher = load_tokenizer(model), Teacher(model)
    found = calibration_text(calibration(text=["train", "./train"], tokens=4096), tokenizer, seed=0, teacher=teacher)
    assert len({tuple(row) for row in found.input_ids_NT.tolist()}) == len(found.input_ids_NT) == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 2, "method": "mean", "repair": "transfer"}, "`mean` does not read --repair"),
        ({"kv_heads": 2, "method": "first", "calibrate": ["nowhere"], "tokens": 512}, "read --calibrate, --tokens"),
        (
            {"reexpress_only": True, "method": "mean", "moments": "m"},
            "a re-expression does not read --method, --moments",
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(
    options: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        api.convert(model, out=tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_layers_that_did_without_a_repair_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcomes = [[("o_proj", True), ("transfer", False)], [("o_proj", True), ("transfer", True)]]
    layers = [
        {"index": i, "repairs": [{"name": name, "accepted": kept} for name, kept in repairs]}
        for i, repairs in enumerate(outcomes)
    ]
    written = Written("convert", tmp_path, {"layers": layers})
    Console("plain").show(written, results.written(written))
    said = capsys.readouterr().out
    assert "the repair transfer was kept out of 1 of 2 layers, no better on text it had not seen: 0\n" in said
    assert "o_proj" not in said


def test_room_is_asked_for_before_the_model_writes_its_samples(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("text was made")

    monkeypatch.setattr(calibration_module, "calibration_text", never)
    monkeypatch.setattr(disk, "free_space", lambda _: 1000)
    with pytest.raises(UserError, match="no room for the residual streams"):
        api.convert(model, out=tmp_path / "out", kv_heads=2, calibrate=[str(texts / "train")], tokens=2048)
    assert not any(tmp_path.iterdir())
