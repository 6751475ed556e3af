"""The recipe: what a run does, as data. Every default stands here, once.

A recipe is a YAML file with these keys; `load.py` reads it with line numbers. `None` for a section skips that step.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Kernel = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "blockwise"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["first", "mean", "procrustes", "real-pca", "calibrated"]
RopeMethod = Literal["linear", "ntk", "yarn", "llama3"]

_REQUIRE_KEY = re.compile(r"^(ppl|ppl_ratio|tail_ppl|tail_ppl_ratio|kv_ratio|kernel_max_diff)(@\d+)?(/[\w.-]+)?$")
_REQUIRE_VALUE = re.compile(r"^\s*(<=|>=|<|>)\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*$")


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(Section):
    """One source of text.

    source: `python-docs` | `python-stdlib` | `self` (the original model's own samples) | a text/JSONL/parquet file |
    a folder of such files | `hub:DATASET[:CONFIG]`. A plain string in YAML is short for {source: ...}.
    weight: its share of a mix. field: the key that holds the text in JSONL, parquet and hub rows.
    """

    source: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0)
    field: str = "text"
    split: str = "train"

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value


def _mix(*names: str) -> tuple[TextSource, ...]:
    return tuple(TextSource(source=name) for name in names)


class Calibration(Section):
    """Text that the calibration pass reads."""

    text: tuple[TextSource, ...] = Field(default_factory=lambda: _mix("python-docs", "python-stdlib"), min_length=1)
    tokens: int = Field(49_152, ge=256, description="tokens read in all")
    sequence_length: int = Field(1024, ge=16, description="tokens per sequence")


class Convert(Section):
    """Fewer KV heads."""

    kv_heads: int = Field(ge=1, description="KV heads per layer after conversion (G)")
    method: Method = "calibrated"
    repair: Literal["o_proj", "none"] = Field("o_proj", description="closed-form repair after the merge")
    calibration: Calibration = Calibration()

    @property
    def calibrates(self) -> bool:
        """Whether the method reads calibration text."""
        return self.method not in ("first", "mean")


class Context(Section):
    """A longer window: exactly one of `length` (tokens) and `factor`."""

    length: int | None = Field(None, ge=16)
    factor: float | None = Field(None, ge=1)
    method: RopeMethod = "yarn"

    @model_validator(mode="after")
    def _one_of(self) -> Context:
        if (self.length is None) == (self.factor is None):
            raise ValueError("give exactly one of `length` and `factor`")
        return self


class Adapter(Section):
    """LoRA by peft. attention/mlp: which projections carry an adapter; norms/embeddings: trained in full as well."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    attention: bool = True
    mlp: bool = True
    norms: bool = False
    embeddings: bool = False


class Recover(Section):
    """Short adapter training that wins the quality back."""

    loss: Literal["distill", "lm"] = "distill"
    tokens: int = Field(200_000, ge=1, description="training tokens in all")
    sequence_length: int = Field(1024, ge=16)
    batch_size: int = Field(1, ge=1, description="sequences per optimizer step and process")
    learning_rate: float = Field(3e-4, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    row_chunk: int = Field(512, ge=1, description="rows of logits that exist at one time in the loss")
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass instead of keeping them: slower, less memory. "
        "Turn on when they do not fit, for billions of parameters or many thousand tokens per step; "
        "a small model at 1,024 tokens gains nothing",
    )
    evals: int = Field(4, ge=1, description="how often the held-out loss is measured; the best adapter is kept")
    eval_tokens: int = Field(8192, ge=64)
    checkpoints: int = Field(4, ge=1, description="how often training can be resumed from")
    adapter: Adapter = Adapter()
    text: tuple[TextSource, ...] = Field(default_factory=lambda: _mix("python-docs", "python-stdlib"), min_length=1)


class Evaluate(Section):
    """Token losses of whole documents and the perplexities computed from them."""

    lengths: tuple[Annotated[int, Field(ge=16)], ...] = Field((1024, 2048, 4096, 8192), min_length=1)
    text: tuple[TextSource, ...] = Field(default_factory=lambda: _mix("python-docs", "python-stdlib"), min_length=1)
    documents: int = Field(2, ge=1, description="documents per source, each at least as long as the longest length")
    tail: int = Field(1024, ge=1, description="TailPPL(L) looks at the last `tail` tokens before L")
    chunk: int = Field(512, ge=1, description="tokens per forward chunk")
    dtype: Dtype = "auto"
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    decode_tokens: int = Field(64, ge=0, description="tokens decoded to time decoding; 0 skips it")

    @field_validator("lengths")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


class Publish(Section):
    """The checkpoint that can be published."""

    licence: str | None = Field(None, description="licence id for the card; by default the source model's own")
    base_model: str | None = Field(None, description="hub id of the source for the card, when it cannot be known")
    max_shard_size: str = "5GB"
    reload_tokens: int = Field(1024, ge=16, description="tokens per document that a fresh process scores again")


class Recipe(Section):
    """A whole run: load -> convert -> extend -> recover -> evaluate -> publish."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    description: str = ""
    model: str | None = Field(None, description="hub id | folder | .gguf file | `embedded`; `--model` overrides it")
    revision: str | None = None
    dtype: Dtype = Field("auto", description="dtype of the written weights; auto is the source's own")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    kernel: Kernel = "auto"
    convert: Convert | None = None
    context: Context | None = None
    recover: Recover | None = None
    evaluate: Evaluate | None = Evaluate()
    publish: Publish | None = Publish()
    require: dict[str, str] = Field(default_factory=dict)

    @field_validator("require")
    @classmethod
    def _requirements(cls, value: dict[str, str]) -> dict[str, str]:
        for key, bound in value.items():
            if not _REQUIRE_KEY.match(key):
                raise ValueError(
                    f"`{key}` is not a metric; write ppl, ppl_ratio, tail_ppl or tail_ppl_ratio with @LENGTH and "
                    "optionally /SOURCE, or kv_ratio, kernel_max_diff"
                )
            if not _REQUIRE_VALUE.match(bound):
                raise ValueError(f"`{bound}` is not a bound; write for example '<= 1.5'")
        return value

    @model_validator(mode="after")
    def _steps(self) -> Recipe:
        if self.require and self.evaluate is None:
            raise ValueError("`require` needs `evaluate`: a requirement is checked on what was measured")
        return self
