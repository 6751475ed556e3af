"""A GGUF file becomes a safetensors folder in the cache, once.

transformers reads the file; what it does not read (RoPE scaling, some architectures' head sizes, some tokenizers' way
of splitting text) would be lost without a word, so every such value of the file is compared with the result and a
difference is refused.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.place import require_free_space, require_writable, staged
from retrofit.checkpoint.provenance import sha256
from retrofit.errors import UserError
from retrofit.model.families import describe, stock_class
from retrofit.model.load import quiet, require_whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from retrofit.console import Progress

FORMAT = 2
"""Raised when the conversion changes, so that folders made by an older version are made again."""

QUANTISATION = "gguf_quantisation"
"""Key of a converted folder's card that names the GGML type, when the file was quantised."""

READABLE = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2")
"""GGUF architectures that transformers reads and that belong to a known family."""

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# tokenizer.ggml.pre values whose split is GPT-2's, and those that also take every digit alone (llama.cpp's regexes).
_SPLIT_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt")
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


@dataclass(frozen=True)
class GgufFile:
    """What the header of a GGUF file says. tensors: name -> (GGML type, number of values)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[str, int]]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata.get("general.architecture"))

    @property
    def stored(self) -> str:
        """The GGML type of most values, for example "Q4_1" or "BF16"."""
        sizes: dict[str, int] = {}
        for kind, values in self.tensors.values():
            sizes[kind] = sizes.get(kind, 0) + values
        return max(sizes, key=lambda kind: sizes[kind])

    @property
    def dtype(self) -> str:
        """The dtype it is stored in after conversion: its own floating-point type, bfloat16 when it is quantised."""
        return _FLOATS.get(self.stored, "bfloat16")

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(values for _, values in self.tensors.values())

    def get(self, key: str) -> Any:
        """A value of the architecture's own section, for example "rope.freq_base"."""
        return self.metadata.get(f"{self.architecture}.{key}")


def cache_dir() -> Path:
    """RETROFIT_CACHE, else `retrofit` in the user's cache folder."""
    if explicit := os.environ.get("RETROFIT_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "retrofit"


def require_gguf(path: Path) -> None:
    """Raises UserError when there is no such file or it does not start as a GGUF file does."""
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), fix="check the path")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError("the file is not a GGUF file", where=str(path), fix="check the download")


def read_header(path: str | Path) -> GgufFile:
    """Read and check a file's header.

    Raises UserError: no such file, not a GGUF, truncated or damaged, an architecture that cannot be read, RoPE scaling
    (which transformers does not take over), the `gguf` package missing.
    """
    path = Path(path)
    require_gguf(path)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the package `gguf`",
            where=str(path),
            fix='pip install "attention-retrofit[gguf]"',
        ) from error
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not _is_vocabulary(key, field)}
        tensors = {t.name: (t.tensor_type.name, int(t.n_elements)) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise UserError("the GGUF file is truncated or damaged", where=str(path), fix="download it again") from error
    found = GgufFile(path, metadata, tensors)
    if found.architecture not in READABLE or found.get("expert_count"):
        raise UserError(
            f"transformers or this program cannot read the GGUF architecture `{found.architecture}`"
            + (" with experts" if found.get("expert_count") else ""),
            where=str(path),
            fix=f"give the safetensors checkpoint, or a GGUF of: {', '.join(READABLE)}",
        )
    if not tensors:
        raise UserError("the GGUF file holds no tensors (a vocabulary only)", where=str(path), fix="give a whole model")
    scaling = found.get("rope.scaling.type")
    if scaling not in (None, "none") or any(name.startswith("rope_") for name in tensors):
        raise _lost(found, f"RoPE scaling ({scaling or 'frequency factors'})")
    return found


def convert(path: str | Path, *, weights: bool = True, progress: Progress | None = None) -> Path:
    """The folder in the cache for a GGUF file, made if needed; without `weights` only configuration and tokenizer.

    The folder's name holds the file's SHA-256; its README.md names licence and base model, where the file does.
    Raises UserError as `read_header` does, and for a cache folder that cannot be written or has no room.
    """
    path = Path(path)
    require_gguf(path)
    name = f"gguf-{sha256(path)[:24]}-{FORMAT}"
    whole, light = cache_dir() / name, cache_dir() / f"{name}-config"
    for folder in (whole,) if weights else (whole, light):
        if folder.is_dir():
            return folder
    header = read_header(path)
    final = whole if weights else light
    require_writable(final)
    if weights:
        require_free_space(final, header.parameters * (4 if header.dtype == "float32" else 2) + (64 << 20))
    if progress:
        progress.start(f"Converting {path.name} to safetensors", None, "tensors")
    with folder_lock(final), staged(final, overwrite=True) as partial:
        _write(header, partial, weights)
    if progress:
        progress.finish()
        progress.note(f"{path.name} is kept as {header.dtype} safetensors in {final}")
    return final


def _write(header: GgufFile, out: Path, weights: bool) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {"gguf_file": header.path.name, "local_files_only": True}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(header.path.parent), **source)
        config = AutoConfig.from_pretrained(str(header.path.parent), **source)
    _tidy_config(header, config, tokenizer)
    require_same(header, config)
    _split_text_as_stated(header, tokenizer)
    tokenizer.save_pretrained(out)
    _tidy_tokenizer_config(out)
    _write_card(header, out)
    if weights:
        _write_weights(header, config, out)
    else:
        config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(out)


def _write_weights(header: GgufFile, config: PretrainedConfig, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM  # its annotations do not know output_loading_info
    with quiet(), redirect_stderr(io.StringIO()):  # its bar for de-quantising has no other switch
        loaded, info = loader.from_pretrained(
            str(header.path.parent),
            gguf_file=header.path.name,
            dtype=getattr(torch, header.dtype),
            local_files_only=True,
            output_loading_info=True,
        )
        require_whole(info, str(header.path))
        # The loaded model is marked as quantised and refuses to be saved: its values go into a plain one.
        with torch.device("meta"):
            plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict(), assign=True)
        plain.tie_weights()
        plain.to(getattr(torch, header.dtype)).save_pretrained(out)


def _tidy_config(header: GgufFile, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """What a safetensors checkpoint of this model would say: exact short numbers, ids, dtype, class name."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for field in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon"):
        if isinstance(getattr(config, field, None), float):
            setattr(config, field, _shortest(getattr(config, field)))
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, field, getattr(tokenizer, field))
    config.vocab_size = header.metadata.get(f"{header.architecture}.vocab_size", len(tokenizer))
    config.dtype = header.dtype
    config.architectures = [stock_class(config)]
    for field in ("_model_name_or_path", "unk_token_id"):
        if hasattr(config, field):
            delattr(config, field)


def require_same(header: GgufFile, config: Any) -> None:
    """Raises UserError when a value of the file did not reach the configuration."""
    spec = describe(config)
    layer = next((each for each in spec.layers if each.window is None), spec.layers[0])
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
    }
    for key, value in expected.items():
        stated, got = header.get(key), value()
        if stated is None or (
            key == "attention.sliding_window" and (not stated or stated >= config.max_position_embeddings)
        ):
            continue
        same = (
            isinstance(got, int | float) and isinstance(stated, int | float) and abs(got - stated) <= 1e-5 * abs(stated)
        )
        if not same:
            raise _lost(header, f"{key} = {stated} (it reads {got})")


def _split_text_as_stated(header: GgufFile, tokenizer: Any) -> None:
    """Give a byte-level tokenizer the pre-tokenizer that the file names. Raises UserError for one we do not know."""
    from tokenizers import pre_tokenizers

    stated = header.metadata.get("tokenizer.ggml.pre")
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or stated in _SPLIT_GPT2:
        return
    if stated in _SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        raise _lost(header, f"the way its tokenizer splits text (tokenizer.ggml.pre = {stated})")


def _tidy_tokenizer_config(folder: Path) -> None:
    """Drop what only says how it was loaded, and name the class that every version of transformers knows."""
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in stored.items() if key not in ("backend", "is_local", "local_files_only")}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_card(header: GgufFile, folder: Path) -> None:
    """README.md whose front matter carries the licence and base model that the file states, and its quantisation."""
    url = str(header.metadata.get("general.base_model.0.repo_url") or "")
    stated = {
        "license": header.metadata.get("general.license"),
        "base_model": url.removeprefix("https://huggingface.co/")
        if url.startswith("https://huggingface.co/")
        else None,
        QUANTISATION: None if header.stored in _FLOATS else header.stored,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in stated.items() if value]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", f"Made from {header.path.name}.", ""]), "utf-8")


def _lost(header: GgufFile, value: str) -> UserError:
    return UserError(
        f"transformers does not take over {value} from a GGUF file of architecture `{header.architecture}`",
        where=str(header.path),
        fix="give the safetensors checkpoint of this model",
    )


def _is_vocabulary(key: str, field: Any) -> bool:
    """Long arrays that nothing here reads: tokens, scores, merges."""
    return key.startswith("tokenizer.") and bool(field.types) and field.types[0].name == "ARRAY"


def _shortest(value: float) -> float:
    """The shortest decimal that is the same number in float32: 9.999999747378752e-06 was written as 1e-5."""
    import numpy as np

    return float(str(np.float32(value)))
