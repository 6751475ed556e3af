"""Into GPTBigCode, which can share one KV head: models with learned positions and a norm before each branch.

The target holds q, k and v in one matrix, interleaved by head, and every matrix as [out, in].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.model.reexpress.base import HEADS, Made, Reexpression, common_fields, copied, ones, pair, wide, zeros

TARGET = "gpt_bigcode"
_OPT_OFFSET = 2  # OPT's table of positions begins with two rows that no position uses


def interleave(q: Tensor, k: Tensor, v: Tensor, *, head_dim: int, q_scale: float = 1.0) -> Tensor:
    """Rows of q, k and v, each [H D, ...], by head: [H, (q, k, v), D, ...]."""
    q = q if q_scale == 1.0 else wide(q) * q_scale
    return torch.stack([part.unflatten(0, (-1, head_dim)).to(q.dtype) for part in (q, k, v)], 1).flatten(0, 2)


def from_gpt2(config: Any) -> Reexpression:
    """GPT-2. Its matrices are Conv1D, [in, out]; a scale by layer index goes into the query rows."""
    if config.add_cross_attention:
        raise UserError(
            "the model has cross-attention", where="add_cross_attention of config.json", fix="give a decoder-only model"
        )
    head_dim = config.hidden_size // config.num_attention_heads

    def turned(tensor: Tensor) -> Tensor:
        return tensor.T

    def fused(tensor: Tensor, q_scale: float) -> Tensor:
        q, k, v = (tensor.T if tensor.ndim == 2 else tensor).chunk(3)
        return interleave(q, k, v, head_dim=head_dim, q_scale=q_scale)

    tensors = copied({f"transformer.{name}.weight": f"transformer.{name}.weight" for name in ("wte", "wpe")})
    for i in range(config.num_hidden_layers):
        layer = f"transformer.h.{i}"
        q_scale = 1.0 / (i + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
        for kind in ("weight", "bias"):
            name = f"{layer}.attn.c_attn.{kind}"
            tensors[name] = Made((name,), partial(fused, q_scale=q_scale))
        for module in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            name = f"{layer}.{module}"
            tensors |= {f"{name}.weight": Made((f"{name}.weight",), turned), f"{name}.bias": Made((f"{name}.bias",))}
        tensors |= pair(f"{layer}.ln_1", f"{layer}.ln_1") | pair(f"{layer}.ln_2", f"{layer}.ln_2")
    tensors |= pair("transformer.ln_f", "transformer.ln_f")
    fields = {
        "n_positions": config.max_position_embeddings,
        "n_inner": config.n_inner or 4 * config.hidden_size,
        "activation_function": config.activation_function,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "resid_pdrop": config.resid_pdrop,
        "embd_pdrop": config.embd_pdrop,
        "attn_pdrop": config.attn_pdrop,
    }
    folds = bool(config.scale_attn_by_inverse_layer_idx)
    return _bigcode(config, "gpt2", fields, tensors, prefixes=(("transformer.", ""),), folds=folds)


def from_opt(config: Any) -> Reexpression:
    """OPT with its norms before the branches (all sizes but 350m)."""
    _require_plain_opt(config)
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    fused = partial(interleave, head_dim=head_dim)

    def norm(target: str, source: str) -> dict[str, Made]:
        if config.layer_norm_elementwise_affine:
            return pair(target, source)
        return {f"{target}.weight": ones(width), f"{target}.bias": zeros(width)}

    def matrix(target: str, source: str, rows: int) -> dict[str, Made]:
        made = pair(target, source, bias=config.enable_bias)
        return made if config.enable_bias else made | {f"{target}.bias": zeros(rows)}

    tensors = {
        "transformer.wte.weight": Made(("model.decoder.embed_tokens.weight",)),
        "transformer.wpe.weight": Made(("model.decoder.embed_positions.weight",), lambda rows: rows[_OPT_OFFSET:]),
    }
    for i in range(config.num_hidden_layers):
        old, new = f"model.decoder.layers.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            sources = tuple(f"{old}.self_attn.{name}_proj.{kind}" for name in "qkv")
            tensors[f"{new}.attn.c_attn.{kind}"] = Made(sources, fused)
        if not config.enable_bias:
            tensors[f"{new}.attn.c_attn.bias"] = zeros(3 * width)
        tensors |= matrix(f"{new}.attn.c_proj", f"{old}.self_attn.out_proj", width)
        tensors |= matrix(f"{new}.mlp.c_fc", f"{old}.fc1", config.ffn_dim)
        tensors |= matrix(f"{new}.mlp.c_proj", f"{old}.fc2", width)
        tensors |= norm(f"{new}.ln_1", f"{old}.self_attn_layer_norm") | norm(f"{new}.ln_2", f"{old}.final_layer_norm")
    tensors |= norm("transformer.ln_f", "model.decoder.final_layer_norm")
    fields = {
        "n_positions": config.max_position_embeddings,
        "n_inner": config.ffn_dim,
        "activation_function": config.activation_function,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": config.init_std,
        "resid_pdrop": config.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": config.attention_dropout,
    }
    notes = (
        "OPT counts positions by its padding mask, GPTBigCode by place: give position_ids for padded batches "
        "(`generate` does it by itself)",
    )
    return _bigcode(config, "opt", fields, tensors, prefixes=(("model.decoder.", "decoder."),), notes=notes)


def _require_plain_opt(config: Any) -> None:
    reasons = {
        "do_layer_norm_before": None if config.do_layer_norm_before else "its norms come after each branch",
        "word_embed_proj_dim": None
        if config.word_embed_proj_dim == config.hidden_size
        else "its embeddings are narrower than its layers",
        "_remove_final_layer_norm": "it has no final norm" if config._remove_final_layer_norm else None,
    }
    for name, reason in reasons.items():
        if reason:
            raise UserError(
                f"this OPT model cannot be written as {TARGET}: {reason}",
                where=f"{name} of config.json",
                fix="choose another model; of the published sizes only 350m is built like this",
            )


def _bigcode(
    config: Any,
    source: str,
    fields: dict[str, Any],
    tensors: dict[str, Made],
    *,
    prefixes: tuple[tuple[str, str], ...],
    folds: bool = False,
    notes: tuple[str, ...] = (),
) -> Reexpression:
    if not config.tie_word_embeddings:
        tensors = tensors | pair("lm_head", "lm_head", bias=False)
    sizes = {
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "multi_query": False,
    }
    return Reexpression(
        source=source,
        target=TARGET,
        architecture="GPTBigCodeForCausalLM",
        fields=common_fields(config) | sizes | fields,
        tensors=tensors,
        prefixes=prefixes,
        ignored=(*HEADS, ".attn.bias", ".attn.masked_bias"),
        folds=folds,
        notes=notes,
    )
