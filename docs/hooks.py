"""What mkdocs calls while it builds: generated parts are put into the pages, and files of the repository become pages.

Pages link to files of the repository as they lie, which works where the repository is read; here they become pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from docs import generate  # noqa: E402

PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository that are pages, by the name of the page."""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the result files with their charts, and the repository's own pages."""
    for path in sorted(generate.RESULTS.glob("*.md")):
        page = generate.result_page(path.read_text("utf-8"))
        files.append(File.generated(config, f"results/{path.name}", content=page))
    for path in sorted(generate.RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_bytes()))
    for name, page_name in PAGES.items():
        text = (ROOT / name).read_text("utf-8").replace("](docs/", "](").replace("](evals/results/", "](results/")
        files.append(File.generated(config, page_name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what is generated, and lead links to files of the repository to their pages."""
    markdown = generate.fill(markdown).replace("](../evals/results/", "](results/")
    return re.sub(r"\]\(\.\./([A-Z]+\.md)\)", lambda match: f"]({PAGES[match[1]]})", markdown)
