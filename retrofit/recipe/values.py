"""The kinds of values that a recipe holds, and how they may be written: 32k tokens, bf16, 5GB, "<= 1.5"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from retrofit.escape import shown
from retrofit.recipe.relative import RELATIVE_LENGTH

NAME = r"^[A-Za-z0-9][\w.-]*$"
"""What a recipe or a suite may be called: it names a folder."""

# The widest range of each kind of number. What a model or a machine can hold of it is checked when both are known.
MOST_TOKENS = 2**31 - 1
"""The longest context length: engines count positions in 32 bits."""
MOST_READ = 10**12
"""Most tokens that a step is asked to read in all."""
MOST_SEED = 2**31 - 1
"""The largest seed: what is drawn from its neighbours stays below numpy's 2**32."""

_BOUND = re.compile(r"\s*(<=|>=|<|>)\s*((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB)?\s*", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TOKENS = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([kKmM])\s*")
_WHOLE = re.compile(r"\s*[+-]?[0-9][0-9_]*\s*")
_DTYPES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def parse_bound(text: str) -> tuple[str, float] | None:
    """("<=", 1.5) of "<= 1.5"; None for what is no comparison with a finite number."""
    match = _BOUND.fullmatch(text)
    if match is None or not math.isfinite(limit := float(match[2])):
        return None
    return match[1], limit


def parse_size(size: str) -> int | None:
    """Bytes of "5GB" (powers of ten, as on the hub); None for what is no size."""
    match = _SIZE.fullmatch(size)
    nbytes = float(match[1]) * _UNITS[(match[2] or "B").upper()] if match else math.inf
    return int(nbytes) if nbytes < 2**63 else None


def token_count(value: object) -> object:
    """32768 of "32k" and 1048576 of "1m"; other values as they are. ValueError for text that is no number of tokens."""
    if not isinstance(value, str) or _WHOLE.fullmatch(value):
        return value
    match = _TOKENS.fullmatch(value)
    count = float(match[1]) * (1024 if match[2] in "kK" else 1024**2) if match else 0.5
    if not count.is_integer():
        raise ValueError(f"must be a whole number of tokens, for example 4096 or 32k, not `{shown(value, 60)}`")
    return int(count)


def dtype_name(value: object) -> object:
    """The full name of a dtype that is called fp32, bf16, fp16 or half; other values as they are."""
    return _DTYPES.get(value.strip().lower(), value) if isinstance(value, str) else value


def lowered(value: object) -> object:
    """Q4_K_M as q4_k_m, alone or in a list: files are named in capitals."""
    if isinstance(value, list | tuple):
        return [lowered(one) for one in value]
    return value.lower() if isinstance(value, str) else value


def _listed(value: object) -> object:
    """The parts of "1k,4k", and a single number as a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True, eq=False)  # annotations are hashed
class Written:
    """A value that may be written in other ways as well. read: what makes the value of them.
    schema: these ways in JSON Schema, for editors."""

    read: Callable[[object], object]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), self.schema]}


TOKEN_COUNT = Written(token_count, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?[kKmM]$", "examples": ["32k"]})

Kernel = Literal[
    "auto",
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
    "kernels-community/flash-attn4",
    "flex_attention",
    "blockwise",
]
Device = Literal["auto", "cpu", "cuda", "mps"]
LossOn = Literal["assistant", "all"]
"""The tokens of dialogues that a loss is taken on."""
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], Written(dtype_name, {"type": "string", "enum": list(_DTYPES)})
]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k"]
"""A type of GGUF files: three of floating-point weights, and llama.cpp's quantisations."""
Tokens = Annotated[int, TOKEN_COUNT]
"""A number of tokens; 32k is 32,768."""
Length = Annotated[int, Field(ge=16, le=MOST_TOKENS), TOKEN_COUNT]
AnyLength = Annotated[Length, RELATIVE_LENGTH]
"""A length that may be relative to the model's: native, target, 2x."""
LISTED = BeforeValidator(_listed)
"""A list that may be written with commas: 1k,4k."""
Divisor = Annotated[float, Field(ge=1e-3, le=MOST_TOKENS)]
Word = Annotated[str, Field(min_length=1, max_length=4096)]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys and numbers that are not finite are errors, values do not change
    after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: object, info: ValidationInfo) -> object:
        """`true`, `yes` and `on` are no numbers, whatever Python counts them as."""
        some = value if isinstance(value, list | tuple) else [value]
        annotation = cls.model_fields[info.field_name or ""].annotation
        if any(isinstance(one, bool) for one in some) and _counts(annotation) and bool not in get_args(annotation):
            raise ValueError("must be a number, not true or false")
        return value


def _counts(annotation: object) -> bool:
    """Whether a type is that of a number, or holds one."""
    return annotation in (int, float) or any(map(_counts, get_args(annotation)))


class PromptSource(Section):
    """A body of text and its share. A plain string in YAML is short for {source: ...}."""

    source: Word = Field(
        description="`python-docs`, `python-stdlib`, `short-prose` (to measure on: no step may read it), `self` (the "
        "original model's own samples), `synthetic` (questions that only a far context answers, to train on), "
        "`openings` (first lines of many kinds of text, for samples to begin with), a text, JSONL or parquet file, a "
        "folder of such files, or `hub:DATASET[:CONFIG]`; rows may be dialogues"
    )
    weight: float = Field(1.0, ge=1e-6, le=1e6, description="its share of a mix")
    field: Word = Field(
        "text",
        description="the key that holds the text, or the turns of a dialogue, in JSONL, parquet and hub rows; rows "
        "without it may be dialogues: `messages`, `conversations`, or `prompt` and `completion`",
    )
    split: Word = Field("train", description="the split of a hub dataset")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value


OWN_SAMPLES = "self"
"""The source of what the original model writes."""
SYNTHETIC = "synthetic"
"""The source of texts that are made for a training, in rows of its length."""
SHORT_PROSE = "short-prose"
"""The source of short prose that is kept unseen."""
OPENINGS = "openings"
"""The source of first lines of many kinds of text, which samples begin with."""
_OF_OWN_SAMPLES = ("tokens", "temperature", "top_p", "prompts", "prompt_share")


class TextSource(PromptSource):
    """One source of text. A plain string in YAML is short for {source: ...}.

    The keys after `split` say how the original model writes its samples, and belong to `self` alone.
    """

    tokens: Annotated[int, Field(ge=256, le=MOST_READ), TOKEN_COUNT] | None = Field(
        None, description="of `self`: tokens that the model writes; by default enough for its share, up to 512k"
    )
    temperature: float = Field(1.0, ge=1e-3, le=100, description="of `self`: divides the logits")
    top_p: float = Field(
        1.0, gt=0, le=1, description="of `self`: only the most probable tokens of so much probability are drawn"
    )
    prompts: tuple[PromptSource, ...] = Field(
        (),
        max_length=1000,
        description="of `self`: text whose first lines, or dialogues whose first questions, samples begin with",
    )
    prompt_share: float = Field(
        0.5, gt=0, le=1, description="of `self`: share of the samples that begin with a prompt; the others with BOS"
    )

    @model_validator(mode="after")
    def _own(self) -> TextSource:
        if any(prompt.source == SHORT_PROSE for prompt in self.prompts):
            raise ValueError(_UNSEEN)
        if self.source == OWN_SAMPLES:
            if any(prompt.source == OWN_SAMPLES for prompt in self.prompts):
                raise ValueError("`prompts` name other text than `self`: what the model writes begins with them")
            return self
        fields = type(self).model_fields
        changed = [name for name in _OF_OWN_SAMPLES if getattr(self, name) != fields[name].default]
        if changed:
            raise ValueError(f"only the source `self` has `{changed[0]}`: nothing else is written by the model")
        return self

    @model_serializer(mode="wrap")
    def _keys_of_its_own(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        unused = () if self.source == OWN_SAMPLES else _OF_OWN_SAMPLES
        return {key: value for key, value in values.items() if key not in unused}


def text_mix(*names: str) -> tuple[TextSource, ...]:
    """Sources of equal weight."""
    return tuple(TextSource(source=name) for name in names)


_UNSEEN = f"`{SHORT_PROSE}` is kept unseen, to measure on: only `evaluate.text` may name it"
_FIRST_LINES = f"`{OPENINGS}` are first lines alone: only `prompts` of the source `{OWN_SAMPLES}` may name them"


def _of_whole_texts(sources: tuple[TextSource, ...]) -> tuple[TextSource, ...]:
    if any(source.source == OPENINGS for source in sources):
        raise ValueError(_FIRST_LINES)
    return sources


def _of_documents(sources: tuple[TextSource, ...]) -> tuple[TextSource, ...]:
    if any(source.source == SYNTHETIC for source in sources):
        raise ValueError(f"`{SYNTHETIC}` is made to train on: only `recover.text` may name it")
    return sources


def _to_learn_from(sources: tuple[TextSource, ...]) -> tuple[TextSource, ...]:
    if any(source.source == SHORT_PROSE for source in sources):
        raise ValueError(_UNSEEN)
    return sources


_Sources = Annotated[tuple[TextSource, ...], Field(min_length=1, max_length=1000), AfterValidator(_of_whole_texts)]
TrainingTexts = Annotated[_Sources, AfterValidator(_to_learn_from)]
Texts = Annotated[TrainingTexts, AfterValidator(_of_documents)]
MeasuredTexts = Annotated[_Sources, AfterValidator(_of_documents)]
