"""Failures of the machine are told in one message; what is none of them stays what it is."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from retrofit.checkpoint.full import writing
from retrofit.errors import UserError

WORDS = {
    "disk is full": [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("4096 requested and 0 written"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
    ],
    "quota is full": [OSError(errno.EDQUOT, "Disk quota exceeded")],
    "larger than this process may write": [OSError(errno.EFBIG, "File too large")],
    "read-only": [OSError(errno.EROFS, "Read-only file system", "/somewhere")],
    "no permission": [PermissionError(errno.EACCES, "Permission denied", "/somewhere")],
    "too many open files": [OSError(errno.EMFILE, "Too many open files")],
    "not enough memory": [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    "temporary files": [FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")],
}


@pytest.mark.parametrize(("words", "error"), [(words, error) for words, errors in WORDS.items() for error in errors])
def test_a_failure_of_the_machine_is_one_message(words: str, error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught, writing(tmp_path / "out"):
        raise error
    assert caught.value.fix


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("shapes"), ValueError()]
)
def test_other_errors_stay(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error


def test_a_full_disk_tells_where_how_much_and_what_may_go(tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "stream").write_bytes(b"x" * 2048)
    with pytest.raises(UserError) as caught, writing(tmp_path / "out", needed=3 << 30):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "needs about 3.00 GiB" in caught.value.what
    assert caught.value.where == str(tmp_path / "out")
    assert f"{tmp_path / 'out.work'} (2.00 KiB)" in str(caught.value.fix)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A limit for these lines only: with it, pytest could not write its own lines into a file either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("how", ["python", "numpy", "safetensors", "torch"])
def test_a_limit_on_the_size_of_files_is_told_whoever_writes(how: str, tmp_path: Path) -> None:
    big = torch.ones(20_000)
    with (
        pytest.raises(UserError, match="larger than this process may write"),
        files_of_at_most(4096),
        writing(tmp_path),
    ):
        if how == "python":
            (tmp_path / "file").write_bytes(b"x" * 80_000)
        elif how == "numpy":
            np.save(tmp_path / "file", big.numpy())
        elif how == "safetensors":
            save_file({"a": big}, tmp_path / "file")
        else:
            torch.save(big, tmp_path / "file")
