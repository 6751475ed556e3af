"""The project's description on a package index: README.md, whose relative links lead nowhere there.

Where pyproject.toml names the repository (`[project.urls] Repository`), they become links into it. Where it does not, a
chart is left out and a link becomes its words.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?P<image>!?)\[(?P<words>(?:[^\[\]]|`[^`]*`)*)\]\((?P<target>(?!https?://|#)[^)\s]+)\)")


class Description(MetadataHookInterface):
    """Called by hatchling for `dynamic = ["readme"]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description."""
        text = (Path(self.root) / "README.md").read_text("utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {"content-type": "text/markdown", "text": portable(text, repository)}


def portable(markdown: str, repository: str | None) -> str:
    """The text without relative links. repository: the address that `raw/HEAD/FILE` and `blob/HEAD/FILE` follow."""

    def replaced(match: re.Match[str]) -> str:
        image, words, target = match["image"], match["words"], match["target"]
        if repository is None:
            return "" if image else words
        return f"{image}[{words}]({repository.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{target})"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(replaced, markdown))
