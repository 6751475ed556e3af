"""What a later step would trip over is refused at the start, by a dry run as by a run, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrofit.errors import UserError
from retrofit.workflow import checks
from tests.tiny import save_tiny
from tests.workflow.conftest import retrofit, sections

Recipe = Callable[..., Path]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Try a recipe with `--dry-run`; what was said."""

    def attempt(recipe: Path, *options: object) -> str:
        result = retrofit("run", recipe, "--out", tmp_path / "out", "--dry-run", *options)
        assert result.exit_code == 2, result.output + repr(result.exception)
        assert not (tmp_path / "out").exists()
        return result.output

    return attempt


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("context", "said"),
    [
        ({"beta_fast": 4, "beta_slow": 4}, "`beta_fast` (4) must be greater than `beta_slow` (4)"),
        ({"beta_slow": 40}, "`beta_fast` (32) must be greater than `beta_slow` (40)"),
        (
            {"method": "llama3", "low_freq_factor": 9},
            "`high_freq_factor` (4) must be greater than `low_freq_factor` (9",
        ),
        ({"scale": 1}, "is not factor x original"),
    ],
)
def test_an_encoding_that_contradicts_itself(
    recipe: Recipe, refused: Callable[..., str], context: dict[str, Any], said: str
) -> None:
    assert said in refused(recipe(context={"length": 1024, **context}))


def test_a_calibration_of_a_default_length_follows_the_model(
    recipe: Recipe, refused: Callable[..., str], texts: Path, tmp_path: Path
) -> None:
    convert = {"kv_heads": 1, "calibration": {"text": [str(texts / "train")], "tokens": 2048}}
    planned = retrofit("run", recipe(convert=convert), "--out", tmp_path / "out", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "calibrated on sequences of 512 tokens instead of 1,024" in " ".join(planned.output.split())
    said = refused(recipe(convert=convert), "--set", "convert.calibration.sequence_length=1024")
    assert "1024 tokens are more than the 512 positions" in said


def test_rows_that_are_too_short_for_synthetic_text(recipe: Recipe, refused: Callable[..., str]) -> None:
    said = " ".join(refused(recipe(), "--set", "recover.text=[synthetic]").split())
    assert "rows of 64 tokens have no room for synthetic text" in said
    assert "sequence_length: 512" in said


def test_an_adapter_larger_than_the_layers(recipe: Recipe, refused: Callable[..., str]) -> None:
    assert "larger than the layers, which are 64 wide" in refused(recipe(), "--set", "recover.adapter.rank=65")


def test_fewer_tokens_than_one_step_reads(recipe: Recipe, refused: Callable[..., str]) -> None:
    assert "one step reads 576" in refused(recipe(), "--set", "recover.batch_size=9")


def test_too_little_text_to_calibrate_on(recipe: Recipe, refused: Callable[..., str], texts: Path) -> None:
    text = [str(texts / "train"), {"source": str(texts / "held.txt"), "weight": 0.001}]
    calibration = {"text": text, "tokens": 512, "sequence_length": 64}
    said = refused(recipe(convert={"kv_heads": 1, "calibration": calibration}))
    assert "too little calibration text to check a repair" in said
    calibration = {"text": text[:1], "tokens": 10**6, "sequence_length": 64}
    said = refused(recipe(convert={"kv_heads": 1, "calibration": calibration}))
    assert "too little text" in said


def test_a_question_without_room(recipe: Recipe, refused: Callable[..., str]) -> None:
    assert "have no room for the needle" in refused(recipe(), "--set", "evaluate.needle={lengths: [64]}")
    assert "have no room for the task" in refused(recipe(), "--set", "evaluate.ruler={lengths: [256]}")


def test_more_memory_than_there_is(
    recipe: Recipe, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ("--set", "recover.tokens=1000000000000", "--set", "recover.allow_repeats=true")
    assert "`recover` needs about" in refused(recipe(), *many)
    monkeypatch.setattr(checks, "total_memory", lambda device: 1 << 20)
    assert "of memory, and this machine has 1.00 MiB" in refused(recipe())


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ 'a' * 9000000000 }}", "{% for", "{{ messages.nothing.more }}"]
)
def test_a_chat_template_that_fails(recipe: Recipe, refused: Callable[..., str], copy: Path, template: str) -> None:
    (copy / "chat_template.jinja").write_text(template)
    assert "the chat template cannot write a question" in refused(recipe(), "--model", copy)


def test_special_tokens_beyond_the_vocabulary(recipe: Recipe, refused: Callable[..., str], tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", "llama", vocab_size=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    assert "the bos_token `<s>` has the id 256" in refused(recipe(), "--model", small)


def test_the_license_other_without_its_name(recipe: Recipe, refused: Callable[..., str], copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: other\nlicense_link: https://example.org/l\nbase_model: a/b\n---\n")
    assert "needs a name and a link" in refused(recipe(publish={}), "--model", copy)


def test_a_cache_that_cannot_be_written(
    recipe: Recipe, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "file"))
    said = refused(recipe(), "--set", "recover.text=[self]")
    assert "is a file, not a folder" in said


def test_a_dry_run_looks_at_the_weights_that_are_here(recipe: Recipe, refused: Callable[..., str], copy: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(recipe(), "--model", copy)


def test_options_are_answered_in_their_own_words(model: Path, tmp_path: Path) -> None:
    options = ("--tokens", 5, "--seed", -1, "--kv-heads", 1, "--out", tmp_path / "out")
    result = retrofit("convert", model, *options)
    assert result.exit_code == 2
    assert "--tokens: must be at least 256, not `5`" in result.output
    assert "--seed: must be at least 0, not `-1`" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--document-tokens", 0), "--document-tokens: must be at least 16, not `0`"),
        (("--suite", ""), "path is empty|no suite"),
        (("--needle", "0"), "--needle: must be at least 64, not `0`"),
    ],
)
def test_an_option_of_nothing_is_an_option(model: Path, options: tuple[object, ...], said: str) -> None:
    result = retrofit("evaluate", model, "--lengths", 64, *options)
    assert result.exit_code == 2
    assert re.search(said, result.output), result.output


def test_a_tokenizer_with_token_types_has_lines_that_run(model: Path, copy: Path) -> None:
    from retrofit.model.load import load_config, load_tokenizer
    from retrofit.publishing.requirements import snippet_of

    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}))
    lines = snippet_of(load_tokenizer(copy), load_config(copy), copy)
    assert 'del inputs["token_type_ids"]' in lines
    assert 'del inputs["token_type_ids"]' not in snippet_of(load_tokenizer(model), load_config(model), model)


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.6, "top_k": 4}, {"stop_strings": ["."]}])
def test_generation_that_needs_more_than_the_files_is_refused(copy: Path, settings: dict[str, object]) -> None:
    from retrofit.model.load import load_config, load_tokenizer
    from retrofit.publishing.requirements import snippet_of

    (copy / "generation_config.json").write_text(json.dumps({"num_beams": 2, "temperature": 0.5}))
    assert "generate" in snippet_of(load_tokenizer(copy), load_config(copy), copy)
    (copy / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="settings of generation ask for"):
        snippet_of(load_tokenizer(copy), load_config(copy), copy)


def test_every_section_of_the_usual_recipe_passes(recipe: Recipe, model: Path, texts: Path, tmp_path: Path) -> None:
    assert set(sections(model, texts)) >= {"convert", "context", "recover", "evaluate", "publish"}
    result = retrofit("run", recipe(), "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output


def test_a_record_of_an_extension_that_is_none(recipe: Recipe, refused: Callable[..., str], copy: Path) -> None:
    step = {"step": "extend", "result": {"original": -5}}
    (copy / "retrofit.json").write_text(json.dumps({"schema_version": 1, "steps": [step]}))
    said = refused(recipe(model=str(copy), convert=None, context=None, recover=None))
    assert "records an extension without a number as its `original`" in said
