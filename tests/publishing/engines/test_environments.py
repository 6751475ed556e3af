"""Environments of engines are made from pins, found again, and never left half-made."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from retrofit import bundled
from retrofit.errors import UserError
from retrofit.publishing.engines import environments

FILES = {
    "tinyengine.py": "VERSION = '1.0'\n",
    "tinyengine-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tinyengine\nVersion: 1.0\n",
    "tinyengine-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tinyengine-1.0.dist-info/RECORD": "",
}


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pins with one engine, `tiny`, whose package is a wheel on this disk; the cache is empty."""
    wheel = tmp_path / "tinyengine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    folder = tmp_path / "pins"
    folder.mkdir()
    (folder / "tiny.txt").write_text(f"# a comment\ntinyengine @ {wheel.as_uri()}\n")
    (folder / "gone.txt").write_text(f"gone @ {(tmp_path / 'gone-1.0-py3-none-any.whl').as_uri()}\n")
    monkeypatch.setattr(bundled, "folder", lambda kind: folder)
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    return folder


def test_an_environment_is_made_once_and_holds_its_pins_alone(pins: Path) -> None:
    assert environments.find("tiny") is None
    environment = environments.require("tiny", make=True, command="")
    assert environments.find("tiny") == environment
    assert environments.made("tiny") == environment
    code = "import tinyengine, importlib.util as u; print(tinyengine.VERSION, u.find_spec('torch'))"
    done = subprocess.run([environment.python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0", "None"]


def test_another_list_of_packages_is_another_environment(pins: Path) -> None:
    before = environments._folder("tiny")
    (pins / "tiny.txt").write_text("tinyengine==2.0\n")
    assert environments._folder("tiny") != before


def test_what_cannot_be_installed_leaves_nothing(pins: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone-1\.0-py3-none-any\.whl"):
        environments.made("gone")
    assert environments.find("gone") is None
    assert not environments._folder("gone").exists()


def test_a_half_made_environment_is_thrown_away(pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = environments._folder("tiny")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("")
    assert environments.find("tiny") is None
    monkeypatch.setattr(environments, "_make", lambda name, place: place.mkdir())
    environments.made("tiny")
    assert not (folder / "bin").exists()


def test_an_engine_that_is_not_there_names_the_command(pins: Path) -> None:
    with pytest.raises(UserError, match=r"not installed here.*\n.*\n.*certify X --make"):
        environments.require("tiny", make=False, command="retrofit certify X --make-environment")
    with pytest.raises(UserError, match="no engine is called `torchserve`"):
        environments.require("torchserve", make=True, command="")


def test_torch_is_linked_where_it_is_the_pinned_one(tmp_path: Path) -> None:
    import torch

    version = torch.__version__.partition("+")[0]
    linked = environments._shared(f"torch=={version}")
    if linked:  # not of an interpreter that somebody else's tool put together
        folder = tmp_path / "lib" / "python3" / "site-packages"
        folder.mkdir(parents=True)
        environments._link(linked, tmp_path)
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); import torch; print(torch.__file__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(str(folder))
    assert environments._shared("torch==1.0") == []


def test_every_pin_is_exact() -> None:
    for name in bundled.names("engines"):
        assert [line for line in environments.pins(name) if "==" not in line] == []
        assert environments.pins(name)
