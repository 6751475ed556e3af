"""Other engines that serve a checkpoint, run here: each in an environment and a process of its own.

`environments` finds or makes an environment, `converter` writes GGUF files, `run` scores tokens in an engine, `compare`
says how far it is from transformers.
"""
