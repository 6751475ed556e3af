"""Reads a GGUF file with llama.cpp: what its header says, how it splits texts, and the losses and most probable tokens
of passages.

Run in the environment of `xllamacpp`, whose extension module exports the functions of llama.h. They are called through
that C interface; of structures that are given by value only the first fields are set, which `_defaults` looks at first.
The KV cache, attention and products are those that llama.cpp takes by default.
"""

import ctypes as c
import importlib.util
from collections.abc import Iterator
from importlib import metadata
from typing import Any

BATCH = 256
MAX_VALUE = 1 << 20  # bytes of a metadata value, as long as a chat template
_DEFAULTS = (512, 2048, 512)  # of llama_context_params: n_ctx, n_batch, n_ubatch


class _Model(c.Structure):
    """`llama_model_params`, which stay as they are by default."""

    _fields_ = (("all", c.c_uint64 * 128),)


class _Context(c.Structure):
    """`llama_context_params`: the first fields, and room for whatever follows."""

    _fields_ = (("n_ctx", c.c_uint32), ("n_batch", c.c_uint32), ("n_ubatch", c.c_uint32), ("rest", c.c_uint32 * 255))


class _Batch(c.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_SIGNATURES = {
    "llama_log_set": (None, [_LOG, c.c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Model, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, _Model]),
    "llama_model_n_params": (c.c_uint64, [c.c_void_p]),
    "llama_model_meta_count": (c.c_int32, [c.c_void_p]),
    "llama_model_meta_key_by_index": (c.c_int32, [c.c_void_p, c.c_int32, c.c_char_p, c.c_size_t]),
    "llama_model_meta_val_str_by_index": (c.c_int32, [c.c_void_p, c.c_int32, c.c_char_p, c.c_size_t]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_get_text": (c.c_char_p, [c.c_void_p, c.c_int32]),
    "llama_tokenize": (
        c.c_int32,
        [c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool],
    ),
    "llama_context_default_params": (_Context, []),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, _Context]),
    "llama_n_ctx": (c.c_uint32, [c.c_void_p]),
    "llama_set_n_threads": (None, [c.c_void_p, c.c_int32, c.c_int32]),
    "llama_batch_init": (_Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_decode": (c.c_int32, [c.c_void_p, _Batch]),
    "llama_get_logits_ith": (c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
    "llama_free": (None, [c.c_void_p]),
}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Read `job["file"]`: its metadata, the texts of its tokens, `job["texts"]` as its tokenizer splits them, and the
    losses of `job["passages"]` (ids, first: the first position whose loss counts), with `threads`. losses, greedy: a
    list for each passage, of the tokens after `first` and of the most probable token in the place of each."""
    library = _library()
    messages: list[bytes] = []
    quiet = _LOG(lambda level, text, data: messages.append(text) if level >= 4 else None)
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(job["file"].encode(), library.llama_model_default_params())
    if not model:
        words = " ".join(b"".join(messages).decode(errors="replace").split())
        return {"version": _version(), "error": words[-600:] or "no reason is given"}
    vocabulary = library.llama_model_get_vocab(model)
    size = library.llama_vocab_n_tokens(vocabulary)
    scored = [_scored(library, model, size, one, job["threads"]) for one in job["passages"]]
    return {
        "version": _version(),
        "metadata": dict(_metadata(library, model)),
        "parameters": int(library.llama_model_n_params(model)),
        "vocabulary": [
            library.llama_vocab_get_text(vocabulary, i).decode("utf-8", errors="replace") for i in range(size)
        ],
        "texts": [_tokens(library, vocabulary, text) for text in job["texts"]],
        "losses": [losses for losses, _ in scored],
        "greedy": [greedy for _, greedy in scored],
    }


def _version() -> str:
    return metadata.version("xllamacpp")


def _library() -> Any:
    found = importlib.util.find_spec("xllamacpp.xllamacpp")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("no module named 'xllamacpp'")
    library = c.CDLL(found.origin)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _metadata(library: Any, model: int) -> Iterator[tuple[str, str]]:
    """Every key with its value as text; arrays are left out."""
    buffer = c.create_string_buffer(MAX_VALUE)
    for index in range(library.llama_model_meta_count(model)):
        library.llama_model_meta_key_by_index(model, index, buffer, MAX_VALUE)
        key = buffer.value.decode("utf-8", errors="replace")
        library.llama_model_meta_val_str_by_index(model, index, buffer, MAX_VALUE)
        value = buffer.value.decode("utf-8", errors="replace")
        if not key.startswith("tokenizer.ggml.") or not value.startswith("["):
            yield key, value


def _tokens(library: Any, vocabulary: int, text: str) -> list[int]:
    """The ids of a text; special tokens in it are read as such, and none is put in front."""
    data = text.encode()
    ids = (c.c_int32 * (len(data) + 8))()
    count = library.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, True)
    return list(ids[: max(count, 0)])


def _scored(
    library: Any, model: int, size: int, passage: dict[str, Any], threads: int
) -> tuple[list[float], list[int]]:
    """(-log p of every token after position `first`, the most probable token there), from logits in float32."""
    import numpy as np

    ids, first = passage["ids"], passage["first"]
    settings = library.llama_context_default_params()
    if (settings.n_ctx, settings.n_batch, settings.n_ubatch) != _DEFAULTS:
        raise RuntimeError("this release of llama.cpp has other parameters of a context than those known here")
    settings.n_ctx, settings.n_batch, settings.n_ubatch = len(ids), BATCH, BATCH
    context = library.llama_init_from_model(model, settings)
    if not context or library.llama_n_ctx(context) < len(ids):
        raise MemoryError(f"llama.cpp makes no context of {len(ids)} tokens")
    library.llama_set_n_threads(context, threads, threads)
    batch, losses, greedy = library.llama_batch_init(BATCH, 0, 1), [], []
    for start in range(0, len(ids) - 1, BATCH):
        part = ids[start : start + BATCH]
        wanted = [first <= start + i < len(ids) - 1 for i in range(len(part))]
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = wanted[i]
        if library.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp could not read the tokens from {start} on")
        for i in (i for i, one in enumerate(wanted) if one):
            row = np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), (size,)).astype(np.float64)
            highest = row.max()
            losses.append(float(highest + np.log(np.exp(row - highest).sum()) - row[ids[start + i + 1]]))
            greedy.append(int(row.argmax()))
    library.llama_free(context)
    return losses, greedy
