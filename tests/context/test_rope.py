"""Written configurations against the papers' formulas and against what transformers really computes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retrofit.context import rope
from retrofit.context.fields import as_dict, views
from retrofit.context.names import with_theta
from retrofit.errors import UserError
from retrofit.model.frequencies import varying
from retrofit.recipe.schema import RopeSettings
from tests.tiny import FAMILIES, ONE_ENCODING, save_tiny, tiny_config, tiny_model

FACTOR = 4.0
WINDOW = 512
LLAMA31 = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def rotary(model):
    return model.get_decoder().rotary_emb


def computed(model, layer_type):
    """(inverse frequencies, attention factor) that the model computes."""
    module = rotary(model)
    prefix = f"{layer_type}_" if layer_type else ""
    return getattr(module, f"{prefix}inv_freq").double().numpy(), float(getattr(module, f"{prefix}attention_scaling"))


def options(method: str, pairs: int, **over) -> dict:
    """Arguments of `extend`; for longrope equal lists, so that the encoding does not depend on the length."""
    lists = tuple(1.0 + 0.25 * i for i in range(pairs))
    given = {"short_factor": lists, "long_factor": lists} if method == "longrope" else {}
    return {"method": method, "settings": RopeSettings(**{**given, **over})}


def rotary_pairs(config) -> int:
    old = views(as_dict(config))[0].parameters
    dim = int(config.head_dim if getattr(config, "head_dim", None) else 16)
    return int(dim * (old.get("partial_rotary_factor") or 1.0)) // 2


def plain(theta: float, dim: int) -> np.ndarray:
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def by_hand(method: str, theta: float, dim: int, s: float, length: int) -> tuple[np.ndarray, float]:
    """The papers' formulas, pair by pair."""
    base = plain(theta, dim)
    if method == "none":
        return base, 1.0
    if method == "longrope":
        lists = np.array([1.0 + 0.25 * i for i in range(dim // 2)])
        return base / lists, math.sqrt(1 + math.log(s) / math.log(length))
    if method == "linear":
        return base / s, 1.0
    if method == "ntk":
        return plain(theta * s ** (dim / (dim - 2)), dim), 1.0
    out = []
    if method == "llama3":
        for f in base:
            wavelength = 2 * math.pi / f
            if wavelength < length / 4:
                out.append(f)
            elif wavelength > length:
                out.append(f / s)
            else:
                smooth = (length / wavelength - 1) / (4 - 1)
                out.append((1 - smooth) * f / s + smooth * f)
        return np.array(out), 1.0
    low = max(math.floor(dim * math.log(length / (32 * 2 * math.pi)) / (2 * math.log(theta))), 0)
    high = min(math.ceil(dim * math.log(length / (2 * math.pi)) / (2 * math.log(theta))), dim - 1)
    for i, f in enumerate(base):
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append((1 - ramp) * f + ramp * f / s)
    return np.array(out), 0.1 * math.log(s) + 1


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


def tiny_model_from(config):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    return _with_rotary(shell, config)


def _with_rotary(shell, config):
    """Only the rotary module is built for real: its buffers are all that is looked at."""
    decoder = shell.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    return shell


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


@pytest.mark.parametrize("method", rope.METHODS)
def test_composition_equals_one_extension(method: str) -> None:
    native, asked = tiny_config("llama"), options(method, 8)
    once = rope.extend(native, length=4096, **asked)
    half = rope.extend(native, length=1024, **asked)
    twice = rope.extend(half, length=4096, **asked)
    np.testing.assert_allclose(rope.frequencies(twice)[0], rope.frequencies(once)[0], rtol=1e-12)
    assert rope.frequencies(twice)[1] == rope.frequencies(once)[1]
    assert twice.max_position_embeddings == 4096
    done = rope.plan(half, length=4096, **asked)
    if method == "none":  # the length it claims is the model's own
        assert (done.original, done.before, done.factor, done.step) == (1024, 1024, 4.0, 4.0)
        return
    assert (done.original, done.before, done.factor, done.step) == (512, 1024, 8.0, 4.0)
    assert method == "longrope" or "already extended" in done.notes[0]


@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
def test_phi3_is_extended_further_by_the_method_that_its_lists_were_written_for(method: str) -> None:
    half, first = rope.extend_and_plan(tiny_config("phi3"), factor=2, method=method)
    held = first.query_scale
    once, at_once = rope.extend_and_plan(tiny_config("phi3"), length=4096, method=method)
    twice, again = rope.extend_and_plan(half, length=4096, method=method, held=held)
    np.testing.assert_allclose(rope.frequencies(twice)[0], rope.frequencies(once)[0], rtol=1e-9)
    assert rope.frequencies(twice)[1] == pytest.approx(rope.frequencies(once)[1])
    assert held * again.query_scale == pytest.approx(at_once.query_scale)
    assert (again.factor, again.original) == (8.0, 512)
    other = "yarn" if method != "yarn" else "linear"
    with pytest.raises(UserError, match=f"already extended by `{method}`"):
        rope.plan(half, factor=2, method=other, held=held)
    with pytest.raises(UserError, match="already extended by `longrope`"):  # what the queries hold is not known
        rope.plan(half, factor=2, method=method)
    half.rope_parameters["short_factor"] = half.rope_parameters["long_factor"] = [1.5] * 7 + [4.0]
    with pytest.raises(UserError, match="already extended by `longrope`") as caught:
        rope.plan(half, factor=2, method=method, held=held)
    assert "longrope` with both lists" in caught.value.fix


def test_phi3_whose_configuration_holds_the_attention_factor_is_extended_further() -> None:
    """As earlier releases of this program wrote it: for transformers 5 alone."""
    half = rope.extend(tiny_config("phi3"), factor=2, method="yarn", settings=RopeSettings(scale=4.0))
    half.rope_parameters |= {"factor": 4.0, "attention_factor": 0.1 * math.log(4) + 1}
    after, done = rope.extend_and_plan(half, length=4096, method="yarn")
    assert done.factor == 8.0
    assert rope.frequencies(after)[1] * math.sqrt(done.query_scale) == pytest.approx(0.1 * math.log(8) + 1)
    assert "rope_scaling" not in rope.portable(half)  # its keys cannot say that
    assert rope.portable(after)["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}


@pytest.mark.parametrize(("length", "factor"), [(65536, 2.0), (131072, 4.0), (262144, 8.0)])
def test_a_scale_written_for_a_window_that_was_left_alone_is_not_applied_twice(length: int, factor: float) -> None:
    """Qwen's own instructions for YaRN: factor 4 beside the window of 32768."""
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    qwen = tiny_config("qwen3", max_position_embeddings=32768, rope_parameters=parameters)
    after = rope.extend(qwen, length=length, method="yarn")
    assert after.rope_parameters["factor"] == factor == rope.plan(qwen, length=length, method="yarn").factor
    assert not [one for one in rope.lint(after) if one.rule == "window-mismatch"]


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_a_scale_of_its_own_follows_from_the_original_length_when_extended_further(method: str) -> None:
    wide = rope.extend(tiny_config("llama"), length=1024, method=method, settings=RopeSettings(scale=8.0))
    factors = [rope.plan(wide, length=n, method=method).factor for n in (2048, 4096, 8192)]
    assert factors == [8.0, 8.0, 16.0]  # up to 4096 tokens the encoding that is there reaches


def test_llama_3_1_is_extended_by_the_step() -> None:
    after = rope.extend(tiny_config("llama", **LLAMA31), factor=2, method="llama3")
    assert after.rope_parameters["factor"] == 16.0
    assert after.max_position_embeddings == 262144
    assert after.rope_parameters["original_max_position_embeddings"] == 8192
    done = rope.plan(tiny_config("llama", **LLAMA31), factor=2, method="llama3")
    assert (done.original, done.factor) == (131072, 2.0)  # its window is the original one


@pytest.mark.parametrize(("first", "second"), [("ntk", "yarn"), ("yarn", "llama3"), ("linear", "ntk")])
def test_another_method_on_top_is_refused(first: str, second: str) -> None:
    extended = rope.extend(tiny_config("llama"), factor=2, method=first)
    with pytest.raises(UserError, match=f"already extended by `{first}`") as error:
        rope.extend(extended, factor=2, method=second)
    assert error.value.fix


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


@pytest.mark.parametrize("method", rope.METHODS)
@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text", "phi3"])
def test_saved_folder_loads_the_same_frequencies(tmp_path, family: str, method: str, monkeypatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, modeling_rope_utils

    said: list[str] = []
    monkeypatch.setattr(modeling_rope_utils.logger, "warning", said.append)
    source = save_tiny(tmp_path / "source", family)
    out = tmp_path / "out"
    asked = options(method, rotary_pairs(tiny_config(family)))
    done = rope.write_extended(source, out, length=1536, **asked)
    assert (done.original, done.length, done.factor) == (512, 1536, 3.0)
    layer_type = "full_attention" if family == "gemma3_text" else None
    raw = json.loads((out / "config.json").read_text())
    fresh = AutoConfig.from_pretrained(out)
    wanted, scale = rope.frequencies(rope.extend(tiny_config(family), length=1536, **asked), layer_type)
    for source_of_truth in (raw, fresh, old_names_only(raw)):
        got, got_scale = rope.frequencies(source_of_truth, layer_type)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
        assert got_scale == pytest.approx(scale)
    assert fresh.max_position_embeddings == 1536
    assert said == []
    model = AutoModelForCausalLM.from_pretrained(out)
    got, got_scale = computed(model, layer_type)
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    assert got_scale == pytest.approx(scale)
    assert not [one for one in rope.lint_folder(out) if one.severity == "error"]
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 1536
    weights = out / "model.safetensors"
    same = weights.read_bytes() == (source / "model.safetensors").read_bytes()
    assert same == (done.query_scale == 1)
    assert not weights.samefile(source / "model.safetensors")


def test_weights_are_hard_links_only_where_that_is_asked_for(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    rope.write_extended(source, tmp_path / "copied", factor=2, method="yarn")
    rope.write_extended(source, tmp_path / "linked", factor=2, method="yarn", link=True)
    assert (source / "model.safetensors").stat().st_nlink == 2
    assert (tmp_path / "linked" / "model.safetensors").samefile(source / "model.safetensors")


@pytest.mark.parametrize(("before", "after"), [(512, 1024), (20, 20)])
def test_generation_follows_the_window_where_it_had_the_old_one(tmp_path, before: int, after: int) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    (source / "generation_config.json").write_text(json.dumps({"max_length": before}))
    rope.write_extended(source, tmp_path / "out", length=1024, method="yarn")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"max_length": after}
    assert json.loads((source / "generation_config.json").read_text()) == {"max_length": before}


def old_names_only(raw):
    """config.json as an engine reads it that knows nothing of rope_parameters."""
    return {key: value for key, value in raw.items() if key != "rope_parameters"}


@pytest.mark.parametrize(
    ("family", "said"), [("llama", {}), ("llama", {"rope_scaling": {}}), ("phi", {"partial_rotary_factor": 0.5})]
)
def test_a_theta_left_to_the_class_is_written(tmp_path, family: str, said: dict[str, object]) -> None:
    """Llama 2's config.json says nothing about RoPE."""
    source = save_tiny(tmp_path / "source", family)
    raw = json.loads((source / "config.json").read_text())
    silent = {key: value for key, value in raw.items() if not key.startswith("rope")}
    (source / "config.json").write_text(json.dumps({**silent, **said}))
    done = rope.write_extended(source, tmp_path / "out", factor=4, method="ntk")
    explicit = rope.write_extended(save_tiny(tmp_path / "whole", family), tmp_path / "again", factor=4, method="ntk")
    assert done.length == explicit.length
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("method", rope.METHODS)
@pytest.mark.parametrize("family", ["llama", "stablelm", "gemma3_text"])
def test_old_names_load_in_stock_transformers(tmp_path, family: str, method: str) -> None:
    from transformers import AutoConfig

    config = rope.extend(tiny_config(family), length=2048, **options(method, rotary_pairs(tiny_config(family))))
    layer_type = "full_attention" if family == "gemma3_text" else None
    (tmp_path / "config.json").write_text(json.dumps(old_names_only(rope.portable(config))))
    fresh = AutoConfig.from_pretrained(tmp_path)
    got, scale = rope.frequencies(fresh, layer_type)
    wanted, wanted_scale = rope.frequencies(config, layer_type)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert scale == wanted_scale
    computed_now, _ = computed(tiny_model_from(fresh), layer_type)
    np.testing.assert_allclose(computed_now, wanted, rtol=2e-6)


def test_extension_changes_logits_only_through_positions(tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "source", "llama")
    rope.write_extended(source, tmp_path / "out", factor=2, method="yarn")
    first = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = tiny_model("llama")(first).logits
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(first).logits
    assert torch.allclose(before[:, 0], after[:, 0], atol=1e-5)  # the first token attends to itself alone
    assert not torch.allclose(before[:, 3], after[:, 3], atol=1e-5)


def test_nothing_written_when_the_linter_objects(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    raw = json.loads((source / "config.json").read_text())
    raw["rope_parameters"].pop("rope_theta")
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="rope_theta"):
        rope.write_extended(source, tmp_path / "out", factor=2, method="yarn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, retrofit.context.rope; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("family", ["llama", "stablelm", "gemma3_text", "phi3"])
def test_longrope_takes_its_short_factors_to_the_original_length_and_its_long_ones_beyond(tmp_path, family) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    layer_type = "full_attention" if family == "gemma3_text" else None
    before = tiny_config(family)
    pairs = rotary_pairs(before)
    short, long = tuple(1.0 + 0.1 * i for i in range(pairs)), tuple(2.0 + i for i in range(pairs))
    settings = RopeSettings(short_factor=short, long_factor=long, attention_factor=1.25)
    source = save_tiny(tmp_path / "source", family)
    done = rope.write_extended(source, tmp_path / "out", length=2048, method="longrope", settings=settings)
    assert any("each length is measured" in note for note in done.notes)
    own = math.sqrt(1 + math.log(4) / math.log(512))  # the weights hold what differs
    assert done.query_scale == pytest.approx((1.25 / own) ** 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theta = next(v for v in views(as_dict(before)) if v.layer_type == layer_type).parameters["rope_theta"]
    for last, lists in ((511, short), (512, long)):
        extra = {} if layer_type is None else {"layer_type": layer_type}
        rotary(model)(torch.zeros(1, 1, 16), torch.tensor([[0, last]]), **extra)
        got, scale = computed(model, layer_type)
        np.testing.assert_allclose(got, plain(theta, 2 * pairs) / np.array(lists), rtol=2e-6)
        assert scale == pytest.approx(own)
        ours, ours_scale = rope.frequencies(model.config, layer_type, tokens=last + 1)
        np.testing.assert_allclose(got, ours, rtol=2e-6)
        assert ours_scale == pytest.approx(own)
    assert varying(model.config)


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


def test_the_length_alone_leaves_every_other_byte(tmp_path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    done = rope.write_extended(source, tmp_path / "out", length=1024, method="none")
    assert "encoding stays" in done.notes[-1]
    assert done.original == 512
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["max_position_embeddings"] == 1024
    assert "original_max_position_embeddings" not in raw
    assert "rope_scaling" not in raw
    assert raw["rope_theta"] == 1e4
    scaled = rope.extend(tiny_config("llama"), factor=2, method="yarn")
    with pytest.raises(UserError, match="already extended by `yarn`"):
        rope.plan(scaled, factor=2, method="none")


def test_llama3_writes_the_original_length_where_the_converter_of_llama_cpp_looks() -> None:
    fields = rope.extend_fields(as_dict(tiny_config("llama")), factor=2, method="llama3")
    assert fields["original_max_position_embeddings"] == 512
    assert not rope.lint(fields)


def left_to_the_class(folder, scaling: dict[str, object], **over: object):
    """The folder, its config.json as those from before `rope_theta`: a scaling under the old name, and no base."""
    raw = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in raw.items() if not key.startswith("rope")}
    (folder / "config.json").write_text(json.dumps({**old, "rope_scaling": scaling, **over}))
    return folder


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("family", ["llama", "smollm3", "cohere", "gemma3_text"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_scaling_without_theta_is_read_as_transformers_reads_it(tmp_path, family: str, kind: str, key: str) -> None:
    """Vicuna-16k, LongChat, Yarn-Llama-2: each class has a default of its own."""
    from transformers import AutoConfig

    from retrofit.model.load import load_config

    original = {"original_max_position_embeddings": 128} if kind == "yarn" else {}
    folder = left_to_the_class(save_tiny(tmp_path / "source", family), {key: kind, "factor": 4.0, **original})
    stored, loaded = json.loads((folder / "config.json").read_text()), load_config(folder)
    layer_type = "full_attention" if family == "gemma3_text" else None
    got, scale = rope.frequencies(with_theta(stored, loaded), layer_type)
    model_says, model_scale = computed(tiny_model_from(AutoConfig.from_pretrained(folder)), layer_type)
    np.testing.assert_allclose(got, model_says, rtol=2e-6)
    assert scale == pytest.approx(model_scale)
    assert "theta-lost" not in [one.rule for one in rope.lint_folder(folder, loaded)]


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_scaling_without_theta_is_extended_with_the_default_of_the_class(tmp_path, kind: str, key: str) -> None:
    original = {"original_max_position_embeddings": 128} if kind == "yarn" else {}
    folder = left_to_the_class(save_tiny(tmp_path / "source", "llama"), {key: kind, "factor": 4.0, **original})
    done = rope.write_extended(folder, tmp_path / "out", factor=2, method=kind)
    assert (done.original, done.length, done.factor) == (128, 1024, 8.0)
    assert any("left rope_theta to the model's class" in note for note in done.notes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 1e4
    assert written["rope_parameters"]["rope_theta"] == 1e4
    assert not [one for one in rope.lint_folder(tmp_path / "out") if one.severity == "error"]


def test_the_window_of_fastchat_is_the_original_times_the_factor(tmp_path) -> None:
    """Vicuna-16k has max_position_embeddings 4096, max_sequence_length 16384 and a linear factor of 4."""
    scaling = {"type": "linear", "factor": 4.0}
    folder = left_to_the_class(save_tiny(tmp_path / "source", "llama"), scaling, max_sequence_length=2048)
    done = rope.write_extended(folder, tmp_path / "out", length=4096, method="linear")
    assert (done.original, done.factor) == (512, 8.0)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_sequence_length"] == 4096
    assert written["original_max_position_embeddings"] == 512
    within = rope.write_extended(folder, tmp_path / "within", length=1024, method="linear")
    assert within.factor == 4.0  # which the weights were trained with


def test_a_theta_lost_after_an_extension_is_refused(tmp_path) -> None:
    from retrofit.checkpoint.provenance import FILE

    source = left_to_the_class(save_tiny(tmp_path / "source", "llama"), {"type": "linear", "factor": 4.0})
    steps = [{"step": "extend", "result": {"original": 128}}]
    (source / FILE).write_text(json.dumps({"schema_version": 1, "steps": steps}))
    with pytest.raises(UserError, match="which had written it"):
        rope.write_extended(source, tmp_path / "out", factor=2, method="linear")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
