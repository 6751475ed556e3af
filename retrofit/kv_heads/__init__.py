"""Head conversion: fewer KV heads in the same native architecture."""
