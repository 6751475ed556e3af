"""config.json as it is stored: read within limits, and refused where no model could have its values.

Nothing here imports torch or transformers, and no class is built: of a billion layers a class would first make a list
of a billion entries. What says how a program runs a model, or which code and which files it takes, is left out: such
fields belong to whoever loads the model, never to its files.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import read_json

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 << 20
STORED_DTYPES = ("float32", "bfloat16", "float16", "float64")

# Attention and expert implementations may name code on the hub; other fields name weight files or configurations that
# are read instead; the rest changes what a call of the model returns.
RUN_FIELDS = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "attn_implementation_internal",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "kernel_config",
        "fusion_config",
        "distributed_config",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "transformers_weights",
        "configuration_files",
        "gguf_file",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
    }
)

# The most of each that a checkpoint may ask for: far beyond any model, and few enough to count with.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1 << 10),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim"), 1 << 14),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 1 << 12),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "rotary_dim"), 1 << 20),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 1 << 24),
    **dict.fromkeys(("ffn_dim", "n_inner", "shared_intermediate_size"), 1 << 24),
    "vocab_size": 1 << 24,
    "num_labels": 1 << 17,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "original_max_position_embeddings"), 2**31 - 1),
    **dict.fromkeys(("sliding_window", "max_window_layers", "max_sequence_length"), 2**31 - 1),
}
_MAY_BE_ZERO = (
    "max_window_layers",
    "sliding_window",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "num_labels",
    "rotary_dim",
)
_QUANTISED = ("quantization_config", "compression_config")
_CLASS_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as stored, without `RUN_FIELDS` and empty quantisation, after the checks that need no transformers.

    Raises UserError: no folder, no config.json, not JSON, no model_type, a lone adapter, quantised weights, sizes,
    dtypes and class names that are none.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError("there is no such folder", where=shown(folder), fix="check the path")
    if (folder / "adapter_config.json").is_file() and not path.exists():
        raise UserError(
            "the folder holds an adapter, not a model",
            where=shown(folder),
            fix="merge it first with peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()",
        )
    config = read_json(path, limit=MAX_CONFIG_BYTES, missing="the folder holds no config.json")
    require_plausible(config, shown(path))
    left_out = {name for name in _QUANTISED if not config.get(name)}  # `{}` is nothing, and transformers fails on it
    return {name: value for name, value in without_run_fields(config).items() if name not in left_out}


def without_run_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the fields that say how to run it, inside its parts as well."""
    return {
        key: without_run_fields(value) if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in RUN_FIELDS
    }


def require_plausible(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a `config.json` dict that no model can have, whatever its architecture."""
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise UserError("config.json names no model_type", where=where, fix="give a transformers checkpoint")
    for name in _QUANTISED:
        _require_unquantised(config.get(name), f"{where}: {name}")
    _require_classes(config, where)
    for prefix, part in _parts(config):
        for name, value in part.items():
            if name in _MOST:
                _require_size(name, value, f"{where}: {prefix}{name}")
            elif prefix not in ("", "text_config."):
                continue  # other parts may hold another program's settings, in its own words
            elif name in ("dtype", "torch_dtype") and value is not None and value not in STORED_DTYPES:
                raise UserError(
                    f"{shown(repr(value), 60)} is no dtype of weights",
                    where=f"{where}: {prefix}{name}",
                    fix=f"write the one the weights are stored in ({', '.join(STORED_DTYPES[:3])})",
                )


def finite(value: object) -> bool:
    """Whether every number inside a JSON value is one: no NaN, no infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return all(map(finite, inner))


def is_whole(value: object) -> TypeGuard[int]:
    """A whole number, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """A finite number that fits a float, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _require_unquantised(settings: object, where: str) -> None:
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    raise UserError(
        f"the weights are quantised ({shown(method or 'unknown method', 60)}) and cannot be changed",
        where=where,
        fix="give the unquantised checkpoint that they were made from",
    )


def _require_classes(config: Mapping[str, Any], where: str) -> None:
    """`architectures` is a list of class names or nothing, `auto_map` an object of names or nothing."""
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(_is_class(name) for name in names)):
        raise UserError(
            "`architectures` is no list of class names",
            where=f"{where}: architectures",
            fix='write for example ["LlamaForCausalLM"], or remove it',
        )
    auto_map = config.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, Mapping):
        raise UserError(
            "`auto_map` is no object of class names", where=f"{where}: auto_map", fix="remove it: it is never used"
        )


def _is_class(name: object) -> bool:
    return isinstance(name, str) and len(name) <= 200 and _CLASS_NAME.fullmatch(name) is not None


def _require_size(name: str, value: object, where: str) -> None:
    """A number has to be whole and within reason; whether anything else may stand there is up to the class."""
    if value is None or not isinstance(value, int | float) or isinstance(value, bool):
        return
    least = 0 if name in _MAY_BE_ZERO else 1
    if isinstance(value, float):
        raise UserError(f"`{name}` is {value:g}, not a whole number", where=where, fix="write a whole number")
    if not least <= value <= _MOST[name]:
        raise UserError(
            f"`{name}` is {shown(value, 40)}; a model has from {least} to {_MOST[name]:,}",
            where=where,
            fix="correct it, or download config.json again",
        )


def _parts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(prefix, fields) of the configuration and of the parts inside it; `transformers.js_config` is none of them."""
    yield prefix, config
    for name, value in config.items():
        if name.endswith("_config") and name.isidentifier() and isinstance(value, Mapping):
            yield from _parts(value, f"{prefix}{name}.")
