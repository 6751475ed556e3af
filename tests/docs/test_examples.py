"""The script and the notebook of `examples/` run, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.tiny import save_tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"word {number} of a text" for number in range(80)))
    return path


@pytest.fixture(autouse=True)
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are not measured: they take most of the time and say nothing of an example."""
    monkeypatch.setattr("retrofit.evaluation.summary.run_costs", lambda folders, *_, **__: dict.fromkeys(folders))


def test_the_script_says_what_was_saved_and_lost(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / "smaller_cache.py"))["main"]
    options = {"--model": model, "--kv-heads": 1, "--method": "mean", "--text": text, "--lengths": 64}
    main([str(word) for pair in options.items() for word in pair] + ["--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "KV cache: 1,024 -> 256 bytes a token" in shown
    assert "64 tokens: perplexity" in shown


def test_the_notebook_runs(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in turn, in one namespace, with other parameters; no kernel."""
    notebook = json.loads((EXAMPLES / "longer_context.ipynb").read_text())
    smaller = {"MODEL": str(model), "TEXT": [str(text)], "LENGTHS": [64, 600], "LENGTH": 1024, "OUT": str(tmp_path)}
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(smaller) == {name for name in names if name.isupper()}
            names.update(smaller)
    shown = capsys.readouterr().out
    assert "tokens\toriginal\tntk\tyarn" in shown
    assert "yarn, text.txt, 64 tokens: " in shown


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "longer_context.ipynb").read_text())
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
