"""Head conversion: fewer KV heads in the same native architecture."""

VERSION = 4
"""Of what a conversion computes: raise it when the same inputs would give other bytes. Work folders and the journal of
a run know conversions by it."""
