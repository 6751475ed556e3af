"""Sliding windows: layers that look back a fixed number of tokens, with a sink where the target has one."""

VERSION = 3
"""Of what windows compute: raise it when the same inputs would give other bytes."""

ROW_WINDOWS = 2
"""Windows in a row that losses are measured on."""


NEEDLE_ROWS = 2
"""Rows with numbers to be asked for, beside those with passages that come again."""


def row_length(window: int) -> int:
    """Tokens of such a row."""
    return ROW_WINDOWS * window
