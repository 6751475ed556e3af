"""GGUF files of a checkpoint, written by llama.cpp's own converter and quantiser and read again with llama.cpp.

`kinds` says which there are, `writing` makes them, `quantiser` and `reading` run llama.cpp's library in environments of
their own, `checking` compares a file with its folder.
"""
