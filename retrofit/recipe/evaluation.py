"""What is measured (`evaluate`): perplexities, the use of context, tasks, and what a sequence costs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from retrofit.escape import shown
from retrofit.recipe.relative import RELATIVE_LENGTH, ascending
from retrofit.recipe.values import (
    LISTED,
    MOST_TOKENS,
    TOKEN_COUNT,
    AnyLength,
    Dtype,
    Length,
    LossOn,
    MeasuredTexts,
    Section,
    Tokens,
    Word,
    text_mix,
)

Definition = Literal["sliding", "transformers", "lm-eval", "yarn", "yarn-truncated", "longlora"]
CacheDtype = Literal["auto", "fp8_e4m3", "int8", "q8_0", "q4_0"]
RulerTask = Literal["niah_single", "niah_multikey", "variable_tracking", "common_words", "frequent_words"]
RULER_TASKS: tuple[RulerTask, ...] = (
    "niah_single",
    "niah_multikey",
    "variable_tracking",
    "common_words",
    "frequent_words",
)
Metadata = str | int | float | bool | tuple[str | int | float, ...]
NEEDLE_KEYS = 12  # names that needles in one haystack are told apart by
COMMON_KNOWLEDGE = 504  # questions of the built-in task


class Needle(Section):
    """Needle in a haystack: lengths x depths x samples, each prompt exactly as long as asked for."""

    test: Literal["needle", "passkey"] = Field("needle", description="what is hidden: a fact, or a number")
    lengths: Annotated[
        tuple[Annotated[int, Field(ge=64, le=MOST_TOKENS), TOKEN_COUNT, RELATIVE_LENGTH], ...], LISTED
    ] = Field(min_length=1, max_length=100, description="needle test at these lengths")
    depths: int = Field(5, ge=1, le=1000, description="depths of the needle, from 0 to 1")
    samples: int = Field(1, ge=1, le=10_000, description="needles per length and depth")
    multi_key: bool = Field(
        False, description="the needles of all depths in one haystack, with a key each: one pass a length, and harder"
    )

    _ascending = field_validator("lengths")(ascending)

    @model_validator(mode="after")
    def _keys(self) -> Needle:
        if self.multi_key and (self.test != "needle" or self.depths > NEEDLE_KEYS):
            raise ValueError(f"`multi_key` needs the test `needle`, with {NEEDLE_KEYS} depths at most: a key for each")
        return self


class Ruler(Section):
    """RULER's tasks that need no data: retrieval, variable tracking, common and frequent words."""

    tasks: tuple[RulerTask, ...] = Field(RULER_TASKS, min_length=1, description="which of the tasks")
    lengths: Annotated[
        tuple[Annotated[int, Field(ge=256, le=MOST_TOKENS), TOKEN_COUNT, RELATIVE_LENGTH], ...], LISTED
    ] = Field(min_length=1, max_length=100, description="RULER's tasks at these lengths")
    samples: int = Field(1, ge=1, le=10_000, description="texts per task and length")

    _ascending = field_validator("lengths")(ascending)


class Tasks(Section):
    """Tasks of lm-evaluation-harness (the extra `eval`), asked of every model in the same words."""

    names: tuple[Word, ...] = Field(
        min_length=1,
        max_length=1000,
        description="a task or group of lm-evaluation-harness or of your own, or a YAML file of one",
    )
    folder: Word | None = Field(
        None, description="folder with YAML files of your own tasks, which go before the harness's of the same name"
    )
    fewshot: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="examples before each question; by default, and where a task fixes 0, the task's own",
    )
    limit: int | None = Field(
        None, ge=1, le=10**9, description="questions of each task, from its beginning; by default all"
    )
    apply_chat_template: bool = Field(
        False, description="ask as turns of a dialogue, written by the model's own chat template"
    )
    fewshot_as_multiturn: bool = Field(
        True,
        description="with apply_chat_template: each example is turns of its own; false puts all into the question's",
    )
    system_instruction: Annotated[str, Field(min_length=1, max_length=100_000)] | None = Field(
        None, description="text before every question: the system turn of a dialogue, without one plain text"
    )
    log_samples: bool = Field(
        False, description="keep the prompt and the answer of every question as JSON lines beside the scores"
    )
    metadata: dict[str, Metadata] = Field(
        default_factory=dict,
        max_length=100,
        description="for tasks that make their own prompts, as the harness's --metadata: {max_seq_lengths: [16384]}",
    )
    batch_size: int = Field(
        1, ge=1, le=65_536, description="requests read at a time; more are faster on a GPU, and change the last digits"
    )

    @field_validator("names")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))


class Evaluate(Section):
    """Token losses of whole documents and the perplexities computed from them.

    context_gain, long_ppl, definitions, needle, ruler and tasks cost passes of their own. With context_gain or a
    needle, the effective length is certified.
    """

    lengths: Annotated[tuple[AnyLength, ...], LISTED] = Field(
        (1024, 2048, 4096, 8192),
        min_length=1,
        max_length=100,
        description="context lengths, or native, target, 1/2x: relative to the model's positions; by default those "
        "of the default that the context holds",
    )
    text: MeasuredTexts = Field(
        default_factory=lambda: text_mix("python-docs", "python-stdlib"), description="text to measure on"
    )
    documents: int = Field(
        2,
        ge=1,
        le=10**6,
        description="documents per source, each at least as long as the longest length; of dialogues about as many "
        "tokens in all",
    )
    loss_on: LossOn = Field(
        "assistant", description="of dialogues: the loss is on the assistant's turns, or on every token"
    )
    intermediate: bool = Field(
        True, description="measure the models between the original and the last one of a run as well"
    )
    tail: Tokens = Field(1024, ge=1, le=MOST_TOKENS, description="TailPPL(L) looks at the last `tail` tokens before L")
    chunk: Tokens = Field(
        512,
        ge=1,
        le=MOST_TOKENS,
        description="tokens per forward chunk; on a GPU, where a recipe does not name it, as many as fill it",
    )
    dtype: Dtype = Field("auto", description="dtype that models are measured in; auto is their own")
    kv_cache_dtype: CacheDtype = Field(
        "auto",
        description="keys and values as a serving engine stores them: fp8_e4m3 and int8 are vLLM's, q8_0 and q4_0 "
        "llama.cpp's; auto is the model's own dtype",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        le=1024,
        description="processes that read each text together, each a share of its tokens (ring attention); a divisor of "
        "the number that torchrun starts",
    )
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")
    cost_lengths: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MOST_TOKENS), TOKEN_COUNT, RELATIVE_LENGTH], ...], LISTED
    ] = Field(
        (512, 2048),
        max_length=100,
        description="lengths, cut to the context, at which prefill, decoding and memory are measured; [] skips it",
    )
    decode_tokens: Tokens = Field(
        16, ge=0, le=8192, description="tokens decoded at each of `cost_lengths`, each round; 0 measures the prefill"
    )
    cost_batches: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None, LISTED] = Field(
        None,
        max_length=100,
        description="sequences decoded together at each of `cost_lengths`, over a cache of fixed size, on a GPU with "
        "CUDA graphs; by default 1, 8 and 32 on a GPU and none on a CPU",
    )
    continuation_tokens: Tokens = Field(
        40, ge=0, le=1024, description="tokens that each model writes after a few prompts, for the report; 0 skips it"
    )
    document_tokens: Length | None = Field(
        None, description="tokens read of each document, for windows that move; by default the longest length"
    )
    context_gain: bool = Field(
        False, description="beyond the native length: does the longer context lower the loss of the same tokens?"
    )
    long_ppl: bool = Field(False, description="perplexity of the tokens that a context beyond 4,096 makes predictable")
    definitions: tuple[Definition, ...] = Field((), max_length=100, description="perplexities as others define them")
    stride: Tokens = Field(
        256, ge=1, le=MOST_TOKENS, description="tokens that the windows of `definitions: [sliding]` move by"
    )
    needle: Needle | None = Field(None, description="needle in a haystack")
    ruler: Ruler | None = Field(None, description="RULER's tasks")
    common_knowledge: bool | Annotated[int, Field(ge=4, le=COMMON_KNOWLEDGE, multiple_of=4)] = Field(
        False,
        description=f"the {COMMON_KNOWLEDGE} built-in questions of common knowledge, four answers to each; a number, a "
        "multiple of 4, asks so many of them",
    )
    tasks: Tasks | None = Field(None, description="tasks of lm-evaluation-harness")

    _ascending = field_validator("lengths", "cost_lengths")(ascending)

    @field_validator("common_knowledge", mode="before")
    @classmethod
    def _whole_fours(cls, value: object) -> object:
        """Four questions share their answers: only together they are fair."""
        if isinstance(value, bool) or (type(value) is int and value in range(4, COMMON_KNOWLEDGE + 1, 4)):
            return value
        raise ValueError(f"must be true, false, or a multiple of 4 up to {COMMON_KNOWLEDGE}, not `{shown(value, 60)}`")
