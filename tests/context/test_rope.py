"""Written configurations against the papers' formulas and against what transformers really computes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retrofit.context import rope
from retrofit.context.fields import as_dict, views
from retrofit.errors import UserError
from retrofit.model.frequencies import varying
from tests.context.rotary import FACTOR, WINDOW, by_hand, computed, options, plain, rotary_pairs, tiny_model_from
from tests.tiny import FAMILIES, ONE_ENCODING, tiny_config


@pytest.mark.parametrize("method", rope.METHODS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_bigcode"])
def test_model_computes_the_formula(family: str, method: str) -> None:
    before = tiny_config(family, **ONE_ENCODING.get(family, {}))
    after, done = rope.extend_and_plan(before, factor=FACTOR, **options(method, rotary_pairs(before)))
    assert after.max_position_embeddings == 4 * WINDOW
    assert type(after.max_position_embeddings) is int
    assert before.max_position_embeddings == WINDOW
    layer_type = "full_attention" if family == "gemma3_text" else None
    old = next(view for view in views(as_dict(before)) if view.layer_type == layer_type).parameters
    dim = int(before.head_dim if getattr(before, "head_dim", None) else 16)
    dim = int(dim * (old.get("partial_rotary_factor") or 1.0))
    wanted, scale = by_hand(method, old["rope_theta"], dim, FACTOR, WINDOW)
    reference, reference_scale = rope.frequencies(after, layer_type)
    np.testing.assert_allclose(reference, wanted, rtol=1e-9)
    assert reference_scale * math.sqrt(done.query_scale) == pytest.approx(scale)
    assert (done.query_scale != 1) == (family == "phi3" and method in ("linear", "yarn", "llama3"))
    model = tiny_model_from(after)
    got, got_scale = computed(model, layer_type)
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    assert got_scale == pytest.approx(reference_scale)
    assert (method == "none") == np.allclose(wanted, plain(old["rope_theta"], dim), rtol=1e-3)
    assert not [one for one in rope.lint(after) if one.severity == "error"]
    assert not varying(after)


@pytest.mark.parametrize("method", rope.METHODS)
def test_factor_one_is_plain_rope(method: str) -> None:
    base = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512, "model_type": "llama"}
    longrope = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 512}
    extra = {
        "none": {"rope_type": "default"},
        "longrope": {"rope_type": "longrope", "factor": 1.0, **longrope},
        "linear": {"rope_type": "linear", "factor": 1.0},
        "ntk": {"rope_type": "default"},
        "yarn": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512},
        "llama3": {
            "rope_type": "llama3",
            "factor": 1.0,
            "original_max_position_embeddings": 512,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    }[method]
    got, scale = rope.frequencies({**base, "rope_parameters": {"rope_theta": 1e4, **extra}})
    np.testing.assert_allclose(got, plain(1e4, 16), rtol=1e-12)
    assert scale == 1.0


@pytest.mark.parametrize("over", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}])
def test_length_dependent_types_match_transformers(over) -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": [float(2 + i) for i in range(8)], "factor": 2.0}
    parameters = {"rope_theta": 1e4, **(lists if over["rope_type"] == "longrope" else {}), **over}
    if over["rope_type"] == "longrope":
        parameters["original_max_position_embeddings"] = 256
    config = tiny_config("llama", rope_parameters=parameters)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for tokens in (100, 700):
        wanted, scale = ROPE_INIT_FUNCTIONS[over["rope_type"]](config, seq_len=tokens)
        got, got_scale = rope.frequencies(config, tokens=tokens)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-6)
        assert got_scale == pytest.approx(scale)
    assert varying(config)


def test_gemma3_sliding_layers_stay() -> None:
    before = tiny_config("gemma3_text")
    after = rope.extend(before, length=1024, method="yarn")
    assert after.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
    assert after.rope_parameters["full_attention"]["rope_type"] == "yarn"
    got, _ = computed(tiny_model_from(after), "sliding_attention")
    np.testing.assert_allclose(got, plain(1e4, 16), rtol=2e-6)


def test_smollm3_nope_layers_stay() -> None:
    before = tiny_config("smollm3")
    after = rope.extend(before, length=1024, method="yarn")
    assert after.no_rope_layers == before.no_rope_layers
    assert 0 in after.no_rope_layers


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"length": 512}, "not longer"),
        ({"length": 100}, "not longer"),
        ({"factor": 1}, "not longer"),
        ({"factor": 1.0013}, "not a whole number"),
        ({"factor": math.inf}, "32 bits"),
        ({"factor": math.nan}, "32 bits"),
        ({"factor": 1e300}, "32 bits"),
        ({"length": 10**30}, "32 bits"),
        ({}, "exactly one"),
        ({"length": 1024, "factor": 2}, "exactly one"),
    ],
)
def test_bad_requests(asked, what: str) -> None:
    with pytest.raises(UserError, match=what):
        rope.extend(tiny_config("llama"), method="yarn", **asked)
    with pytest.raises(UserError, match=what):
        rope.plan(tiny_config("llama"), method="yarn", **asked)


def test_unknown_method_and_unextendable() -> None:
    with pytest.raises(UserError, match="Unknown context method"):
        rope.extend(tiny_config("llama"), factor=2, method="nope")
    dynamic = tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match="already extended by `dynamic`"):
        rope.extend(dynamic, factor=2, method="yarn")
    with pytest.raises(UserError, match="no rotary"):
        rope.plan({"model_type": "bloom", "max_position_embeddings": 512}, factor=2, method="yarn")
    with pytest.raises(UserError, match="not a whole number"):
        rope.plan({"model_type": "llama", "max_position_embeddings": "512"}, factor=2, method="yarn")


def test_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, retrofit.context.rope; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_reach_the_model() -> None:
    def built(method: str, **over):
        config = rope.extend(tiny_config("llama"), factor=4, **options(method, 8, **over))
        return computed(tiny_model_from(config), None)

    got, scale = built("yarn", theta=5e4, scale=8.0, beta_fast=8.0, beta_slow=0.5)
    low = max(math.floor(16 * math.log(512 / (8 * 2 * math.pi)) / (2 * math.log(5e4))), 0)
    high = math.ceil(16 * math.log(512 / (0.5 * 2 * math.pi)) / (2 * math.log(5e4)))
    ramp = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(got, plain(5e4, 16) * (1 - ramp) + plain(5e4, 16) / 8 * ramp, rtol=2e-6)
    assert scale == pytest.approx(1 + 0.1 * math.log(8))
    np.testing.assert_allclose(built("ntk", theta=7e4)[0], plain(7e4, 16), rtol=2e-6)
    np.testing.assert_allclose(built("linear", scale=3.0)[0], plain(1e4, 16) / 3, rtol=2e-6)
    narrow, wide = built("llama3")[0], built("llama3", low_freq_factor=2.0, high_freq_factor=8.0)[0]
    assert (wide <= narrow).all()
    assert (wide < narrow).any()


@pytest.mark.parametrize(
    ("method", "over", "what"),
    [
        ("ntk", {"beta_fast": 2.0}, "does not read `beta_fast`"),
        ("none", {"theta": 5e4}, "does not read `theta`"),
        ("longrope", {"long_factor": None}, "needs `short_factor`"),
        ("longrope", {"long_factor": (1.0,) * 7}, "7 numbers, the model 8 rotary pairs"),
    ],
)
def test_settings_that_cannot_be_meant(method: str, over, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        rope.plan(tiny_config("llama"), factor=2, **options(method, 8, **over))
    assert error.value.fix


def test_llama3_writes_the_original_length_where_the_converter_of_llama_cpp_looks() -> None:
    fields = rope.extend_fields(as_dict(tiny_config("llama")), factor=2, method="llama3")
    assert fields["original_max_position_embeddings"] == 512
    assert {one.rule for one in rope.lint(fields)} <= {"engine-differs"}
