"""A model that was extended before, extended further."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retrofit.context import rope
from retrofit.context.names import with_theta
from retrofit.errors import UserError
from retrofit.recipe.schema import RopeSettings
from tests.context.rotary import LLAMA31, computed, options, tiny_model_from
from tests.tiny import save_tiny, tiny_config


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
