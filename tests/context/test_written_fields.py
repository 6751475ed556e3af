"""Every field that an extension writes, for each family and method, and what transformers 5 computes from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.context import rope
from retrofit.context.fields import as_dict, views
from retrofit.context.names import portable
from retrofit.model.folder import opened
from tests.context.rotary import by_hand, options, rotary_pairs
from tests.tiny import FAMILIES, ONE_ENCODING, save_tiny, tiny_config

ROPE = tuple(family for family in FAMILIES if family != "gpt_bigcode")
LENGTH, ORIGINAL = 2048, 512
TOP = {"original_max_position_embeddings": ORIGINAL}
WRITTEN = ("max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor", "head_dim")
NAMES = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "layer_rope_theta",
    "num_experts",
    "num_local_experts",
)

# What `rope_parameters` hold beside theta and a rotated share; `rope_scaling` holds theta as well, and no share.
PARAMETERS: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default"},
    "ntk": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **TOP},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TOP},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "attention_factor": math.sqrt(1 + math.log(4) / math.log(512)),
        "short_factor": "lists",
        "long_factor": "lists",
        **TOP,
    },
}
AT_TOP = ("ntk", "linear", "llama3")
"""Methods whose original length stands at the top level of config.json too, and on phi3 any."""
PHI3 = {"rope_type": "longrope", "short_factor": "lists", "long_factor": "lists", **TOP}
OLDER: dict[tuple[str, str], tuple[str, ...]] = {
    **{
        ("phi3", method): ("type", "short_factor", "long_factor") for method in ("linear", "yarn", "llama3", "longrope")
    },
    ("olmo", "linear"): ("type", "factor"),
    ("olmo2", "linear"): ("type", "factor"),
}
"""Families and methods of which transformers 4 takes exactly these keys of `rope_scaling`."""
EXPERTS = {
    **{name: {"num_local_experts": 3} for name in ("mixtral", "granitemoe", "granitemoe_swa")},
    **{name: {"num_experts": 4} for name in ("qwen2_moe", "olmoe")},
    "qwen3_moe": {"num_experts": 4, "num_local_experts": 4},
}


def expected(family: str, method: str) -> dict[str, Any]:
    """The fields of config.json. Lists of longrope are the word: their numbers are compared by what is computed."""
    config = tiny_config(family, **ONE_ENCODING.get(family, {}))
    full = next(one for one in views(as_dict(config)) if one.layer_type in (None, "full_attention")).parameters
    pairs = rotary_pairs(config)
    theta = full["rope_theta"] * (4.0 ** (pairs / (pairs - 1)) if method == "ntk" else 1)
    share = {"partial_rotary_factor": full["partial_rotary_factor"]} if "partial_rotary_factor" in full else {}
    own = PHI3 if (family, method) in OLDER and family == "phi3" else PARAMETERS[method]
    parameters = {**own, "rope_theta": pytest.approx(theta), **share}
    fields = {"max_position_embeddings": LENGTH, "rope_theta": pytest.approx(theta), **share, **EXPERTS.get(family, {})}
    if method in AT_TOP or family == "phi3":
        fields |= TOP
    if family == "gemma3_text":
        sliding = {"rope_type": "default", "rope_theta": 1e4}
        fields |= {"rope_parameters": {"full_attention": parameters, "sliding_attention": sliding}}
        fields |= {"rope_local_base_freq": 1e4}
    else:
        fields |= {"rope_parameters": parameters}
    if family.endswith("_swa"):
        fields["layer_rope_theta"] = [pytest.approx(theta)] * 2
    if method not in ("none", "ntk"):
        exact = OLDER.get((family, method))
        older = {key: value for key, value in parameters.items() if key != "partial_rotary_factor"}
        fields["rope_scaling"] = {key: {**older, "type": own["rope_type"]}[key] for key in exact} if exact else older
    if getattr(config, "head_dim", None) or family == "mixtral":
        fields["head_dim"] = getattr(config, "head_dim", None) or 16
    return fields


def without_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "lists" if isinstance(v, list) else without_lists(v) for k, v in value.items()}
    return value


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_tiny(tmp_path_factory.mktemp(family), family, **ONE_ENCODING.get(family, {})) for family in ROPE
    }


@pytest.mark.parametrize("method", rope.METHODS)
@pytest.mark.parametrize("family", ROPE)
def test_the_fields_and_what_transformers_5_computes_from_them(
    sources: dict[str, Path], tmp_path: Path, family: str, method: str
) -> None:
    """The logits of the folder are those of the model before it, with frequencies and attention factor by hand."""
    source, config = sources[family], tiny_config(family, **ONE_ENCODING.get(family, {}))
    asked = options(method, rotary_pairs(config))
    rope.write_extended(source, tmp_path / "out", length=LENGTH, **asked)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: without_lists(raw[name]) for name in (*WRITTEN, *NAMES) if name in raw} == expected(family, method)
    again = portable(raw)
    assert json.dumps(again, sort_keys=True) == json.dumps(raw, sort_keys=True)

    load = {"dtype": torch.float32, "attn_implementation": "eager"}
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **load)
    reference = AutoModelForCausalLM.from_pretrained(source, **load)
    kind = "full_attention" if family == "gemma3_text" else None
    theta = next(one for one in views(as_dict(config)) if one.layer_type == kind).parameters["rope_theta"]
    wanted, scale = by_hand(method, theta, 2 * rotary_pairs(config), 4.0, ORIGINAL)
    prefix = "full_attention_" if kind else ""
    for module in reference.modules():
        if hasattr(module, f"{prefix}inv_freq"):
            setattr(module, f"{prefix}inv_freq", torch.tensor(wanted, dtype=torch.float32))
            setattr(module, f"{prefix}attention_scaling", scale)
    ids = torch.randint(5, 60, (1, 64), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(got(ids).logits, reference(ids).logits, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "stablelm", "phi3"])
def test_two_lists_have_the_original_length_at_the_top_level(sources: dict[str, Path], tmp_path: Path, family) -> None:
    pairs = rotary_pairs(tiny_config(family))
    asked = options("longrope", pairs, short_factor=(1.0,) * pairs)
    rope.write_extended(sources[family], tmp_path / "out", length=LENGTH, **asked)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["original_max_position_embeddings"] == ORIGINAL
    assert ("attention_factor" in raw["rope_scaling"]) == (family != "phi3")
    assert raw["rope_scaling"]["short_factor"] == [1.0] * pairs
    assert portable(raw) == raw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
def test_phi3s_folded_attention_factor_is_the_unfolded_one(tmp_path: Path, method: str, dtype: str) -> None:
    """The same lists with the factor in `rope_parameters`, which transformers 5 alone reads, on the first weights."""
    source = save_tiny(tmp_path / "source", "phi3", dtype=dtype)
    done = rope.write_extended(source, tmp_path / "out", length=LENGTH, method=method)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    del raw["rope_scaling"]
    factor = 0.1 * math.log(4) + 1 if method == "yarn" else 1.0
    raw["rope_parameters"] |= {"factor": 4.0, "attention_factor": factor}
    (source / "config.json").write_text(json.dumps(raw))
    own = math.sqrt(1 + math.log(4) / math.log(ORIGINAL))
    assert done.query_scale == pytest.approx((factor / own) ** 2)
    weights = [opened(folder).checkpoint for folder in (tmp_path / "out", source)]
    layer = opened(source).spec.layers[0]
    folded, unfolded = (one.tensor(layer.q.name).double() for one in weights)
    rows = layer.q.stop
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-23
    torch.testing.assert_close(folded[:rows], unfolded[:rows] * done.query_scale, rtol=rounding, atol=0)
    assert torch.equal(folded[rows:], unfolded[rows:])
    if dtype == "float32":
        ids = torch.randint(5, 60, (1, 600), generator=torch.Generator().manual_seed(3))
        load = {"dtype": torch.float32, "attn_implementation": "eager"}
        with torch.inference_mode():
            got, wanted = (
                AutoModelForCausalLM.from_pretrained(folder, **load)(ids).logits
                for folder in (tmp_path / "out", source)
            )
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
