"""A budget for the KV cache, `2GiB@32k`: so many bytes for one sequence of so many tokens; and the section `budget`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.recipe.values import MOST_READ, TOKEN_COUNT, Section

_BUDGET = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*(B|[KMGT]i?B)\s*@\s*(\d{1,12}(?:\.\d{1,6})?)\s*([kKmM]?)\s*")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TOKENS = {"": 1, "k": 1024, "m": 1 << 20}


@dataclass(frozen=True)
class Budget:
    """`nbytes` bytes of KV cache for one sequence of `length` tokens."""

    nbytes: int
    length: int


def parse_budget(text: str) -> Budget:
    """`2GiB@32k`: decimal (GB) or binary (GiB) bytes, tokens with k for 1,024. Raises UserError for anything else."""
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise UserError(
            f"`{shown(text, 60)}` is not a KV-cache budget",
            where="--kv-budget",
            fix="write BYTES@TOKENS, for example 2GiB@32k",
        )
    size, unit, tokens, factor = match.groups()
    budget = Budget(int(float(size) * _UNITS[unit]), int(float(tokens) * _TOKENS[factor.lower()]))
    if not budget.nbytes or not budget.length:
        raise UserError(
            "a budget of no bytes, or for no tokens, fits nothing",
            where=f"--kv-budget {text}",
            fix="write for example 2GiB@32k",
        )
    return budget


class KvBudget(Section):
    """A budget that a run starts with: the list of `plan --kv-budget` decides which of `convert` and `window` are done,
    and with which numbers. Where these sections are given, they say how; what they say of heads, sizes and layers is
    replaced."""

    kv_cache: str = Field(description="bytes for one sequence of so many tokens: 2GiB@32k")
    tokens: Annotated[int, Field(ge=256, le=MOST_READ), TOKEN_COUNT] | None = Field(
        None, description="tokens of calibration text that the list reads; by default its own"
    )

    @field_validator("kv_cache")
    @classmethod
    def _written(cls, value: str) -> str:
        try:
            parse_budget(value)
        except UserError as error:
            raise ValueError(f"{error.what}; {error.fix}") from None
        return value

    @property
    def budget(self) -> Budget:
        """In numbers."""
        return parse_budget(self.kv_cache)
