"""The checkpoints that engines are tried with: every family with every position method, heads, windows, re-expressions.

Tiny random models whose window grows from 128 to 512 tokens, four query heads of 64 dimensions on two KV heads, a
base of 50,000 instead of the usual 10,000, and a vocabulary of exactly the tokens of a byte-level tokenizer. Written by
the same functions as every other checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrofit.context.engines import EXPERTS, HEADS, NORMALISED, TWO_LISTS, WRITTEN
from retrofit.context.methods import METHODS
from retrofit.model.families import KNOWN
from retrofit.model.families.refused import REEXPRESSED as REQUIRED
from retrofit.publishing.engines.controls import controls_of
from retrofit.publishing.engines.run import Passage
from retrofit.recipe.schema import RopeSettings
from tests.tiny import save_tiny, tiny_tokenizer

ORIGINAL, LENGTH, THETA = 128, 512, 50_000.0
ONLY = {"gpt_bigcode": ("linear",), "granite_swa": ("ntk",), "granitemoe_swa": ("ntk",)}
"""Families that other methods cannot be put on."""
REAL = "SmolLM2-135M"
REAL_TOKENS = 8_392  # 200 more than its own window
WINDOW = 96
WINDOWED = ("mistral", "qwen2", "qwen3", "starcoder2", "phi3", "mixtral", "qwen2_moe", "qwen3_moe")
REEXPRESSED = (*REQUIRED.items(), ("qwen2", "llama"))  # what becomes granite_swa or granitemoe_swa is tried as that
_AT = (0, 1, 7, 63, 100, 127, 128, 191, 255, 319, 383, 447, 503, 504)

_SHAPE: Mapping[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 256,
    "intermediate_size": 128,
    "max_position_embeddings": ORIGINAL,
}
_PLAIN = {"rope_type": "default", "rope_theta": THETA}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "norm_topk_prob": NORMALISED["qwen3_moe"]},
    "ministral": {"head_dim": 64, "sliding_window": WINDOW},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": WINDOW, "query_pre_attn_scalar": 64},
    "gemma3_text": {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": WINDOW,
        "num_hidden_layers": 6,  # llama.cpp knows one pattern of layers
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {"full_attention": _PLAIN, "sliding_attention": {**_PLAIN, "rope_theta": 20_000.0}},
    },
    "phi": {"rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5}},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},  # as llama.cpp has it
    "gpt_bigcode": {"n_inner": 1024},
    **{
        name: {"sliding_window": WINDOW, "layer_rope_theta": [THETA, 20_000.0]}
        for name in ("granite_swa", "granitemoe_swa")
    },
    "stablelm": {"rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5}},
    "phi3": {
        "rope_parameters": {**_PLAIN, "partial_rotary_factor": 1.0},
        "original_max_position_embeddings": ORIGINAL,
    },
}
_WINDOWS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"sliding_window": WINDOW} for name in WINDOWED},
    **{
        name: {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        for name in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
    },
}


@dataclass(frozen=True, order=True)
class Case:
    """A checkpoint. family: its model_type; method: of the longer window, or `HEADS`; window: whether layers look back
    over a sliding window that the family does not always have; source: the model_type that it is re-expressed from."""

    family: str
    method: str
    window: bool = False
    source: str | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.family, *(["window"] if self.window else []), *([f"from-{self.source}"] if self.source else [])]
        return "-".join([*parts, self.method.replace(", ", "-").replace(" ", "-")])


def cases() -> tuple[Case, ...]:
    """All of them."""
    return tuple(dict.fromkeys(_cases()))


def _cases() -> Iterator[Case]:
    for family in KNOWN:
        yield Case(family, HEADS)
        for method in ONLY.get(family, METHODS):
            if method == "none":
                continue
            yield Case(family, method)
            if method == "longrope":
                yield Case(family, TWO_LISTS)
    for family in WINDOWED:
        yield Case(family, HEADS, window=True)
        yield Case(family, "yarn", window=True)
    for family in NORMALISED:
        yield Case(family, EXPERTS)
    for source, family in REEXPRESSED:
        yield Case(family, HEADS, source=source)
    yield Case("llama", WRITTEN)
    yield Case("llama", "yarn", source=REAL)


def build(case: Case, folder: Path, work: Path) -> None:
    """Write the checkpoint of a case to `folder`. work: where the models that cases are made of are kept. Raises
    UserError where the method cannot be put on the family."""
    import retrofit
    from retrofit.context.rope import write_extended

    if case.source == REAL:
        retrofit.extend("embedded", out=folder, factor=2, method="yarn")
        return
    heads = work / ("-".join(["heads", case.family, *(["window"] * case.window), *([case.source] * bool(case.source))]))
    if not (heads / "config.json").is_file():
        source = work / f"source-{case.source or case.family}{'-window' * case.window}"
        if not (source / "config.json").is_file():
            _source(case, source)
        if case.source:
            retrofit.convert(source, out=work / f"{heads.name}-all", reexpress_only=True, target=case.family)
            source = work / f"{heads.name}-all"
        retrofit.convert(source, out=heads, kv_heads=1 if case.family == "gpt_bigcode" else 2, method="mean")
    if case.method in (HEADS, EXPERTS):
        folder.mkdir(parents=True)
        for path in heads.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if case.method == EXPERTS:
            _change(folder, {"norm_topk_prob": not NORMALISED[case.family]})
        return
    method = case.method.partition(",")[0]
    write_extended(heads, folder, length=LENGTH, method=method, settings=_settings(case, heads))
    if case.method == WRITTEN:
        config = json.loads((folder / "config.json").read_text())
        names = ("rope_parameters", "rope_scaling")
        _change(folder, {name: {**config[name], "attention_factor": 1.4} for name in names})


def _change(folder: Path, fields: Mapping[str, Any]) -> None:
    """Other fields of a configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}, indent=2))


def _settings(case: Case, heads: Path) -> RopeSettings:
    if not case.method.startswith("longrope"):
        return RopeSettings()
    from retrofit.context.fields import rotary_dim, views

    config = json.loads((heads / "config.json").read_text())
    pairs = rotary_dim(config, views(config)[-1].parameters) // 2
    long = [round(1 + 3 * index / (pairs - 1), 4) for index in range(pairs)]
    return RopeSettings(short_factor=[1.0] * pairs if case.method == TWO_LISTS else long, long_factor=long)


def _source(case: Case, folder: Path) -> None:
    """The model before anything is done to it."""
    name = case.source or case.family
    if name in ("gpt_neox", "gptj", "gpt2", "opt"):
        _other(name, folder)
        return
    over = {**_SHAPE, "rope_parameters": _PLAIN, **_FAMILIES.get(name, {}), **(_WINDOWS[name] if case.window else {})}
    if name == "gpt_bigcode":
        del over["rope_parameters"]
    save_tiny(folder, name, chat_template=True, **over)


def _other(name: str, folder: Path) -> None:
    """A model that is re-expressed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import randomise

    common = {"vocab_size": 261, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    wide = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": ORIGINAL, "n_inner": 1024}
    deep = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": ORIGINAL}
    shapes = {
        "gpt_neox": {**deep, "intermediate_size": 128, "rope_parameters": {**_PLAIN, "partial_rotary_factor": 0.5}},
        "gptj": {**wide, "rotary_dim": 32},
        "gpt2": wide,
        "opt": {**deep, "ffn_dim": 1024, "word_embed_proj_dim": 256},
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **common, **shapes[name]), attn_implementation="eager"
    )
    randomise(model)
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template=True).save_pretrained(folder)


def window_of(folder: Path) -> int:
    """Tokens that a folder claims."""
    config = json.loads((folder / "config.json").read_text())
    return int(config["max_position_embeddings"] if "max_position_embeddings" in config else config["n_positions"])


def passage(folder: Path) -> Passage:
    """Random tokens up to the end of the window, and positions in all of it, the first and the last among them; of the
    real model as many tokens of Python's documentation as reach beyond its own window."""
    window = window_of(folder)
    if window > LENGTH:
        ids = _documentation(folder)
        at = {*_AT, *range(1000, len(ids), 1000), *range(len(ids) - 200, len(ids), 40), len(ids) - 1}
    else:
        ids = np.random.default_rng(7).integers(0, 256, window - 7).tolist()
        at = {*_AT, len(ids) - 1}
    return Passage(tuple(ids), tuple(sorted(one for one in at if one < len(ids))))


def _documentation(folder: Path) -> list[int]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    return list(AutoTokenizer.from_pretrained(folder)(text[: 8 * REAL_TOKENS])["input_ids"][:REAL_TOKENS])


def controls(folder: Path) -> dict[str, dict[str, Any]]:
    """What an engine would compute that ignores a part of the configuration: fields that are replaced, by name."""
    return controls_of(json.loads((folder / "config.json").read_text()))
