"""One budget for a KV cache: fewer KV heads, windows, and an engine's cache of fewer bits, priced side by side."""

VERSION = 1
"""Of what is measured for a list: raise it when the same model and text would give other numbers."""
