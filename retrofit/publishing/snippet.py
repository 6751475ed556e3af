"""A card as text: its front matter, the load snippet in it, and what nobody has filled in. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from retrofit import yamlfile
from retrofit.errors import UserError
from retrofit.escape import markdown, python_string, shown, visible

MODEL_ID_LINE = re.compile(r'^model_id = (["\']).*?\1.*$', re.MULTILINE)
_PLACEHOLDERS = (
    re.compile(r"\[More Information Needed\]", re.IGNORECASE),
    re.compile(r"\b(?:TODO|TBD|FIXME|XXX)\b"),
    re.compile(r"<\s*(?:your|my|insert|fill)[ _-][^>\n]*>", re.IGNORECASE),
    re.compile(r"\{\{.*?\}\}"),
    re.compile(r"\blorem ipsum\b", re.IGNORECASE),
    re.compile(r"(?<=\| )(?:nan|inf|None|unknown|\?+)(?= )"),
)

_PLAIN = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = "."  # this folder, or the name of this repository
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")

inputs = tokenizer("The most useful thing about a list in Python is", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = "."  # this folder, or the name of this repository
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")

messages = [{"role": "user", "content": "What is a list in Python?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


TRANSFORMERS = "5.9"
"""The oldest release of transformers 5 that loads all that is written: before it, YaRN on Gemma 3 is a KeyError."""
NEWER = {"GraniteSWAForCausalLM": "5.23"}
"""Classes that this release does not have, with the oldest that they were run with."""
PROMPT = "The most useful thing about a list in Python is"
MESSAGES = ({"role": "user", "content": "What is a list in Python?"},)
TOKEN_TYPES = "token_type_ids"
_TYPES_OUT = f'del inputs["{TOKEN_TYPES}"]  # which the model does not read\n'


def load_snippet(*, chat: bool, token_types: bool = False) -> str:
    """The lines that load and run the model with stock transformers.

    chat: the tokenizer has a chat template. token_types: it gives token_type_ids, which the model does not read.
    """
    snippet = _CHAT if chat else _PLAIN
    return snippet.replace("output = ", f"{_TYPES_OUT}output = ", 1) if token_types else snippet


def shows_snippet(card: str) -> bool:
    """Whether the card shows one of our load snippets, whatever `model_id` names in it."""
    plain = MODEL_ID_LINE.sub("", card).replace(_TYPES_OUT, "")
    return any(MODEL_ID_LINE.sub("", snippet) in plain for snippet in (_PLAIN, _CHAT))


def with_model_id(text: str, model_id: str) -> str:
    """The same card or snippet with `model_id` naming another folder or repository."""
    return MODEL_ID_LINE.sub(lambda _: f"model_id = {python_string(model_id)}", text, count=1)


def front_matter(card: str) -> dict[str, Any]:
    """The YAML block at the top of a card. Raises UserError when it is missing or no mapping."""
    block = yamlfile.front_matter(card)
    if block is None:
        raise UserError("the card has no YAML block at its top", where="README.md:1", fix="write the card again")
    parsed = yamlfile.parse(block)
    for problem in parsed.problems:
        key = f" (`{shown(problem.key[-1], 60)}`)" if problem.key else ""
        where = f"README.md:{problem.line + 1}"
        raise UserError(f"the card's YAML cannot be read: {problem.what}{key}", where=where, fix="correct it")
    if not isinstance(parsed.value, dict):
        raise UserError("the card's YAML block is not a mapping", where="README.md:1", fix="write the card again")
    return parsed.value


def placeholders(card: str, names: Iterable[str] = ()) -> list[str]:
    """What stands in a card that somebody has edited where a value should be, each with its line number.

    names: of texts, models and tasks, in which nothing is looked for. The recipe's own block is left out.
    """
    text = re.sub(r"^(`{3,})yaml\n.*?^\1$", lambda m: "\n" * m[0].count("\n"), card, flags=re.DOTALL | re.MULTILINE)
    for name in sorted(filter(None, names), key=len, reverse=True):
        for written in {name, visible(name), markdown(name)}:
            text = text.replace(written, "") if written.strip() else text
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        found += [f"line {number}: {match[0]}" for pattern in _PLACEHOLDERS for match in pattern.finditer(line)]
    return found
