"""What the far half of a longer window does to SmolLM2-135M, by layer, without any training.

    python -m evals.benchmarks.far_context BOOK.txt [BOOK.txt ...] [--length 16384] [--tail 1024]

Three questions, each about the same tokens of the beginning of a book:

- `native`: what does the original gain from more context within its own window?
- `tail`: the model extended by YaRN reads the window once with all of its context and once with half of it. Then the
  last tokens alone are read again over the same keys and values, with other scores or without far keys in some layers.
- `early`: whole passes in which the first layers keep the original's encoding and see a window of its length, and the
  others are extended by a larger base.

Everything is computed in bfloat16, one sequence, with `products`. 95% intervals: bootstrap over blocks of 128 tokens,
paired. Half an hour a book on an idle core at 16,384 tokens. Writes results/far_context.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.benchmarks.scoring import RESULTS
from retrofit.context.rope import extend_and_plan
from retrofit.evaluation.metrics.bootstrap import difference_interval
from retrofit.kernels import attention_interface, products
from retrofit.model.load import load_config, load_model, load_tokenizer
from retrofit.model.source import resolve
from retrofit.recipe.schema import RopeSettings

NATIVE, CONTEXTS = 8192, (1024, 2048, 4096)
KEPT, ROWS, LOOKED_AT = 4, 256, 32  # first keys that are never hidden; queries of a run, and those whose mass is taken
EARLY = 10  # layers at the beginning of the model
PARTS = ((0, 10), (10, 20), (20, 30))
TEMPERATURES = (0.92, 1.1, 1.2)
YARN = ("yarn", RopeSettings(attention_factor=1.1))


@dataclass
class Reading:
    """How the next pass attends. window: tokens that the layers below `early` see. For a tail over cached keys: hidden:
    layers that do not see keys farther than `near`; scale: what each layer's scores are multiplied with; mass: sums of
    the attention on those keys, by layer and head, where it is wanted."""

    early: int = 0
    window: int | None = None
    near: int = 0
    hidden: range = range(0)
    scale: Sequence[float] | None = None
    mass: np.ndarray | None = None


reading = Reading()


@cache
def folder() -> Path:
    """SmolLM2's checkpoint."""
    return resolve("embedded").folder


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it, under `reading`."""
    q, k, v, layer = query.to(value.dtype), key.to(value.dtype), value, module.layer_idx
    if q.shape[2] == k.shape[2]:
        window = reading.window if layer < reading.early else None
        return products.attention(q, k, v, scaling, window).transpose(1, 2), None
    if reading.scale is not None:
        scaling = scaling * reading.scale[layer]
    begun, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], ROWS):
        rows = torch.arange(start, min(start + ROWS, q.shape[2]))
        keys = torch.arange(begun + int(rows[-1]) + 1)
        if layer in reading.hidden:
            keys = torch.cat([keys[:KEPT], keys[max(KEPT, begun + start - reading.near) :]])
        later = keys[None] > begun + rows[:, None]
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            scores = ((q[0, heads, rows] * scaling).reshape(-1, q.shape[3]) @ k[0, head, keys].T).view(
                group, len(rows), -1
            )
            p = torch.softmax(scores.masked_fill_(later, float("-inf")), -1)
            out[0, heads, rows] = (p.view(-1, len(keys)) @ v[0, head, keys]).view(group, len(rows), -1)
            if reading.mass is not None:
                far = p[:, :LOOKED_AT, KEPT : begun + start - reading.near].float().sum(-1).mean(1)
                reading.mass[layer, heads] += far.numpy() * len(rows) / q.shape[2]
    return out.transpose(1, 2), None


def loaded(method: str, settings: RopeSettings, factor: float) -> Any:
    """SmolLM2 in bfloat16 with this encoding; factor 1 leaves it as it is."""
    config, scale = load_config(folder()), 1.0
    if factor > 1:
        config, done = extend_and_plan(config, factor=factor, method=method, settings=settings)
        scale = done.query_scale
    model: Any = load_model(folder(), dtype="bfloat16", config=config)
    model.model.rotary_emb.attention_scaling *= scale**0.5  # of cos and sin, so the scores are multiplied with scale
    model.set_attn_implementation("far_context")
    return model


def keep_encoding(model: Any, layers: int) -> None:
    """The first `layers` layers rotate as the original does."""
    original = loaded("none", RopeSettings(), 1).model.rotary_emb

    def hook(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if module.layer_idx < layers:
            cos = given["position_embeddings"][0]
            positions_1T = torch.arange(cos.shape[1])[None]
            given["position_embeddings"] = original(cos, positions_1T)
        return args, given

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def losses(model: Any, hidden_TC: Tensor, labels_T: Tensor) -> np.ndarray:
    """Losses [T] of labels after hidden states."""
    pairs = zip(hidden_TC.split(512), labels_T.split(512), strict=True)
    parts = [torch.nn.functional.cross_entropy(model.lm_head(h).float(), y, reduction="none") for h, y in pairs]
    return torch.cat(parts).numpy()


def read(model: Any, ids_1T: Tensor, last: int) -> np.ndarray:
    """Losses of the last tokens of one pass."""
    hidden_TC = model.model(input_ids=ids_1T).last_hidden_state[0]
    return losses(model, hidden_TC[-last - 1 : -1], ids_1T[0, -last:])


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """mean(first - second) with its interval."""
    found = difference_interval([first], [second])
    return {"nats": found.value, "low": found.low, "high": found.high}


def native(ids_1T: Tensor, tail: int) -> Iterator[dict[str, Any]]:
    """What the original gains from `NATIVE` tokens of context against fewer."""
    model, last = loaded("none", RopeSettings(), 1), 2 * tail
    full = read(model, ids_1T[:, :NATIVE], last)
    for context in CONTEXTS:
        ends = range(NATIVE - last + tail, NATIVE + 1, tail)
        short = np.concatenate([read(model, ids_1T[:, end - tail - context : end], tail) for end in ends])
        yield {"what": f"original, {context:,} to {NATIVE:,} tokens", **difference(short, full)}


def tails(ids_1T: Tensor, tail: int) -> Iterator[dict[str, Any]]:
    """What changes for the last tokens when only they attend otherwise."""
    from transformers import DynamicCache

    model = loaded(*YARN, 4)
    length = ids_1T.shape[1]
    near, before = (length - 2 * tail) // 2, length - tail - 1
    caches = {}
    for name, begin in (("long", 0), ("short", before + 1 - near)):
        caches[name] = DynamicCache()
        model.model(input_ids=ids_1T[:, begin:before], past_key_values=caches[name], use_cache=True)

    def again(name: str) -> np.ndarray:
        cache, ids = caches[name], ids_1T[:, before:]
        seen = cache.get_seq_length()
        positions_1T = torch.arange(seen, seen + ids.shape[1])[None]
        given = {"past_key_values": cache, "use_cache": True, "position_ids": positions_1T}
        hidden_TC = model.model(input_ids=ids, **given).last_hidden_state[0]
        cache.crop(-ids.shape[1])
        return losses(model, hidden_TC[:-1], ids[0, 1:])

    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    short = again("short")
    reading.near, reading.mass = near, np.zeros((layers, heads))
    base = again("long")
    mass, reading.mass = reading.mass, None
    yield {"what": "YaRN, gain of the far half", "short": float(short.mean()), **difference(short, base)}
    yield {"what": "attention on far keys, by layer", "mass": mass.mean(1).tolist()}
    for x in TEMPERATURES:
        reading.scale = [x] * layers
        yield {"what": f"scores x {x}: saves", **difference(base, again("long"))}
    for x in TEMPERATURES[1:]:
        reading.scale = [x if layer < EARLY else 1.0 for layer in range(layers)]
        yield {"what": f"scores x {x} in the first {EARLY} layers: saves", **difference(base, again("long"))}
    reading.scale = None
    for first, end in (*PARTS, (0, layers)):
        reading.hidden = range(first, end)
        yield {"what": f"far keys hidden in layers {first} to {end - 1}: saves", **difference(base, again("long"))}
    reading.hidden = range(0)


def early(ids_1T: Tensor, tail: int) -> Iterator[dict[str, Any]]:
    """Whole passes whose first layers are the original's, with a window of its length."""
    model, length = loaded("ntk", RopeSettings(), 4), ids_1T.shape[1]
    keep_encoding(model, EARLY)
    reading.early, reading.window = EARLY, length // 2
    short_1T = ids_1T[:, -tail - (length - 2 * tail) // 2 :]
    original = read(loaded("none", RopeSettings(), 1), short_1T, tail)
    short, long = read(model, short_1T, tail), read(model, ids_1T, tail)
    reading.early, reading.window = 0, None
    name = f"first {EARLY} layers as they were"
    yield {"what": f"{name}: gain of the far half", "short": float(short.mean()), **difference(short, long)}
    yield {"what": f"{name}: loss against the original, near half", **difference(short, original)}
    yield {"what": f"{name}: loss against the original's near half, all of the context", **difference(long, original)}


@torch.inference_mode()
def main() -> None:
    """Ask all of every book, and print and write what comes out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--tail", type=int, default=1024)
    parser.add_argument("--parts", default="native,tail,early")
    parser.add_argument("--out", type=Path, default=RESULTS / "far_context.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    attention_interface.register("far_context", lambda *_: torch.empty(0))  # its mask function
    from transformers import AttentionInterface

    AttentionInterface.register("far_context", attention)
    tokenizer = load_tokenizer(folder())
    parts = {"native": native, "tail": tails, "early": early}
    rows = []
    for book in options.books:
        ids = tokenizer(book.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        ids_1T = torch.tensor([[tokenizer.bos_token_id, *ids[: options.length - 1]]])
        for part in options.parts.split(","):
            begun = time.process_time()
            for row in parts[part](ids_1T, options.tail):
                rows.append({"book": book.stem, **row, "seconds": time.process_time() - begun})
                begun = time.process_time()
                print(json.dumps(rows[-1]), flush=True)
    options.out.write_text(json.dumps({"length": options.length, "tail": options.tail, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
