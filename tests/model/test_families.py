"""The literal tables against the real transformers classes, on tiny models of every family and variant."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.model.families import KNOWN, describe, family_of
from retrofit.model.families.experts import EXPERTS
from retrofit.model.families.refused import REASONS
from tests.tiny import FAMILIES, VARIANTS, save_tiny, tiny_config, tiny_model

CASES = [(family, {}) for family in FAMILIES] + list(VARIANTS)
cases = pytest.mark.parametrize(("family", "over"), CASES, ids=[f"{f}-{'-'.join(o)}" for f, o in CASES])


def attention_of(model, spec, index):
    return model.get_submodule(f"{spec.layers_path}.{index}.{spec.attention_path}")


def slots_of(layer):
    weights = {"q": layer.q, "k": layer.k, "v": layer.v, "o": layer.o}
    biases = {"q": layer.q_bias, "k": layer.k_bias, "v": layer.v_bias, "o": layer.o_bias}
    return weights, biases


def rows(slot, parameters):
    stored = parameters[slot.name]
    return stored[indices(slot, stored.shape[0])]


def indices(slot, count):
    """Row numbers that a slot means, one by one."""
    start, stop = slot.start or 0, slot.stop or count
    return [i for i in range(count) if start <= (i % slot.every if slot.every else i) < stop]


def rotary_by_theta(base):
    """The rotary modules by their base where there is one for each, the only one by None."""
    several = {one.config.rope_parameters["rope_theta"]: one for one in getattr(base, "rotary_embs", ())}
    return several or ({None: base.rotary_emb} if hasattr(base, "rotary_emb") else {})


def base_of(model, spec):
    return model.get_submodule(spec.layers_path.rpartition(".")[0])


def test_tiny_has_every_known_family():
    assert set(FAMILIES) == set(KNOWN)


@cases
def test_slots_name_parameters_of_the_right_shape(family, over):
    model = tiny_model(family, **over)
    parameters, spec = dict(model.named_parameters()), describe(model.config)
    for layer in spec.layers:
        q_rows, kv_rows = layer.query_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        weights, biases = slots_of(layer)
        expected = {
            "q": (q_rows, spec.hidden_size),
            "k": (kv_rows, spec.hidden_size),
            "v": (kv_rows, spec.hidden_size),
            "o": (spec.hidden_size, q_rows),
        }
        for name, slot in weights.items():
            assert tuple(rows(slot, parameters).shape) == expected[name], name
        for name, slot in biases.items():
            if slot is not None:
                assert tuple(rows(slot, parameters).shape) == expected[name][:1], name


@cases
def test_slots_and_norms_cover_every_attention_parameter_once(family, over):
    model = tiny_model(family, **over)
    parameters, spec = dict(model.named_parameters()), describe(model.config)
    covered: dict[str, torch.Tensor] = {name: torch.zeros(p.shape[0]) for name, p in parameters.items()}
    for layer in spec.layers:
        weights, biases = slots_of(layer)
        for slot in (*weights.values(), *(b for b in biases.values() if b is not None)):
            covered[slot.name][indices(slot, len(covered[slot.name]))] += 1
        for name, heads in ((layer.q_norm, layer.query_heads), (layer.k_norm, layer.kv_heads)):
            if name is None:
                continue
            stored = [name.format(head=h) for h in range(heads)] if layer.qk_norm_weights == "separate" else [name]
            size = (heads if layer.qk_norm == "full" else 1) * layer.head_dim
            shape = (heads, layer.head_dim) if layer.qk_norm_weights == "stacked" else (size,)
            for each in stored:
                assert tuple(parameters[each].shape) == shape
                covered[each] += 1
        if layer.sinks is not None:
            assert tuple(parameters[layer.sinks].shape) == (layer.query_heads,)
            covered[layer.sinks] += 1
    for name in parameters:
        if f".{spec.attention_path}." in name and not name.endswith("layernorm.bias"):
            assert torch.all(covered[name] == 1), name


@cases
def test_mlp_is_as_wide_as_the_module(family, over):
    model = tiny_model(family, **over)
    spec, active = describe(model.config), getattr(model.config, "num_experts_per_tok", 0)
    root = f"{spec.layers_path}.{len(spec.layers) - 1}."
    stacked = linear = 0
    for name, parameter in model.named_parameters():
        router = parameter.shape[0] in (1, getattr(model.config, "num_experts", 0) or active + 1)
        if not name.startswith(root) or f".{spec.attention_path}." in name:
            continue
        if parameter.dim() == 3:  # experts, all of them in one parameter
            stacked += parameter.numel() // parameter.shape[0] * active
        elif parameter.dim() == 2 and not (active and router):
            linear += parameter.numel()
    each = (3 if spec.mlp.gated else 2) * spec.hidden_size
    assert (stacked + linear, linear) == (each * spec.mlp.width, each * spec.mlp.adaptable)


@cases
def test_values_equal_what_the_module_holds(family, over):
    model = tiny_model(family, **over)
    spec = describe(model.config)
    assert spec.family == family
    assert spec.hidden_size == model.config.hidden_size
    assert spec.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert spec.tied_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert spec.residual_scale in (None, getattr(model.config, "residual_multiplier", 1.0))
    rotaries = rotary_by_theta(base_of(model, spec))
    for layer in spec.layers:
        module = attention_of(model, spec, layer.index)
        assert layer.head_dim == module.head_dim
        assert layer.scaling == module.scaling
        assert layer.group == module.num_key_value_groups
        if hasattr(module, "sliding_window"):
            assert layer.window == (module.sliding_window or None)
        assert layer.softcap == getattr(module, "attn_logit_softcapping", None)
        has_norm = any("norm" in name for name, _ in module.named_parameters())
        assert (layer.qk_norm is not None) == has_norm
        if layer.rope is None:
            thetas = getattr(model.config, "layer_rope_theta", None)
            assert not rotaries or not (thetas[layer.index] if thetas else module.use_rope)
            continue
        rotary = rotaries.get(layer.rope.theta, rotaries.get(None))
        layer_types = getattr(model.config, "layer_types", None)
        buffer = f"{layer_types[layer.index]}_inv_freq" if family == "gemma3_text" else "inv_freq"
        inv_freq = getattr(rotary, buffer)
        assert layer.rope.rotary_dim == 2 * inv_freq.shape[0]
        reference = layer.rope.theta ** -(torch.arange(0, layer.rope.rotary_dim, 2) / layer.rope.rotary_dim)
        torch.testing.assert_close(inv_freq, reference)


@cases
def test_window_is_what_the_logits_depend_on(family, over):
    """Changing the first token must not move later logits beyond the window's reach, and must move those within it."""
    spec = describe(tiny_config(family, **over))
    windows = [layer.window for layer in spec.layers]
    model = tiny_model(family, **over).to(torch.float64)
    ids_1T = torch.randint(0, 256, (1, 80), generator=torch.Generator().manual_seed(1))
    other_1T = ids_1T.clone()
    other_1T[0, 0] = (ids_1T[0, 0] + 1) % 256
    with torch.no_grad():
        moved_T = (model(ids_1T).logits - model(other_1T).logits).abs().amax(-1)[0]
    # A token reaches window - 1 positions further per layer; without a window, everywhere.
    reach = 80 if None in windows else 1 + sum(window - 1 for window in windows)
    assert torch.all(moved_T[reach:] == 0)
    assert moved_T[reach - 1] > 0


@cases
def test_description_reproduces_the_attention_of_the_module(family, over):
    """Attention written from the spec alone (no q/k norm) equals the module's output."""
    model = tiny_model(family, **over).to(torch.float64)
    spec, parameters = describe(model.config), dict(model.named_parameters())
    if any(layer.qk_norm for layer in spec.layers):
        pytest.skip("norms are tested by name and shape")
    seen = {}
    for layer in spec.layers:
        module = attention_of(model, spec, layer.index)
        module.register_forward_hook(
            lambda _m, args, kwargs, out, index=layer.index: seen.update(
                {index: ((args or (kwargs["hidden_states"],))[0], out[0])}
            ),
            with_kwargs=True,
        )
    ids_1T = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(ids_1T)
        for layer in spec.layers:
            x_1TC, expected_1TC = seen[layer.index]
            torch.testing.assert_close(
                reference_attention(x_1TC, layer, parameters), expected_1TC, atol=1e-6, rtol=1e-6
            )


def reference_attention(x_1TC, layer, parameters):
    """softmax(mask(cap(scaling q k^T))) v from the formulas, head by head."""
    weights, biases = slots_of(layer)

    def project(name, heads):
        y = x_1TC @ rows(weights[name], parameters).T
        y = y + (rows(biases[name], parameters) if biases[name] else 0)
        if layer.clip_qkv:
            y = y.clamp(-layer.clip_qkv, layer.clip_qkv)
        return y[0].unflatten(-1, (heads, layer.head_dim)).transpose(0, 1)

    q_HTD, k_KTD, v_KTD = (
        project(n, h) for n, h in (("q", layer.query_heads), ("k", layer.kv_heads), ("v", layer.kv_heads))
    )
    if layer.rope is not None:
        q_HTD, k_KTD = rotate(q_HTD, layer.rope), rotate(k_KTD, layer.rope)
    distance_TT = torch.arange(x_1TC.shape[1])[:, None] - torch.arange(x_1TC.shape[1])[None, :]
    visible_TT = (distance_TT >= 0) & (distance_TT < (layer.window or x_1TC.shape[1]))
    outputs = []
    for head in range(layer.query_heads):
        scores_TT = q_HTD[head] @ k_KTD[head // layer.group].T * layer.scaling
        if layer.softcap:
            scores_TT = layer.softcap * torch.tanh(scores_TT / layer.softcap)
        scores_TT = scores_TT.masked_fill(~visible_TT, float("-inf"))
        if layer.sinks:
            column_T1 = parameters[layer.sinks][head].expand(len(scores_TT), 1)
            scores_TT = torch.cat([scores_TT, column_T1], -1)
        # The eager reference of transformers takes its softmax in float32.
        weights_TT = torch.softmax(scores_TT.float(), -1).double()[:, : x_1TC.shape[1]]
        outputs.append(weights_TT @ v_KTD[head // layer.group])
    y_1TC = torch.cat(outputs, -1)[None] @ rows(weights["o"], parameters).T
    return y_1TC + (rows(biases["o"], parameters) if biases["o"] else 0)


def rotate(x_HTD, rope):
    pairs = rope.rotary_dim // 2
    angle_TP = torch.arange(x_HTD.shape[1])[:, None].float() * rope.theta ** -(torch.arange(pairs).float() / pairs)
    cos, sin = angle_TP.cos().double(), angle_TP.sin().double()
    first, second = (
        (slice(0, pairs), slice(pairs, 2 * pairs))
        if rope.pairing == "half"
        else (
            slice(0, 2 * pairs, 2),
            slice(1, 2 * pairs, 2),
        )
    )
    out = x_HTD.clone()
    out[..., first] = x_HTD[..., first] * cos - x_HTD[..., second] * sin
    out[..., second] = x_HTD[..., second] * cos + x_HTD[..., first] * sin
    return out


@cases
def test_with_kv_heads_gives_a_stock_class_with_fewer_heads(family, over):
    config = tiny_config(family, **over)
    before = describe(config).layers[0].kv_heads
    for kv_heads in (1, before) if family == "gpt_bigcode" else (1, 2, before):
        changed = family_of(config).with_kv_heads(config, kv_heads)
        spec = describe(changed)
        parameters = dict(AutoModelForCausalLM.from_config(changed).named_parameters())
        for layer in spec.layers:
            assert layer.kv_heads == kv_heads
            assert rows(layer.k, parameters).shape[0] == kv_heads * layer.head_dim
            assert rows(layer.v, parameters).shape[0] == kv_heads * layer.head_dim
    assert describe(config).layers[0].kv_heads == before, "the given configuration stays as it was"


def test_conversions_list_divisors_and_reasons():
    config = tiny_config("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=6)
    conversions = family_of(config).conversions(describe(config))
    assert [c.kv_heads for c in conversions] == [1, 2, 3, 4, 5, 6]
    assert [c.kv_heads for c in conversions if c.possible] == [1, 2, 3, 6]
    assert "4 does not divide 6" in conversions[3].reason
    for kv_heads in (4, 7, 0, -1):
        with pytest.raises(UserError, match="cannot be converted") as caught:
            family_of(config).with_kv_heads(config, kv_heads)
        assert "1, 2, 3, 6" in caught.value.fix


def test_gpt_bigcode_shares_one_head_or_none():
    config = tiny_config("gpt_bigcode")
    conversions = family_of(config).conversions(describe(config))
    assert [c.kv_heads for c in conversions if c.possible] == [1, 4]
    with pytest.raises(UserError, match="one KV head or one for each query head"):
        family_of(config).with_kv_heads(config, 2)
    shared = family_of(config).with_kv_heads(config, 1)
    assert shared.multi_query
    assert shared.num_key_value_heads == 1


def test_experts_are_named_as_stock_transformers_stores_them(tmp_path):
    for family, experts in EXPERTS.items():
        save_tiny(tmp_path / family, family)
        stored = set(Checkpoint.open(tmp_path / family).names)
        named = set()
        for name, parameter in tiny_model(family).named_parameters():
            named |= {part for parts in experts.stored(name, parameter.shape[0]) for part in parts}
        assert named == stored


def test_unknown_architecture_is_refused_with_the_list():
    with pytest.raises(UserError, match="`dbrx` is not supported") as caught:
        describe(SimpleNamespace(model_type="dbrx"))
    assert all(name in caught.value.fix for name in KNOWN)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "gpt_oss"])
def test_known_refusals_give_their_reason(name):
    with pytest.raises(UserError) as caught:
        describe(SimpleNamespace(model_type=name))
    assert REASONS[name] in caught.value.what
    assert name not in KNOWN


def test_heads_that_do_not_divide_are_refused():
    config = tiny_config("qwen2")
    config.num_key_value_heads = 3
    with pytest.raises(UserError, match="4 query heads cannot be shared evenly by 3 KV heads"):
        describe(config)


def test_families_import_without_torch():
    import subprocess
    import sys

    code = "import sys, retrofit.model.families; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
