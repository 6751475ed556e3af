"""Every silent failure of a position encoding is a finding; a good configuration has none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig

from retrofit.context import rope
from retrofit.context.lint import lint, lint_folder, require_clean
from retrofit.context.names import portable
from retrofit.context.rules.facts import Finding
from retrofit.errors import UserError
from tests.tiny import FAMILIES, save_tiny, tiny_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "short_factor": [2.0] * 8,
    "long_factor": [2.0] * 8,
}
TOP = {"original_max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def raw(parameters: Any = None, **over: Any) -> dict[str, Any]:
    base = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}
    return {**base, **({} if parameters is None else {"rope_parameters": parameters}), **over}


def without(parameters: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in keys}


NESTED = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
GEMMA = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("original-missing", "error", raw(without(YARN, "original_max_position_embeddings"))),
    ("original-missing", "error", raw(without(LONGROPE, "original_max_position_embeddings"))),
    ("original-missing", "error", raw(without(LLAMA3, "original_max_position_embeddings"))),
    ("original-missing", "error", raw(rope_scaling=without(YARN, "original_max_position_embeddings"))),
    ("original-unknown", "warning", raw(LINEAR)),
    ("theta-lost", "error", raw(without(YARN, "rope_theta"))),
    ("theta-lost", "error", raw(rope_scaling=without(YARN, "rope_theta"))),
    ("theta-lost", "error", raw({**NESTED, "full_attention": without(YARN, "rope_theta")}, **GEMMA)),
    ("theta-conflict", "error", raw(YARN, rope_theta=5e5)),
    ("theta-conflict", "error", raw(rope_scaling=YARN, rope_theta=5e5)),
    ("theta-conflict", "error", raw(YARN, rope_theta="500000")),
    ("theta-implicit", "warning", raw()),
    ("partial-conflict", "error", raw({**YARN, "partial_rotary_factor": 0.25}, partial_rotary_factor=0.5)),
    ("names-conflict", "error", raw(YARN, rope_scaling={**YARN, "factor": 2.0})),
    ("names-conflict", "error", raw(YARN, rope_scaling={**YARN, "rope_type": "linear"})),
    ("legacy-type", "warning", raw(rope_scaling={**without(YARN, "rope_type"), "type": "yarn"})),
    ("unknown-type", "error", raw({**YARN, "rope_type": "yarm"})),
    ("other-keys", "warning", raw(rope_scaling=LINEAR, model_type="olmo2")),
    ("other-keys", "warning", raw(rope_scaling={**LONGROPE, "type": "longrope"}, model_type="phi3", **TOP)),
    ("phi3-type", "error", raw(YARN, model_type="phi3", original_max_position_embeddings=512)),
    ("missing-key", "error", raw(without(YARN, "factor"))),
    ("missing-key", "error", raw(without(LLAMA3, "low_freq_factor"))),
    ("missing-key", "error", raw(without(LONGROPE, "long_factor"))),
    ("unknown-key", "warning", raw({**YARN, "beta_fats": 32})),
    ("bad-factor", "error", raw({**YARN, "factor": 0.25})),
    ("bad-factor", "error", raw({**YARN, "factor": "4"})),
    ("bad-ramp", "error", raw({**LLAMA3, "high_freq_factor": 1.0})),
    ("bad-ramp", "error", raw({**YARN, "beta_fast": 1.0, "beta_slow": 32.0})),
    ("bad-ramp", "error", raw({**YARN, "beta_slow": 32})),
    ("window-not-int", "error", raw(YARN, max_position_embeddings=2048.0)),
    ("window-not-int", "error", raw(YARN, max_position_embeddings="2048")),
    ("window-mismatch", "error", raw(YARN, max_position_embeddings=4096)),
    ("window-mismatch", "warning", raw(YARN, max_position_embeddings=512)),
    ("window-mismatch", "warning", raw(LLAMA3, max_position_embeddings=512)),
    ("length-dependent", "warning", raw({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})),
    ("length-dependent", "warning", raw({**LONGROPE, "long_factor": [3.0] * 8})),
    ("truncate-ignored", "error", raw({**NESTED, "full_attention": {**YARN, "truncate": False}}, **GEMMA)),
    ("layer-type-missing", "error", raw({"full_attention": YARN}, **GEMMA)),
    ("list-length", "error", raw({**LONGROPE, "short_factor": [2.0] * 7})),
    ("list-length", "error", raw(LONGROPE, partial_rotary_factor=0.5)),
    ("bad-list", "error", raw({**LONGROPE, "long_factor": "long"})),
    ("bad-list", "error", raw({**LONGROPE, "long_factor": [0.0] * 8})),
]


def _of_fields(found: list[Finding]) -> list[Finding]:
    """Without what an engine makes of a configuration in which nothing is wrong: that changes with its releases."""
    return [one for one in found if one.rule != "engine-differs"]


@pytest.mark.parametrize(("rule", "severity", "config"), CASES)
def test_silent_failure_is_found(rule: str, severity: str, config: dict[str, Any]) -> None:
    found = [one for one in lint(config) if one.rule == rule]
    assert [one.severity for one in found] == [severity] * max(len(found), 1)
    assert all(one.where and one.what and one.fix for one in found)


@pytest.mark.parametrize(
    "config",
    [
        raw(YARN),
        raw(LLAMA3, original_max_position_embeddings=512),
        raw({"rope_type": "default", "rope_theta": 1e4}),
        raw({**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, max_position_embeddings=131072),
        raw({**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, max_position_embeddings=131072),
        raw(rope_theta=1e4),
        raw(rope_scaling=without(YARN, "rope_theta"), rope_theta=1e4),
        raw(YARN, rope_scaling=without(YARN, "rope_theta"), rope_theta=1e4),
        raw(NESTED, **GEMMA),
        raw({**YARN, "partial_rotary_factor": 0.5}, partial_rotary_factor=0.5),
    ],
)
def test_a_good_configuration_has_no_finding(config: dict[str, Any]) -> None:
    assert _of_fields(lint(config)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_stock_transformers_saves_it_is_clean(tmp_path, family: str) -> None:
    folder = save_tiny(tmp_path, family)
    assert _of_fields(lint_folder(folder)) == []
    assert _of_fields(lint(tiny_config(family))) == []


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("method", ["linear", "ntk"])
def test_a_folder_that_transformers_5_saved_has_lost_the_older_names(tmp_path, family: str, method: str) -> None:
    config = rope.extend(tiny_config(family), factor=4, method=method)
    (tmp_path / "config.json").write_text(json.dumps(portable(config)))
    ours = [one.rule for one in lint_folder(tmp_path)]
    assert "older-names" not in ours
    assert "legacy-type" not in ours
    assert "other-keys" not in ours
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    found = [one for one in lint_folder(tmp_path) if one.rule == "older-names"]
    assert [one.severity for one in found] == ["warning"]
    names = ("rope_theta", "rope_scaling") if method == "linear" else ("rope_theta",)
    assert all(name in found[0].what for name in (*names, *(["num_experts"] if family == "qwen3_moe" else [])))
    (tmp_path / "config.json").write_text(json.dumps(portable(json.loads((tmp_path / "config.json").read_text()))))
    assert [one.rule for one in lint_folder(tmp_path)] == ours


def test_assigning_rope_scaling_loses_theta() -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert lint(config) == []
    config.rope_scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    assert "theta-lost" in [one.rule for one in lint(config)]


def test_theta_set_beside_the_parameters_changes_nothing_and_is_found() -> None:
    config = tiny_config("llama")
    config.rope_theta = 5e5
    assert config.rope_parameters["rope_theta"] == 1e4  # what the model reads
    assert "theta-conflict" in [one.rule for one in lint(config)]


def test_filled_in_original_length_is_seen_on_a_configuration_object() -> None:
    config = tiny_config(
        "llama", max_position_embeddings=2048, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    )
    assert config.rope_parameters["original_max_position_embeddings"] == 2048  # transformers filled it in
    found = [one for one in lint(config) if one.rule == "window-mismatch"]
    assert found
    assert "original length is lost" in found[0].what


def test_text_config_is_linted_under_its_name() -> None:
    inner = raw(without(YARN, "rope_theta"))
    found = lint({"model_type": "gemma3", "text_config": inner})
    assert found[0].where.startswith("text_config.rope_parameters")


def test_errors_come_first() -> None:
    found = lint(raw({**without(YARN, "rope_theta"), "beta_fats": 1}))
    assert [one.severity for one in found] == ["error", "warning"]


def test_tokenizer_limit_below_the_window(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(portable(raw(YARN))))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    assert [one.rule for one in lint_folder(tmp_path)] == ["tokenizer-limit"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 2048}))
    assert lint_folder(tmp_path) == []


def test_generation_limit_left_at_the_original_window(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(portable(raw(YARN))))
    for limit, rules in ((512, ["generation-limit"]), (2048, []), (20, [])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": limit}))
        assert [one.rule for one in lint_folder(tmp_path)] == rules


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_folder(tmp_path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        lint_folder(tmp_path)


def test_require_clean_lists_errors_only() -> None:
    require_clean(lint(raw(LONGROPE)), "x")
    with pytest.raises(UserError, match="rope_theta is missing") as error:
        require_clean(lint(raw({**without(YARN, "rope_theta"), "beta_fats": 1})), "config.json")
    assert "beta_fats" not in str(error.value)
