"""A run on a model and texts whose every name is an attack ends as any other: nothing of them is executed, and no path
of this machine is published."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from retrofit.escape import visible
from retrofit.publishing.snippet import load_snippet
from tests.workflow.conftest import retrofit, sections

PAYLOAD = "import os; os.system('touch PWNED')"
ARCHITECTURE = f"""x`

```python
model_id = "."
{PAYLOAD}
inputs = output = None
```

`LlamaForCausalLM"""
DESCRIPTION = f"""<script>alert(1)</script>
```

```python
model_id = '.'
{PAYLOAD}
```
---
{{{{ 7 * 7 }}}} [x](javascript:alert(1))"""
CARD = """---
license: mit
base_model: "a/b; touch PWNED\\n```\\n<img src=x onerror=alert(4)>"
---
# `$(touch PWNED)`
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path) -> Path:
    """The folder of a finished run."""
    home = tmp_path_factory.mktemp("secret_home")
    source = home / "x; touch PWNED $(touch PWNED) `touch PWNED` \"'[red] # <b>"
    shutil.copytree(model, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["SomebodysClass"]}))
    (source / "README.md").write_text(CARD)
    held = home / "$(touch PWNED)`|![a](http:evil)<img src=x onerror=alert(1)>.txt".replace("/", "")
    shutil.copy(texts / "held.txt", held)
    recipe = sections(source, texts)
    recipe |= {"description": DESCRIPTION, "recover": None, "publish": {"base_model": "someone/tiny", "license": "mit"}}
    del recipe["context"], recipe["require"]
    recipe["evaluate"] |= {"lengths": [64], "text": [str(held)], "cost_lengths": []}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = retrofit("run", "recipe.yaml", "--out", "out")
    assert result.exit_code == 0, result.output
    assert visible(result.output, keep="\n") == result.output
    return home / "out"


def test_a_class_name_that_is_none_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": [ARCHITECTURE]}))
    monkeypatch.chdir(tmp_path)
    result = retrofit("convert", source, "--kv-heads", 1, "--method", "mean", "--out", "out")
    assert result.exit_code == 2
    assert "`architectures` is no list of class names" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_of_them_is_executed(out: Path) -> None:
    assert not [path for path in out.parent.rglob("*") if path.name == "PWNED"]


def test_the_card_holds_our_lines_and_the_class_of_transformers(out: Path) -> None:
    text = (out / "final/README.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    fences = [(token.info, token.content) for token in tokens if token.type == "fence"]
    assert [info for info, _ in fences] == ["python", "sh", "yaml"]
    assert fences[0][1] == load_snippet(chat=False)
    assert yaml.safe_load(fences[2][1])["description"] == DESCRIPTION
    assert shlex.split(fences[1][1])[:4] == ["retrofit", "run", "recipe.yaml", "--model"]
    assert len(shlex.split(fences[1][1])) == 5
    assert "It is a plain `LlamaForCausalLM` checkpoint." in text
    elements = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert elements == ["<details>\n<summary>The resolved recipe</summary>", "</details>"]


def test_no_path_of_this_machine_is_published_or_reported(out: Path) -> None:
    shown = [path for path in (out / "final").rglob("*") if path.is_file()]
    shown += [out / "report.md", out / "report.html", out / "perplexity.svg"]
    assert len(shown) > 8
    place = str(out.parent).encode()
    assert [path.name for path in shown if place in path.read_bytes() or b"secret_home" in path.read_bytes()] == []
