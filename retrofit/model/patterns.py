"""The patterns of a tokenizer.json: a regular expression that backtracks without bound never ends on some text.

The engine of `tokenizers` gives up on one place of a text after ten million steps, with a panic, but tries the next
place anew: `(a|aa)+$` takes for ever, `\\s+$` a minute for 64,000 spaces. A replacement may make every text a million
times longer. The patterns of ordinary tokenizers are known by heart; others are tried, in a process with limits, on
texts that such patterns fail on, before the tokenizer is loaded here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.limited import LimitedError, limited

NAME = "tokenizer.json"
_SUFFIXES = "'s|'t|'re|'ve|'m|'ll|'d"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
KNOWN = frozenset(
    {
        rf"{_SUFFIXES}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",  # GPT-2
        rf"{_SUFFIXES}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",  # CLIP
        *(  # Llama 3, Qwen 2
            rf"(?i:{_SUFFIXES})|{_FIRST}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
            for digits in (r"\p{N}{1,3}", r"\p{N}")
        ),
        *(  # o200k (GPT-OSS), Tekken (Mistral)
            rf"{_FIRST}{_UPPER}*{_LOWER}+{suffix}|{_FIRST}{_UPPER}+{_LOWER}*{suffix}|{digits}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"
            for suffix, digits in ((rf"(?i:{_SUFFIXES})?", r"\p{N}{1,3}"), ("", r"\p{N}"))
        ),
        # DeepSeek V3
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"\p{N}{1,3}",
        r"\p{N}",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",  # Bloom
        "[0-9][0-9][0-9]",  # Falcon
        r"\d",
        r"\d{1,3}",
        r"\s+",
        " {2,}",
    }
)
"""Regular expressions that take time in proportion to the text: what their alternatives leave, others take at once."""
REPLACEMENTS = frozenset(
    {
        *((" ", space) for space in ("\u2581", "")),
        *(("\u2581", space) for space in (" ", "")),
        *((spaces, space) for spaces in (" {2,}", r"\s+") for space in (" ", "\u2581")),
        *((quotes, '"') for quotes in ("``", "''")),
    }
)
_LETTERS = (b"\\u004", b"\\u005", b"\\u006", b"\\u007")
"""How a letter may be written in JSON so that it is not found as itself."""
_TEXT = rb'("(?:[^"\\]|\\.)*")'
_OBJECT = re.compile(
    rb'"type"\s*:\s*"(Split|Replace)"\s*,\s*"pattern"\s*:\s*\{\s*"(String|Regex)"\s*:\s*'
    + _TEXT
    + rb'\s*\}\s*,\s*(?:"content"\s*:\s*'
    + _TEXT
    + rb'\s*\}|"behavior"\s*:)'
)
_PATTERN = b'"pattern"'
_OF_AN_OBJECT = re.compile(rb"\s*:\s*\{")
_STRING = re.compile(r'"Regex":\s*("(?:[^"\\]|\\.)*")')
_MOST_PATTERNS = 16

LENGTH = 16_384
"""Characters of a text that a tokenizer is tried on."""
SLOW = 0.1
"""Seconds of processor time for such a text, from which on it matters how they grow. Ordinary: 0.02; a pattern that
backtracks over all of it: 0.7 on a fast core."""
SECONDS = 60
MEMORY = 8 << 30
_GROWTH = 32  # compatibility forms of Unicode make one character 18


def require_bounded(folder: str | Path) -> None:
    """Raises UserError for a tokenizer.json with patterns that take time without bound, or make text much longer."""
    path = Path(folder) / NAME
    if not path.is_file():
        return
    content = path.read_bytes()
    if ordinary(content):
        return
    flaw = _tried(str(path), hashlib.sha256(content).hexdigest())
    if flaw:
        raise UserError(f"the tokenizer {flaw}", where=shown(path), fix="take tokenizer.json from the original model")


def ordinary(content: bytes) -> bool:
    """Whether every pattern of a tokenizer.json, as `tokenizers` writes them, is known.

    Read in the bytes: to parse a vocabulary of megabytes takes longer than to load the tokenizer.
    """
    at, count = content.find(_PATTERN), 0
    while at >= 0:
        end = at + len(_PATTERN)
        if _OF_AN_OBJECT.match(content, end):  # of a vocabulary it is a token with a number
            found = _OBJECT.match(content, content.rfind(b'"type"', max(0, at - 200), at))
            count += 1
            if not found or found.start(2) < end or count > _MOST_PATTERNS or not _is_known(*found.groups()):
                return False
        at = content.find(_PATTERN, end)
    return b"\\u00" not in content or not any(letter in content for letter in _LETTERS)


def _is_known(kind: bytes, form: bytes, raw: bytes, content: bytes | None) -> bool:
    pattern = json.loads(raw)
    if kind == b"Replace":
        return content is not None and (pattern, json.loads(content)) in REPLACEMENTS
    return content is None and (form == b"String" or pattern in KNOWN)


@functools.lru_cache(maxsize=8)
def _tried(path: str, digest: str) -> str | None:
    """What is wrong with a tokenizer.json, None where nothing is found."""
    try:
        problem = limited(lambda: _trial(Path(path)).encode(), seconds=SECONDS, memory=MEMORY, most=1000)
    except LimitedError as error:
        if not str(error):
            return f"takes more than {SECONDS} seconds or {MEMORY >> 30} GiB of memory for {LENGTH:,} characters"
        return f"cannot be loaded and tried: {shown(str(error).splitlines()[0], 160)}"
    return problem.decode() or None


def _trial(path: Path) -> str:
    """Load a tokenizer.json and encode texts of one kind of character each; what is wrong, or nothing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    for character in _characters(path.read_text(encoding="utf-8")):
        quarter, whole = (_seconds(tokenizer, character * length + "!\x00") for length in (LENGTH // 4, LENGTH))
        if whole > SLOW and whole > 8 * quarter:  # in proportion it is 4, for a square 16
            times = f"{whole:.2f} s for {LENGTH:,} times {shown(repr(character), 20)}"
            return f"takes {times} and {quarter:.2f} s for a quarter: a pattern backtracks"
        if tokenizer.normalizer and len(tokenizer.normalizer.normalize_str(character * LENGTH)) > _GROWTH * LENGTH:
            return f"makes a text of {shown(repr(character), 20)} more than {_GROWTH} times longer"
    return ""


def _seconds(tokenizer: Any, text: str) -> float:
    """The shorter of two times, where the first was long enough to matter."""
    shortest = math.inf
    for _ in range(2):
        began = time.process_time()
        tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decoder:
            tokenizer.decoder.decode([text])
        shortest = min(shortest, time.process_time() - began)
        if shortest < SLOW / 16 or shortest > 16 * SLOW:
            break
    return shortest


def _characters(content: str) -> list[str]:
    """One of each common kind, then what the patterns name themselves."""
    named = "".join(json.loads(raw) for raw in _STRING.findall(content))
    return list(dict.fromkeys(["a", " ", "\n", "1", "A", ".", "\t", "_", "é", "字", "ab", " a", "a1", *named]))[:80]
