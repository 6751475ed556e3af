"""A GGUF file becomes a safetensors folder in the cache, once.

transformers reads the file; what it does not read (RoPE scaling, some architectures' head sizes, some tokenizers' way
of splitting text) would be lost without a word, so every such value of the file is compared with the result and a
difference is refused.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import machine_error
from retrofit.checkpoint.provenance import sha256
from retrofit.checkpoint.side_files import TOKENIZER, portable_tokenizer, write_tokenizer
from retrofit.checkpoint.staging import require_free_space
from retrofit.errors import UserError
from retrofit.escape import code_span, shown
from retrofit.files import read_json
from retrofit.model.cache import cache_dir, cached, sound
from retrofit.model.families import stock_class
from retrofit.model.gguf_file import (
    FLOATS,
    GgufFile,
    lost,
    read_header,
    require_gguf,
    require_same,
    require_same_tokens,
)
from retrofit.model.load import quiet, require_whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from retrofit.console import Progress

FORMAT = 2
"""Raised when the conversion changes, so that folders made by an older version are made again."""

QUANTISATION = "gguf_quantisation"
"""Key of a converted folder's card that names the GGML type, when the file was quantised."""

# tokenizer.ggml.pre values whose split is GPT-2's, and those that also take every digit alone (llama.cpp's regexes).
_SPLIT_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt")
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def convert(path: str | Path, *, weights: bool = True, progress: Progress | None = None) -> Path:
    """The folder in the cache for a GGUF file, made if needed; without `weights` only configuration and tokenizer.

    The folder's name holds the file's SHA-256; its README.md names license and base model, where the file does.
    Raises UserError as `read_header` does, and for a cache folder that cannot be written or has no room.
    """
    path = Path(path)
    require_gguf(path)
    stamp = _stamp(path)
    name = f"gguf-{sha256(path)[:24]}-{FORMAT}"
    whole, light = cache_dir() / name, cache_dir() / f"{name}-config"
    for folder in (whole,) if weights else (whole, light):
        if sound(folder, progress):
            return folder
    header = read_header(path)
    final = whole if weights else light
    if weights:
        require_free_space(final, header.parameters * (4 if header.dtype == "float32" else 2) + (64 << 20))
    if progress:
        file = shown(path.name)
        what = f"Converting {file} to safetensors" if weights else f"Reading configuration and tokenizer of {file}"
        progress.start(what, None, "tensors")

    def make(folder: Path) -> None:
        _write(header, weights, folder)
        if _stamp(path) != stamp:
            raise UserError("the file changed while it was read", where=shown(path), fix="type the command again")

    cached(final, make, progress=progress)
    if progress:
        progress.finish()
        kept = f"{file} is kept as {header.dtype} safetensors"
        progress.note(f"{kept if weights else f'configuration and tokenizer of {file} are kept'} in {final}")
    return final


def _stamp(path: Path) -> tuple[int, int, int]:
    """Which bytes a file holds, as far as the file system tells."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _write(header: GgufFile, weights: bool, out: Path) -> None:
    """Write the folder of a file. transformers reads it from a folder that holds nothing else: beside other files it
    would take their tokenizer, configuration or chat template."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    alone = out / "alone"
    alone.mkdir()
    (alone / "model.gguf").symlink_to(header.path.resolve())
    source: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    with quiet(), _reading(header):
        tokenizer = AutoTokenizer.from_pretrained(str(alone), **source)
        config = AutoConfig.from_pretrained(str(alone), **source)
        _tidy_config(header, config, tokenizer)
    require_same(header, config)
    _require_every_value(header, config)
    require_same_tokens(header, tokenizer)
    _split_text_as_stated(header, tokenizer)
    tokenizer.save_pretrained(out)
    _tidy_tokenizer_config(out)
    _write_card(header, out)
    if weights:
        _write_weights(header, config, alone, out)
    else:
        config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(out)
    shutil.rmtree(alone)


@contextmanager
def _reading(header: GgufFile) -> Iterator[None]:
    """What transformers raises for a file that it cannot read, as a UserError; failures of the machine stay."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        if machine_error(error) is not None:  # reported by the caller, who knows where was written
            raise
        raise UserError(
            f"transformers cannot read the GGUF file: {shown(error, 200)}",
            where=shown(header.path),
            fix="download it again, or give the safetensors checkpoint of this model",
        ) from error


def _require_every_value(header: GgufFile, config: PretrainedConfig) -> None:
    """Raises UserError when the model has more or fewer values than the file, which would be left out or made up."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet(), _reading(header):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        model.tie_weights()
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed != header.parameters:
        raise lost(header, f"every tensor (the file has {header.parameters:,} values, the model {needed:,})")


def _write_weights(header: GgufFile, config: PretrainedConfig, alone: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM  # its annotations do not know output_loading_info
    with quiet(), redirect_stderr(io.StringIO()):  # its bar for de-quantising has no other switch
        with _reading(header):
            loaded, info = loader.from_pretrained(
                str(alone),
                gguf_file="model.gguf",
                dtype=getattr(torch, header.dtype),
                local_files_only=True,
                output_loading_info=True,
            )
        require_whole(info, shown(header.path))
        for name, tensor in loaded.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"`{name}` holds values that are not finite", where=shown(header.path), fix="download it again"
                )
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
    config.vocab_size = header.vocabulary
    if config.model_type == "mistral":  # what transformers makes of a llama file named so; its default is a window
        config.sliding_window = header.get("attention.sliding_window")
    config.dtype = header.dtype
    config.architectures = [stock_class(config)]
    for field in ("_model_name_or_path", "unk_token_id"):
        if hasattr(config, field):
            delattr(config, field)


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
        raise lost(header, f"the way its tokenizer splits text (tokenizer.ggml.pre = {shown(stated, 60)})")


def _tidy_tokenizer_config(folder: Path) -> None:
    """Drop what only says how it was loaded, and name the class that every version of transformers knows."""
    stored = read_json(folder / TOKENIZER)
    kept = {key: value for key, value in stored.items() if key not in ("backend", "is_local", "local_files_only")}
    write_tokenizer(folder, portable_tokenizer(kept))


def _write_card(header: GgufFile, folder: Path) -> None:
    """README.md whose front matter carries the license and base model that the file states, and its quantisation."""
    url = str(header.metadata.get("general.base_model.0.repo_url") or "")
    stated = {
        "license": header.metadata.get("general.license"),
        "base_model": url.removeprefix("https://huggingface.co/")
        if url.startswith("https://huggingface.co/")
        else None,
        QUANTISATION: None if header.stored in FLOATS else header.stored,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in stated.items() if value]
    made_from = f"Made from {code_span(header.path.name)}."
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", made_from, ""]), encoding="utf-8")


def _shortest(value: float) -> float:
    """The shortest decimal that is the same number in float32: 9.999999747378752e-06 was written as 1e-5."""
    import numpy as np

    return float(str(np.float32(value)))
