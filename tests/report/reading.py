"""A page as its reader sees it."""

from __future__ import annotations

import re


def visible(text: str) -> str:
    """What a reader reads: no style, no markup."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<(style|svg).*?</\1>", "", text, flags=re.DOTALL))
