"""What a GGUF file says of its model, and the refusal of what transformers would read as another model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.files import require_regular
from retrofit.install import install_command
from retrofit.model import gguf_header
from retrofit.model.families import describe
from retrofit.model.gguf_header import StoredTensor

READABLE = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2")
"""GGUF architectures that transformers reads and that belong to a known family."""

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_OTHER_SIZES = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size")
_LARGEST = 2**31 - 1
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_PER_TOKEN: dict[str, type] = {"tokenizer.ggml.token_type": int, "tokenizer.ggml.scores": float}
_TYPES: dict[str, type] = {
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
}
_LONGEST_TOKEN = 1024
_LARGEST_TOKEN_TYPE = 6  # a byte; 0 is undefined
_BLOCK = re.compile(r"blk\.([0-9]+)\.")
_PART = re.compile(r"-[0-9]{5}(-of-[0-9]{5}\.gguf)\Z", re.IGNORECASE)


@dataclass(frozen=True)
class GgufFile:
    """What the header of a GGUF file says. metadata: by key. tensors: by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata.get("general.architecture"))

    @property
    def stored(self) -> str:
        """The GGML type of most values, for example "Q4_1" or "BF16"."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.values
        return max(sizes, key=lambda kind: sizes[kind])

    @property
    def dtype(self) -> str:
        """The dtype it is stored in after conversion: its own floating-point type, bfloat16 when it is quantised."""
        return FLOATS.get(self.stored, "bfloat16")

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(tensor.values for tensor in self.tensors.values())

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.tensors["token_embd.weight"].shape[-1]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own section, for example "rope.freq_base"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF file does, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def require_gguf(path: Path) -> None:
    """Raises UserError when there is no such file or it does not begin as a GGUF file does."""
    require_regular(path)
    if not is_gguf(path):
        if _PART.search(path.name):
            raise _join_first(path)
        raise UserError("the file is not a GGUF file", where=shown(path), fix="check the download")


def read_header(path: str | Path) -> GgufFile:
    """Read and check a file's header.

    Raises UserError: no such file, not a GGUF, a part of one, truncated or damaged, an architecture that cannot be
    read, sizes that contradict each other, RoPE scaling (which transformers does not take over), the `gguf` package
    missing.
    """
    path = Path(path)
    require_gguf(path)
    try:
        header = gguf_header.read(path, _kinds(path))
    except UserError:
        if _PART.search(path.name):
            raise _join_first(path) from None
        raise
    found = GgufFile(path, header.metadata, header.tensors)
    if found.metadata.get("split.count", 1) not in (0, 1):
        raise _join_first(path)
    stated = found.metadata.get("general.type", "model")
    if stated != "model":
        raise UserError(
            f"the GGUF file holds no language model ({shown(stated, 40)})",
            where=shown(path),
            fix="give the file of the model itself",
        )
    if found.architecture not in READABLE or found.get("expert_count"):
        raise UserError(
            f"transformers or this program cannot read the GGUF architecture `{shown(found.architecture, 60)}`"
            + (" with experts" if found.get("expert_count") else ""),
            where=shown(path),
            fix=f"give the safetensors checkpoint, or a GGUF of: {', '.join(READABLE)}",
        )
    if not found.tensors:
        raise UserError(
            "the GGUF file holds no tensors (a vocabulary only)", where=shown(path), fix="give a whole model"
        )
    scaling = found.get("rope.scaling.type")
    if scaling not in (None, "none") or any(name.startswith("rope_") for name in found.tensors):
        raise lost(found, f"RoPE scaling ({shown(scaling or 'frequency factors', 60)})")
    _require_sizes(found)
    _require_vocabulary(found)
    return found


def header_of(path: Path) -> gguf_header.Header:
    """What the header of a GGUF file of any architecture says. Raises UserError for what is no whole file."""
    return gguf_header.read(path, _kinds(path))


def _kinds(path: Path) -> dict[int, tuple[str, int, int]]:
    """{number of a GGML type: its name, values of a block, bytes of a block}."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the package `gguf`",
            where=shown(path),
            fix=install_command(extra="gguf"),
        ) from error
    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _join_first(path: Path) -> UserError:
    first = _PART.sub(r"-00001\1", path.name)
    return UserError(
        "the file is one part of a split GGUF, and parts are not read",
        where=shown(path),
        fix=f"join them with llama.cpp and give the result: llama-gguf-split --merge {shell_word(first)} whole.gguf",
    )


def _require_sizes(found: GgufFile) -> None:
    """Raises UserError for sizes that are missing, impossible, or not those of the tensors."""
    for key in (*_SIZES, *_OTHER_SIZES):
        value = found.get(key)
        if isinstance(value, list):
            raise lost(found, f"{key}, a list of one value per layer")
        if (value is not None or key in _SIZES) and (type(value) is not int or not 1 <= value <= _LARGEST):
            raise _impossible(found, key)
    embedding = found.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise _contradiction(found, "it holds no embedding (token_embd.weight)")
    if embedding.shape[0] != found.get("embedding_length"):
        raise _contradiction(found, f"embedding_length is {found.get('embedding_length')}", embedding.shape)
    if found.get("vocab_size", found.vocabulary) != found.vocabulary:
        raise _contradiction(found, f"vocab_size is {found.get('vocab_size')}", embedding.shape)
    blocks = {match[1] for match in map(_BLOCK.match, found.tensors) if match}
    count = found.get("block_count")
    if len(blocks) != count or not all(str(index) in blocks for index in range(len(blocks))):
        raise _contradiction(found, f"block_count is {count:,}, and it holds {len(blocks):,} blocks")
    heads, kv_heads = found.get("attention.head_count"), found.get("attention.head_count_kv")
    if heads % (kv_heads or heads):
        raise _contradiction(found, f"{heads:,} query heads cannot share {kv_heads:,} KV heads")
    if found.get("attention.key_length") is None and found.get("embedding_length") % heads:
        raise _contradiction(found, f"embedding_length is no multiple of {heads:,} heads")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base"):
        value = found.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            raise _impossible(found, key)
    if all(found.get(f"attention.layer_norm_{key}") is None for key in ("rms_epsilon", "epsilon")):
        raise _impossible(found, "attention.layer_norm_rms_epsilon")


def _require_vocabulary(found: GgufFile) -> None:
    """Raises UserError for a vocabulary that no tokenizer could be made of, or another one than is meant."""
    tokens: Any = found.metadata.get(_TOKENS)
    if not _list_of(str, tokens):
        raise _contradiction(found, "it holds no vocabulary (tokenizer.ggml.tokens)")
    if len(tokens) > found.vocabulary:
        raise _contradiction(found, f"it holds {len(tokens):,} tokens, and an embedding for {found.vocabulary:,}")
    if max(map(len, tokens)) > _LONGEST_TOKEN:
        raise _contradiction(found, f"a token has more than {_LONGEST_TOKEN:,} characters")
    for key, kind in _PER_TOKEN.items():
        values = found.metadata.get(key, [kind()] * len(tokens))
        if not _list_of(kind, values) or len(values) != len(tokens):
            raise _contradiction(found, f"{key} has no value for every token")
        unknown = next((one for one in values if kind is int and not 0 <= one <= _LARGEST_TOKEN_TYPE), None)
        if unknown is not None:
            raise _contradiction(found, f"a token is of type {unknown}, which there is not")
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = found.metadata.get(key, 0)
        if type(value) is not int or not 0 <= value < len(tokens):
            raise _contradiction(found, f"{key} is {shown(value, 40)}, and there are {len(tokens):,} tokens")
    for key, kind in _TYPES.items():
        if not isinstance(found.metadata.get(key, kind()), kind):
            raise _contradiction(found, f"{key} is of another type than it must be")
    merges = found.metadata.get(_MERGES, [])
    if merges and not _list_of(str, merges):
        raise _contradiction(found, f"{_MERGES} is no list of text")
    wrong = _wrong_merge(merges, tokens)
    if wrong is not None:
        raise _contradiction(found, f"the merge `{shown(wrong, 60)}` does not join two tokens to a third")


def _wrong_merge(merges: list[str], tokens: list[str]) -> str | None:
    """The first merge whose parts or result are no tokens. A byte-level vocabulary may spell a token as plain text."""
    known = set(tokens)
    wrong = next((merge for merge in merges if not _joins(merge, known)), None)
    if wrong is None:
        return None
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    known |= {"".join(spelling[byte] for byte in token.encode()) for token in tokens}
    return next((merge for merge in merges if not _joins(merge, known)), None)


def _joins(merge: str, known: set[str]) -> bool:
    parts = merge.split(" ")
    return len(parts) == 2 and parts[0] in known and parts[1] in known and "".join(parts) in known


def _list_of(kind: type, value: Any) -> bool:
    """Whether a value is a list of it that is not empty; a list of a GGUF file has one type."""
    return isinstance(value, list) and bool(value) and type(value[0]) is kind


def _impossible(found: GgufFile, key: str) -> UserError:
    value = found.get(key)
    problem = "is missing" if value is None else f"is {shown(value, 40)}, which no model can have"
    return UserError(
        f"the GGUF file is damaged or was written wrongly: {found.architecture}.{key} {problem}",
        where=shown(found.path),
        fix="download it again, or give the safetensors checkpoint of this model",
    )


def _contradiction(found: GgufFile, what: str, shape: tuple[int, ...] | None = None) -> UserError:
    """The same for values that do not fit together. shape: the embedding's, which they do not fit."""
    other = f", and its embedding has the shape {shape}" if shape else ""
    return UserError(
        f"the GGUF file is damaged or was written wrongly: {what}{other}",
        where=shown(found.path),
        fix="download it again, or give the safetensors checkpoint of this model",
    )


def require_same(header: GgufFile, config: Any) -> None:
    """Raises UserError when a value of the file did not reach the configuration."""
    spec = describe(config)
    layer = next((each for each in spec.layers if each.window is None), spec.layers[0])
    heads = header.get("attention.head_count")
    assumed = {  # by llama.cpp, where the file says nothing
        "attention.head_count_kv": heads,
        "attention.key_length": header.get("embedding_length") // heads,
        "rope.freq_base": 10_000.0,
    }
    sliding = next((each.window for each in spec.layers if each.window), None)
    expected: dict[str, Callable[[], Any]] = {
        "context_length": lambda: spec.max_position_embeddings,
        "embedding_length": lambda: spec.hidden_size,
        "block_count": lambda: len(spec.layers),
        "feed_forward_length": lambda: config.intermediate_size,
        "attention.head_count": lambda: layer.query_heads,
        "attention.head_count_kv": lambda: layer.kv_heads,
        "attention.key_length": lambda: layer.head_dim,
        "attention.value_length": lambda: layer.head_dim,
        "attention.sliding_window": lambda: sliding,
        "attention.scale": lambda: layer.scaling,
        "attn_logit_softcapping": lambda: layer.softcap,
        "final_logit_softcapping": lambda: getattr(config, "final_logit_softcapping", None),
        "rope.freq_base": lambda: layer.rope.theta if layer.rope else None,
        "rope.dimension_count": lambda: layer.rope.rotary_dim if layer.rope else None,
        "attention.layer_norm_rms_epsilon": lambda: getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": lambda: getattr(
            config, "layer_norm_eps", getattr(config, "norm_epsilon", None)
        ),
    }
    for key, value in expected.items():
        stated, got = header.get(key, assumed.get(key)), value()
        numbers = isinstance(stated, int | float) and isinstance(got, int | float)
        if stated is None or (key == "attention.sliding_window" and _everything(stated, config)):
            continue
        if not numbers or not abs(got - stated) <= 1e-5 * abs(stated):
            raise lost(header, f"{key} = {shown(stated, 40)} (it reads {got})")
    unstated = not header.get("attention.sliding_window") and header.architecture != "gemma2"
    if sliding and unstated:
        raise lost(header, f"attention without a window (it reads a window of {sliding})")


def require_same_tokens(header: GgufFile, tokenizer: Any) -> None:
    """Raises UserError when a special token of the file is another one for the tokenizer."""
    for name, attribute in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        key = f"tokenizer.ggml.{name}_token_id"
        stated, got = header.metadata.get(key), getattr(tokenizer, f"{attribute}_token_id")
        if stated is not None and got != stated:
            raise lost(header, f"{key} = {stated} (it reads {got})")


def _everything(window: Any, config: Any) -> bool:
    """Whether a window is none, or as long as the longest context."""
    return isinstance(window, int) and (not window or window >= config.max_position_embeddings)


def lost(header: GgufFile, value: str) -> UserError:
    """The refusal of a file of which transformers would leave something out."""
    return UserError(
        f"transformers does not take over {value} from a GGUF file of architecture `{header.architecture}`",
        where=shown(header.path),
        fix="give the safetensors checkpoint of this model",
    )
