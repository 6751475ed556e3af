"""Models on this device: every family proven, scoring, and decoding as a loop and as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from evals.gpu.parts import Row, Setting
from retrofit.errors import UserError
from retrofit.evaluation.cost import machine_speeds, run_cost
from retrofit.evaluation.scoring.score import score
from retrofit.kernels.check import prove
from retrofit.kernels.registry import choose
from retrofit.model.families import describe
from retrofit.system.device import forward_tokens
from retrofit.workflow.estimate.cost import CostModel, ModelFacts
from retrofit.workflow.estimate.throughput import measure
from tests.tiny import FAMILIES, tiny_model

SMOLLM2: dict[str, Any] = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
BILLION: dict[str, Any] = {  # 1.3 billion parameters
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def families(setting: Setting) -> Iterator[Row]:
    """Tiny models of every family: sdpa and blockwise against eager, in one pass and in cached pieces."""
    ids = torch.randint(0, 250, (1, 96), generator=torch.Generator().manual_seed(0)).to(setting.device)
    for family in FAMILIES[:3] if setting.reduced else FAMILIES:
        model = tiny_model(family).to(setting.device, getattr(torch, setting.dtype))
        for kernel in ("sdpa", "blockwise"):
            what = f"{family}, {kernel} against eager"
            try:
                choice = choose(kernel, describe(model.config), setting.device, dtype=setting.dtype)
            except UserError as error:
                yield Row(what, "refused", note=str(error))
                continue
            check = prove(model, choice, ids)
            yield Row(what, check.max_difference, "largest difference of a logit", passed=check.passed)


def random_llama(shape: dict[str, Any], setting: Setting, **over: Any) -> Any:
    """A random model of a shape, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **{**shape, "max_position_embeddings": 131072, **over})
    if setting.reduced:
        config = tiny_model("llama", **over).config
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype))
    return model.eval()


def scoring(setting: Setting) -> Iterator[Row]:
    """Token losses of one document by a random model in SmolLM2's shape, beside what a plan says."""
    from retrofit.data.documents import Document

    model = random_llama(SMOLLM2, setting)
    spec = describe(model.config)
    chunk = 64 if setting.reduced else forward_tokens(setting.device, spec, model.dtype.itemsize)
    facts = ModelFacts("smollm2", spec, sum(p.numel() for p in model.parameters()), setting.dtype)
    costs = CostModel(facts, spec, measure(setting.device), spec.max_position_embeddings)
    for tokens in (256,) if setting.reduced else (4096, 32768):
        ids = np.random.default_rng(0).integers(0, spec.vocab_size, tokens)
        document = Document("random", "random", ids, np.ones(tokens, dtype=np.int64))
        score(model, [document.cut(2 * chunk)], chunk=chunk)
        began = time.perf_counter()
        losses = score(model, [document], chunk=chunk)
        seconds = time.perf_counter() - began
        predicted = tokens / costs.seconds(tokens, tokens, call=chunk)
        finite = bool(np.isfinite(losses.losses[0]).all())
        yield Row(
            f"scoring {tokens:,} tokens",
            tokens / seconds,
            "tokens/s",
            predicted=predicted,
            passed=finite,
            note=f"chunks of {chunk:,}",
        )


def decoding(setting: Setting) -> Iterator[Row]:
    """Decoding after a prefill: a loop over a growing cache, a loop over one of fixed size, and a CUDA graph."""
    lengths, batches = ([32], (1, 2)) if setting.reduced else ([2048, 16384], (1, 8, 32))
    cuda = setting.device.startswith("cuda")
    speeds = machine_speeds(getattr(torch, setting.dtype), setting.device)
    yield Row("memory bandwidth", speeds.bytes_per_second / 1e12, "TB/s")
    yield Row("matrix rate", speeds.flops_per_second / 1e12, "TFLOP/s")
    for name, shape, kv_heads in (("SmolLM2's shape", SMOLLM2, (3, 1)), ("1.3 billion", BILLION, (32, 8))):
        for count in (4, 1) if setting.reduced else kv_heads:
            model = random_llama(shape, setting, num_key_value_heads=count)
            model.set_attn_implementation("sdpa")
            cost = run_cost(model, lengths, 4 if setting.reduced else 32, speeds=speeds, batches=batches)
            for at in cost.lengths:
                where = f"{name}, {count} KV heads, after {at.length:,} tokens"
                assert at.decode_per_s is not None
                yield Row(
                    f"{where}: growing cache", at.decode_per_s, "tokens/s", note=f"at most {at.decode_bound:,.0f}"
                )
                for one in at.batches:
                    bound = f"at most {one.decode_bound:,.0f}"
                    note = "; ".join(filter(None, (bound, one.note)))
                    if one.loop_per_s is not None:
                        yield Row(f"{where}, {one.batch} at once: loop", one.loop_per_s, "tokens/s", note=note)
                    if one.graph_per_s is not None:
                        yield Row(f"{where}, {one.batch} at once: graph", one.graph_per_s, "tokens/s", note=note)
                    elif cuda:
                        yield Row(f"{where}, {one.batch} at once: graph", "none", passed=False, note=note)
            del model
