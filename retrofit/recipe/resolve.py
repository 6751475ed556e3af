"""A recipe whose lengths and numbers of KV heads are relative to a model, made one with the numbers of that model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retrofit.errors import UserError
from retrofit.recipe.load import validate
from retrofit.recipe.relative import LENGTH, Relative, length_word
from retrofit.recipe.schema import Recipe

_AT = re.compile(rf"((?:tail_)?ppl(?:_ratio)?@)({LENGTH})(/[\w.-]+)?")


def is_relative(recipe: Recipe) -> bool:
    """Whether something in the recipe is not a number before the model is known."""
    return _holds(recipe.model_dump()) or any(map(_AT.fullmatch, recipe.require))


def _holds(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_holds, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Relative)


def resolved(recipe: Recipe, native: int, target: int, kv_heads: Sequence[int]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe in numbers, and notes on words that came to mean the same.

    native: positions that `native` and `2x` stand for. target: positions after the recipe, where its context does not
    say. kv_heads: the numbers of KV heads that are possible, the model's own the largest.
    Raises RecipeError where the numbers do not fit together, UserError for a target that is to follow from itself.
    """
    if not is_relative(recipe):
        return recipe, ()
    numbers = _Numbers(native, target, kv_heads)
    values = recipe.model_dump()
    context = values["context"]
    if context is not None:
        if context["length"] == "target":
            raise UserError("the target is what this length says", where="context.length", fix="write 2x, or tokens")
        context["length"] = numbers.of(context["length"], "context.length")
        numbers.target = context["length"] or round(native * context["factor"])
    values = numbers.of(values)
    values["require"] = {numbers.key(key): bound for key, bound in recipe.require.items()}
    where = f"{recipe.name}, for {native:,} positions and {max(kv_heads)} KV heads"
    return validate(values, Recipe, where), tuple(numbers.notes)


def default_lengths_within(recipe: Recipe, window: int) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with those of its evaluation's lengths that a window of so many tokens holds, the window itself where
    that is none, and a note; for lengths that nobody asked for."""
    assert recipe.evaluate is not None
    lengths = tuple(length for length in recipe.evaluate.lengths if length <= window) or (window,)
    if lengths == recipe.evaluate.lengths:
        return recipe, ()
    section = recipe.evaluate.model_copy(update={"lengths": lengths})
    note = f"evaluate.lengths: by default {', '.join(f'{one:,}' for one in lengths)} in a window of {window:,} tokens"
    return recipe.model_copy(update={"evaluate": section}), (note,)


@dataclass
class _Numbers:
    """What words mean on one model."""

    native: int
    target: int
    kv_heads: Sequence[int]
    notes: list[str] = field(default_factory=list)

    def of(self, value: Any, path: str = "") -> Any:
        """Values with numbers for words."""
        if isinstance(value, dict):
            return {key: self.of(one, f"{path}.{key}" if path else key) for key, one in value.items()}
        if isinstance(value, list | tuple):
            self._coinciding(value, path)
            return [self.of(one, path) for one in value]
        if not isinstance(value, Relative):
            return value
        return self._heads(value) if path == "convert.kv_heads" else self._length(value)

    def key(self, key: str) -> str:
        """A key of `require` with a number for its length."""
        match = _AT.fullmatch(key)
        word = length_word(match[2]) if match else None
        return key if match is None or word is None else f"{match[1]}{self._length(word)}{match[3] or ''}"

    def _length(self, word: Relative) -> int:
        return self.target if word.share is None else int(self.native * word.share)

    def _heads(self, word: Relative) -> int:
        """The largest possible number that is not above the share; the smallest where there is none."""
        assert word.share is not None
        wanted = max(self.kv_heads) * word.share
        return max((count for count in self.kv_heads if count <= wanted), default=min(self.kv_heads))

    def _coinciding(self, values: Sequence[Any], path: str) -> None:
        words: dict[int, list[str]] = {}
        for one in dict.fromkeys(one for one in values if isinstance(one, Relative)):
            words.setdefault(self._length(one), []).append(f"`{one}`")
        for length, same in words.items():
            if len(same) > 1:
                self.notes.append(f"{path}: {' and '.join(same)} are the same {length:,} tokens here")
