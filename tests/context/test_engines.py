"""What each engine reads from the same fields, against formulas written out here; differences become findings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from retrofit.context import rope
from retrofit.context.engines import Reading, differences, readings
from retrofit.context.fields import as_dict
from retrofit.context.lint import lint
from tests.context.test_lint import GEMMA, LINEAR, LLAMA3, LONGROPE, NESTED, TOP, YARN, raw
from tests.tiny import FAMILIES, tiny_config

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
TWO_LISTS = {**LONGROPE, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}


def by_engine(config: Any, layer_type: str | None = None) -> dict[str, Reading]:
    return {one.engine: one for one in readings(config) if one.layer_type == layer_type}


def slowest(theta: float, dim: int = 16) -> float:
    return theta ** (-(dim - 2) / dim)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_bigcode"])
def test_plain_rope_is_read_alike_by_all(family: str) -> None:
    found = readings(tiny_config(family))
    assert len({(one.layer_type, one.digest, one.attention_factor, one.max_length) for one in found}) == len(found) // 3
    assert not differences(tiny_config(family))


@pytest.mark.parametrize("method", ["ntk", "yarn", "llama3"])
def test_what_we_write_for_llama_is_read_alike_by_all(method: str) -> None:
    config = rope.extend(tiny_config("llama"), factor=4, method=method)
    found = by_engine(config)
    assert len(found) == 3
    assert len({one.digest for one in found.values()}) == 1
    assert {one.max_length for one in found.values()} == {2048}
    wanted, scale = rope.frequencies(config)
    assert (found["llama.cpp"].first, found["llama.cpp"].last) == pytest.approx((wanted[0], wanted[-1]), rel=1e-6)
    assert found["llama.cpp"].attention_factor == pytest.approx(scale)


def test_learned_positions_have_no_readings() -> None:
    assert readings(tiny_config("gpt_bigcode")) == ()


def test_vllm_counts_an_enlarged_linear_window_twice() -> None:
    assert by_engine(raw(LINEAR, **TOP))["vLLM"].max_length == 8192
    assert [one.rule for one in lint(raw(LINEAR, **TOP))] == ["engine-length"]
    assert "8192" in lint(raw(LINEAR, **TOP))[0].what
    assert "--max-model-len 2048" in lint(raw(LINEAR, **TOP))[0].fix


def test_vllm_takes_yarns_window_from_original_and_factor() -> None:
    config = raw(YARN, max_position_embeddings=1024)
    assert by_engine(config)["vLLM"].max_length == 2048
    assert "engine-length" in [one.rule for one in lint(config)]
    assert by_engine(raw(NESTED, **GEMMA), "full_attention")["vLLM"].max_length == 2048


def test_dynamic_is_one_fixed_base_for_vllm_and_nothing_for_llama_cpp() -> None:
    found = by_engine(raw(DYNAMIC))
    assert found["transformers"].last == pytest.approx(slowest(1e4), rel=1e-9)  # at its own window
    assert found["vLLM"].last == pytest.approx(slowest(1e4 * 3 ** (16 / 14)), rel=1e-9)  # 2 x 2 - 1
    assert found["vLLM"].max_length == 4096
    assert found["llama.cpp"].last == pytest.approx(slowest(1e4), rel=1e-9)
    rules = [one.rule for one in lint(raw(DYNAMIC))]
    assert {"engine-frequencies", "engine-length", "length-dependent"} <= set(rules)


def test_longrope_is_plain_rope_in_llama_cpp_outside_phi3() -> None:
    found = by_engine(raw(LONGROPE))
    assert found["llama.cpp"].last == pytest.approx(slowest(1e4), rel=1e-9)
    assert found["llama.cpp"].rule == "default"
    assert found["transformers"].last == pytest.approx(slowest(1e4) / 2, rel=1e-9) == found["vLLM"].last
    assert found["llama.cpp"].attention_factor == 1.0
    assert {one.rule for one in lint(raw(LONGROPE))} == {"engine-frequencies", "engine-attention"}
    phi = by_engine(raw(LONGROPE, model_type="phi3", **TOP))
    assert phi["llama.cpp"].digest == phi["transformers"].digest


def test_vllm_starts_phi3_with_the_original_window_and_the_short_factors() -> None:
    found = by_engine(raw(TWO_LISTS, model_type="phi3", **TOP))
    assert found["vLLM"].max_length == 512
    assert found["vLLM"].last == pytest.approx(slowest(1e4), rel=1e-9)
    assert found["transformers"].last == pytest.approx(slowest(1e4) / 3, rel=1e-9)
    usual = math.sqrt(1 + math.log(4) / math.log(512))
    assert {one.attention_factor for one in found.values()} == {usual}
    assert by_engine(raw(TWO_LISTS))["vLLM"].max_length == 2048


def test_llama_cpp_looks_for_llama3s_original_length_at_the_top() -> None:
    inside, both = raw(LLAMA3), raw(LLAMA3, **TOP)
    assert not differences(both)
    assert [(one.what, "8192" in one.text) for one in differences(inside)] == [("frequencies", True)]
    wanted, _ = rope.frequencies({**inside, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}})
    assert by_engine(inside)["llama.cpp"].last == pytest.approx(wanted[-1], rel=1e-6)


def test_llama_cpp_reads_llama3_on_llama_only() -> None:
    found = by_engine(raw(LLAMA3, model_type="qwen2", **TOP))
    assert found["llama.cpp"].last == pytest.approx(slowest(1e4), rel=1e-9)
    assert found["vLLM"].digest == found["transformers"].digest != found["llama.cpp"].digest


def test_a_written_attention_factor_is_yarns_own_elsewhere() -> None:
    config = raw({**YARN, "attention_factor": 1.0})
    found = by_engine(config)
    assert found["transformers"].attention_factor == 1.0
    assert found["vLLM"].attention_factor == pytest.approx(0.1 * math.log(4) + 1) == found["llama.cpp"].attention_factor
    assert [one.rule for one in lint(config)] == ["engine-attention"] * 2
    usual = raw({**YARN, "attention_factor": 0.1 * math.log(4) + 1})
    assert lint(usual) == []


def test_truncate_is_read_in_different_places() -> None:
    rules = {one.rule for one in lint(raw({**YARN, "truncate": False}))}
    assert rules == {"engine-frequencies"}  # llama.cpp always rounds
    nested = raw({**NESTED, "full_attention": {**YARN, "truncate": False}}, **GEMMA)
    found = by_engine(nested, "full_attention")
    assert found["vLLM"].digest != found["transformers"].digest == found["llama.cpp"].digest


def test_sliding_layers_are_never_scaled_by_llama_cpp() -> None:
    both = {"full_attention": YARN, "sliding_attention": {**YARN, "rope_type": "linear"}}
    found = by_engine(raw(both, **GEMMA), "sliding_attention")
    assert found["llama.cpp"].last == pytest.approx(slowest(1e4), rel=1e-9)
    assert found["transformers"].last == pytest.approx(slowest(1e4) / 4, rel=1e-9)


def test_equal_digests_mean_equal_frequencies() -> None:
    near = raw({"rope_type": "default", "rope_theta": 10_010.0})
    assert by_engine(near)["vLLM"].digest != by_engine(raw({"rope_type": "default", "rope_theta": 1e4}))["vLLM"].digest


def test_the_column_of_transformers_is_what_its_model_computes() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for parameters in (YARN, LLAMA3, LINEAR, TWO_LISTS, DYNAMIC):
        config = tiny_config("llama", max_position_embeddings=2048, rope_parameters=dict(parameters))
        wanted, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=2048)
        found = by_engine(as_dict(config))["transformers"]
        np.testing.assert_allclose((found.first, found.last), (wanted[0], wanted[-1]), rtol=1e-5)
        assert found.attention_factor == pytest.approx(scale)
