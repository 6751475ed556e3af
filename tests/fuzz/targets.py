"""The parsers, each as a function of bytes. A `UserError` is a right answer; whatever else is raised is a fault."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrofit.errors import UserError
from tests.fuzz.edits import Choices, edited

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}

ROPE_KEYS = (
    "type",
    "rope_type",
    "factor",
    "rope_theta",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "mrope_section",
)
CONFIG_KEYS = (
    *("rope_scaling", "rope_parameters", "torch_dtype", "dtype", "auto_map", "quantization_config", "text_config"),
    *("attn_implementation", "_attn_implementation", "layer_types", "sliding_window", "head_dim", "rope_theta"),
    *("partial_rotary_factor", "num_local_experts", "architectures", "id2label", "original_max_position_embeddings"),
    *("attention_bias", "use_cache", "tie_word_embeddings", "model_type", "hidden_act", *ROPE_KEYS),
)
TOKENIZER_KEYS = (
    *("auto_map", "tokenizer_class", "bos_token", "chat_template", "model_max_length", "extra_special_tokens"),
    *("added_tokens_decoder", "padding_side", "backend", "add_prefix_space"),
)
_FAMILIES = ("llama", "gemma3_text", "phi3", "qwen3", "mixtral", "gpt_bigcode", "gemma2", "qwen2", "mistral")


def target(function: Target) -> Target:
    """Register a parser under its name; a UserError ends it well."""

    @functools.wraps(function)
    def total(data: bytes) -> None:
        try:
            function(data)
        except UserError as error:
            assert str(error)

    TARGETS[function.__name__] = total
    return total


@functools.cache
def place() -> Path:
    """A folder for the files of one process, in memory where there is such a place."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _written(name: str, data: bytes) -> Path:
    path = place() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@functools.cache
def _model() -> Path:
    from tests.tiny import save_tiny

    return save_tiny(place() / "model", "llama", chat_template=True)


@functools.cache
def _configs() -> tuple[dict[str, Any], ...]:
    from tests.tiny import tiny_config

    return tuple(json.loads(tiny_config(family).to_json_string(use_diff=False)) for family in _FAMILIES)


@target
def recipe(data: bytes) -> None:
    """A recipe file: any bytes, or a whole recipe with odd values; also through `--set`."""
    from retrofit.recipe.load import dump_recipe, load_recipe
    from retrofit.recipe.schema import Recipe

    choices = Choices(data)
    how = choices.below(4)
    if how == 0:
        load_recipe(_written("recipe.yaml", choices.rest()))
    elif how == 1:
        load_recipe("gqa", [choices.rest().decode("utf-8", "replace")])
    elif how == 2:
        load_recipe(
            "quickstart", [f"{choices.of(list(Recipe.model_fields))}={choices.rest().decode('utf-8', 'replace')}"]
        )
    else:
        import yaml

        values = yaml.safe_load(dump_recipe(load_recipe("quickstart")))
        load_recipe(_written("recipe.yaml", _json(edited(values, choices))))


@target
def config(data: bytes) -> None:
    """config.json: any bytes, or one of a family with odd values."""
    from retrofit.model.inspect import inspect

    choices = Choices(data)
    raw = choices.below(5) == 0
    written = choices.rest() if raw else _json(edited(choices.of(_configs()), choices, CONFIG_KEYS))
    inspect(_written("config/config.json", written).parent)


@target
def safetensors_header(data: bytes) -> None:
    """One safetensors file: any bytes, or a whole one with an odd header."""
    from retrofit.checkpoint.header import read_header

    choices = Choices(data)
    if choices.below(4) == 0:
        written = choices.rest()
    else:
        whole = (_model() / "model.safetensors").read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        few = dict(list(header.items())[:5])
        changed = _json(edited(few, choices, ("__metadata__", "a", "\ud800")))
        end = max(value["data_offsets"][1] for value in few.values() if "data_offsets" in value)
        written = struct.pack("<Q", len(changed)) + changed + whole[8 + length : 8 + length + end]
    read_header(_written("header/model.safetensors", written))


@target
def safetensors_index(data: bytes) -> None:
    """The index of a checkpoint in two shards: any bytes, or a whole one with odd values."""
    from retrofit.checkpoint.read import Checkpoint

    choices = Choices(data)
    folder = _sharded()
    index = json.loads((folder / "whole.json").read_text())
    written = (
        choices.rest() if choices.below(4) == 0 else _json(edited(index, choices, ("a", "weight_map", "metadata")))
    )
    (folder / "model.safetensors.index.json").write_bytes(written)
    Checkpoint.open(folder)


@functools.cache
def _sharded() -> Path:
    from tests.tiny import save_tiny

    folder = save_tiny(place() / "sharded", "llama", max_shard_size="100KB")
    (folder / "model.safetensors.index.json").rename(folder / "whole.json")
    return folder


@target
def gguf_header(data: bytes) -> None:
    """The header of a GGUF file: any bytes, or a whole one with bytes exchanged or cut."""
    from retrofit.model.gguf import read_header

    choices = Choices(data)
    if choices.below(4) == 0:
        written = b"GGUF" + choices.rest()
    else:
        whole = bytearray(_gguf())
        for _ in range(1 + choices.below(6)):
            at = choices.below(len(whole))
            piece = choices.of((b"\xff" * 8, b"\0" * 8, b"\x01", b"\x7f", b"\x09\0\0\0", b"\x08\0\0\0", b"\0\0\0\x80"))
            whole[at : at + len(piece)] = piece
        if choices.below(3) == 0:
            del whole[choices.below(len(whole)) :]
        written = bytes(whole)
    read_header(_written("model.gguf", written))


@functools.cache
def _gguf() -> bytes:
    """A file of the llama architecture with a vocabulary, some typed values and three tensors."""
    import numpy as np
    from gguf import GGUFWriter

    path = place() / "whole.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_head_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<s>"])
    writer.add_token_types([1, 1, 3])
    writer.add_array("llama.odd", [1.5, 2.5])
    writer.add_bool("llama.flag", True)
    for name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"):
        writer.add_tensor(name, np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


TURNS = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because", "tool_calls": [{}]}]
TEXT_ROWS: tuple[dict[str, Any], ...] = (
    {"text": "some words", "id": 1},
    {"messages": TURNS, "tools": [{"function": {"name": "f"}}]},
    {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "because"}]},
    {"prompt": "why", "completion": "because", "tools": "[]"},
)
TURN_KEYS = ("text", "role", "content", "from", "value", "tools", "messages", "assistant", "tool_calls")


@target
def text_rows(data: bytes) -> None:
    """A text source: a file of any suffix with any bytes, or JSONL of odd rows of text or of dialogues."""
    from retrofit.data.sources import rows
    from retrofit.recipe.schema import TextSource

    choices = Choices(data)
    suffix = choices.of((".jsonl", ".txt", ".ndjson", ".jsonl.gz", ".parquet", ".JSONL", ""))
    if choices.below(3) == 0 and suffix == ".jsonl":
        row = choices.of(TEXT_ROWS)
        written = b"\n".join(_json(edited(row, choices, TURN_KEYS)) for _ in range(3))
    else:
        written = choices.rest()
    for path in place().glob("text.*"):
        path.unlink()
    source = TextSource(source=str(_written(f"text{suffix}", written)))
    for _ in rows(source)():
        pass


@target
def tokenizer(data: bytes) -> None:
    """Tokenizer side files: any bytes, or whole ones with odd values."""
    from retrofit.model.load import load_tokenizer

    choices = Choices(data)
    folder = place() / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_model(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    name = choices.of(("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"))
    path = folder / name
    if choices.below(4) == 0 or not path.is_file():
        path.write_bytes(choices.rest())
    else:
        path.write_bytes(_json(edited(json.loads(path.read_text()), choices, TOKENIZER_KEYS)))
    load_tokenizer(folder)("some words")


@target
def card(data: bytes) -> None:
    """README.md and the license file of a model folder."""
    from retrofit.model.license import base_model_of, license_of

    choices = Choices(data)
    folder = place() / "card"
    if choices.below(3) == 0:
        _written("card/LICENSE", choices.rest())
        _written("card/README.md", b"no front matter")
    else:
        _written("card/README.md", b"---\n" + choices.rest() + b"\n---\nwords\n")
    license_of(folder)
    base_model_of(folder)
