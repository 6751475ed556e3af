"""The recipe: what a run does, as data. Every default of the recipe language stands in its modules, once.

A recipe is a YAML file with these keys; `load.py` reads it with line numbers. `None` for a section skips that step.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from retrofit.escape import shown, visible
from retrofit.recipe.attention import (
    ROPE_SETTINGS,
    Calibration,
    Context,
    Convert,
    Method,
    RopeMethod,
    RopeSettings,
    Search,
    Window,
    WindowCalibration,
)
from retrofit.recipe.engines import ENGINES, Engine
from retrofit.recipe.evaluation import (
    NEEDLE_KEYS,
    RULER_TASKS,
    CacheDtype,
    Definition,
    Evaluate,
    Needle,
    Ruler,
    RulerTask,
    Tasks,
)
from retrofit.recipe.hub import OTHER, is_link, is_repo_id, license_problem
from retrofit.recipe.kv_budget import KvBudget
from retrofit.recipe.recovery import Adapter, Distribute, Recover, Stage
from retrofit.recipe.relative import LENGTH
from retrofit.recipe.values import (
    LISTED,
    MOST_SEED,
    MOST_TOKENS,
    NAME,
    Device,
    Dtype,
    GgufType,
    Kernel,
    Length,
    PromptSource,
    Section,
    TextSource,
    Word,
    lowered,
    parse_bound,
    parse_size,
)

__all__ = [
    "LONGEST_DESCRIPTION",
    "MOST_SEED",
    "MOST_TOKENS",
    "NAME",
    "NEEDLE_KEYS",
    "ROPE_SETTINGS",
    "RULER_TASKS",
    "Adapter",
    "CacheDtype",
    "Calibration",
    "Context",
    "Convert",
    "Definition",
    "Device",
    "Distribute",
    "Dtype",
    "Evaluate",
    "GgufType",
    "Kernel",
    "KvBudget",
    "Method",
    "Needle",
    "PromptSource",
    "Publish",
    "Recipe",
    "Recover",
    "RopeMethod",
    "RopeSettings",
    "Ruler",
    "RulerTask",
    "Search",
    "Section",
    "Stage",
    "Tasks",
    "TextSource",
    "Window",
    "WindowCalibration",
    "parse_bound",
    "parse_size",
]

LONGEST_DESCRIPTION = 100_000
"""Characters."""

SMALLEST_SHARD = 1000
"""Bytes: fewer would be a file for nearly every tensor of the smallest model."""

_REQUIRE_KEY = re.compile(
    r"(ppl|ppl_ratio|tail_ppl|tail_ppl_ratio|kv_ratio|kernel_max_diff|effective_length)"
    rf"(@([1-9][0-9]{{0,9}}|{LENGTH}))?(/[\w.-]+)?"
    r"|(task|task_drop)@[\w.:+-]+(/[\w.,+-]+)?"
    r"|engine@[\w.-]+"
)


class Publish(Section):
    """The checkpoint that can be published."""

    license: str | None = Field(None, description="license id for the card; by default the source model's own")
    license_name: str | None = Field(
        None, min_length=1, max_length=200, description="with the license `other`: its name; by default the source's"
    )
    license_link: str | None = Field(None, description="with the license `other`: where its text is")
    base_model: str | None = Field(None, description="hub id of the source for the card, when it cannot be known")
    max_shard_size: str = Field("5GB", description="most bytes of a weight file: 500MB, 5GB; 1KB at least")
    engines: tuple[Engine, ...] = Field(
        (), description="an engine that has to compute what transformers computes: it scores recorded documents"
    )
    engine_tokens: Length | None = Field(
        None,
        description="tokens of a document that engines score; by default 256 more than the original length",
    )
    make_environments: bool = Field(
        False, description="make an environment for an engine that is not installed, in the cache"
    )
    reload_tokens: Length = Field(1024, description="tokens per document that a fresh process scores again")
    gguf: Annotated[tuple[GgufType, ...], LISTED, BeforeValidator(lowered)] = Field(
        (),
        max_length=10,
        description="GGUF files to write beside the checkpoint with llama.cpp's own converter and quantiser",
    )

    @field_validator("license")
    @classmethod
    def _known_license(cls, value: str | None) -> str | None:
        problem = None if value in (None, OTHER) else license_problem(value)
        if problem:
            raise ValueError(problem)
        return value

    @field_validator("license_name")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        if value is not None and (visible(value) != value or not value.strip()):
            raise ValueError("must be one line of plain text")
        return value

    @field_validator("license_link")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not is_link(value):
            raise ValueError(
                f"`{shown(value, 60)}` is no address (https://...) and no name of a file in the repository"
            )
        return value

    @field_validator("base_model")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        if value is not None and not is_repo_id(value):
            raise ValueError(f"`{shown(value, 60)}` is not a hub id; write ORG/NAME")
        return value

    @field_validator("gguf")
    @classmethod
    def _each_once(cls, value: tuple[GgufType, ...]) -> tuple[GgufType, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("max_shard_size")
    @classmethod
    def _whole_bytes(cls, value: str) -> str:
        nbytes = parse_size(value)
        if nbytes is None:
            raise ValueError(f"`{shown(value, 60)}` is not a size; write for example 5GB or 500MB")
        if nbytes < SMALLEST_SHARD:
            raise ValueError(f"must be at least {SMALLEST_SHARD} bytes, not `{value}`; write for example 5GB")
        return value

    @model_validator(mode="after")
    def _terms(self) -> Publish:
        if self.license not in (None, OTHER) and (self.license_name or self.license_link):
            raise ValueError(f"`license_name` and `license_link` belong to `license: other`, not to `{self.license}`")
        return self


class Recipe(Section):
    """A whole run: load -> convert -> window -> extend -> recover -> evaluate -> publish."""

    name: str = Field(pattern=NAME, max_length=100, description="what the run folder is called")
    description: str = Field("", max_length=LONGEST_DESCRIPTION, description="what the recipe is for")
    model: Word | None = Field(None, description="hub id, folder, .gguf file, or `embedded`")
    revision: Word | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Dtype = Field("auto", description="dtype of the written weights; auto is the source's own")
    device: Device = Field("auto", description="auto is the GPU where there is one")
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of everything random")
    kernel: Kernel = Field("auto", description="attention kernel; `retrofit doctor` lists those that run here")
    link: bool = Field(
        False,
        description="hard links instead of copies of unchanged weights; who writes into one of them changes all",
    )
    budget: KvBudget | None = Field(None, description="a KV cache to meet, by what loses least")
    convert: Convert | None = Field(None, description="fewer KV heads")
    window: Window | None = Field(None, description="sliding windows in layers that look back a short way only")
    context: Context | None = Field(None, description="a longer context")
    recover: Recover | None = Field(None, description="a short training that wins the quality back")
    evaluate: Evaluate | None = Field(Evaluate(), description="what is measured")
    publish: Publish | None = Field(Publish(), description="the checkpoint that can be published")
    require: dict[str, str] = Field(
        default_factory=dict,
        max_length=1000,
        description="bounds that the measured values must keep before anything is published: `ppl_ratio@1024: <= 1.5`",
    )

    @field_validator("require")
    @classmethod
    def _requirements(cls, value: dict[str, str]) -> dict[str, str]:
        for key, bound in value.items():
            if not _REQUIRE_KEY.fullmatch(key):
                raise ValueError(
                    f"`{shown(key, 60)}` is not a metric; write ppl, ppl_ratio, tail_ppl or tail_ppl_ratio with "
                    "@LENGTH and optionally /SOURCE, or task@NAME, task_drop@NAME, kv_ratio, kernel_max_diff, "
                    "effective_length, engine@NAME"
                )
            if parse_bound(bound) is None:
                raise ValueError(f"`{shown(bound, 60)}` is not a bound; write for example '<= 1.5'")
        return value

    @model_validator(mode="after")
    def _steps(self) -> Recipe:
        for key in self.require:
            name = key.partition("@")[2] if key.startswith("engine@") else None
            if name is not None and (self.publish is None or name not in self.publish.engines):
                fix = f"add {name} to publish.engines" if name in ENGINES else f"use one of {', '.join(ENGINES)}"
                raise ValueError(f"nothing is tried in the engine of `{shown(key, 60)}`: {fix}")
        if self.require and self.evaluate is None:
            raise ValueError("`require` needs `evaluate`: a requirement is checked on what was measured")
        return self
