"""Nothing depends on the machine: what child processes are told of it, and how text files are read and written."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children.sitecustomize import BFLOAT16, told

PACKAGE = Path(__file__).resolve().parent.parent / "retrofit"
REAL = {"avx2": True, "amx_tile": True, "avx512_bf16": True, "sve_bf16": False}


def test_the_tests_say_which_products_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BFLOAT16, "machine")
    assert told(REAL) == REAL
    monkeypatch.setenv(BFLOAT16, "no")
    assert told(REAL) == {"avx2": True, "avx512_bf16": False}
    monkeypatch.setenv(BFLOAT16, "yes")
    assert told({"avx2": True}) == {"avx2": True, "avx512_bf16": True}


def test_child_processes_are_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os; from retrofit.model.load import multiplies_in_bfloat16 as asked; seen = [asked('cpu')];"
        f"os.environ[{BFLOAT16!r}] = 'no'; seen.append(asked('cpu')); print(seen)"
    )
    monkeypatch.setenv(BFLOAT16, "yes")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, False]"


def test_nothing_of_the_shell_is_left() -> None:
    assert "retrofit-tests-home-" in os.environ["HOME"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    told_by_shells = {
        "HF_HOME",
        "HF_TOKEN",
        "RETROFIT_CACHE",
        "XDG_CACHE_HOME",
        "GITHUB_ACTIONS",
        "FORCE_COLOR",
        "LANG",
    }
    assert not told_by_shells & os.environ.keys()


def test_text_files_name_their_encoding() -> None:
    """Without one, what is read and written depends on the locale."""
    places = {"read_text": 0, "write_text": 1}  # the arguments before the encoding
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in places
        and len(node.args) == places[node.func.attr]
        and not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]
    assert found == []
