"""The recipe: what a run does, as data. Every default stands here, once.

A recipe is a YAML file with these keys; `load.py` reads it with line numbers. `None` for a section skips that step.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from retrofit.escape import shown, visible
from retrofit.recipe.hub import OTHER, is_link, is_repo_id, license_problem

Kernel = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "blockwise"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["first", "mean", "procrustes", "real-pca", "calibrated"]
RopeMethod = Literal["linear", "ntk", "yarn", "llama3", "longrope", "none", "search"]

ROPE_SETTINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("theta", "scale", "attention_factor"),
    "ntk": ("theta", "attention_factor"),
    "yarn": ("theta", "scale", "attention_factor", "beta_fast", "beta_slow"),
    "llama3": ("theta", "scale", "attention_factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("theta", "attention_factor", "short_factor", "long_factor"),
}
"""What each method reads of `RopeSettings`."""

Definition = Literal["sliding", "transformers", "lm-eval", "yarn", "yarn-truncated", "longlora"]
RulerTask = Literal["niah_single", "niah_multikey", "variable_tracking", "common_words", "frequent_words"]
RULER_TASKS: tuple[RulerTask, ...] = (
    "niah_single",
    "niah_multikey",
    "variable_tracking",
    "common_words",
    "frequent_words",
)

_REQUIRE_KEY = re.compile(
    r"(ppl|ppl_ratio|tail_ppl|tail_ppl_ratio|kv_ratio|kernel_max_diff|effective_length)(@[1-9][0-9]{0,9})?(/[\w.-]+)?"
    r"|(task|task_drop)@[\w.:+-]+(/[\w.,+-]+)?"
)
_BOUND = re.compile(r"\s*(<=|>=|<|>)\s*((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB)?\s*", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

NAME = r"^[A-Za-z0-9][\w.-]*$"
"""What a recipe or a suite may be called: it names a folder."""

# The widest range of each kind of number. What a model or a machine can hold of it is checked when both are known.
MOST_TOKENS = 2**31 - 1
"""The longest window: engines count positions in 32 bits."""
MOST_READ = 10**12
"""Most tokens that a step is asked to read in all."""
MOST_SEED = 2**31 - 1
"""The largest seed: what is drawn from its neighbours stays below numpy's 2**32."""
SMALLEST_SHARD = 1000
"""Bytes: fewer would be a file for nearly every tensor of the smallest model."""

Length = Annotated[int, Field(ge=16, le=MOST_TOKENS)]
Divisor = Annotated[float, Field(ge=1e-3, le=MOST_TOKENS)]
Word = Annotated[str, Field(min_length=1, max_length=4096)]


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


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys and numbers that are not finite are errors, values do not change
    after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: object, info: ValidationInfo) -> object:
        """`true`, `yes` and `on` are no numbers, whatever Python counts them as."""
        some = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in some) and _counts(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must be a number, not true or false")
        return value


def _counts(annotation: object) -> bool:
    """Whether a type is that of a number, or holds one."""
    return annotation in (int, float) or any(map(_counts, get_args(annotation)))


class TextSource(Section):
    """One source of text.

    source: `python-docs` | `python-stdlib` | `self` (the original model's own samples) | a text/JSONL/parquet file |
    a folder of such files | `hub:DATASET[:CONFIG]`. A plain string in YAML is short for {source: ...}.
    weight: its share of a mix. field: the key that holds the text in JSONL, parquet and hub rows.
    """

    source: Word
    weight: float = Field(1.0, ge=1e-6, le=1e6)
    field: Word = "text"
    split: Word = "train"

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value


def _mix(*names: str) -> tuple[TextSource, ...]:
    return tuple(TextSource(source=name) for name in names)


Texts = Annotated[tuple[TextSource, ...], Field(min_length=1, max_length=1000)]


class Calibration(Section):
    """Text that the calibration pass reads: of several kinds, because what is fitted to one kind fails on others."""

    text: Texts = Field(default_factory=lambda: _mix("python-docs", "python-stdlib", "self"))
    tokens: int = Field(49_152, ge=256, le=MOST_READ, description="tokens read in all")
    sequence_length: Length = Field(1024, description="tokens per sequence")
    averaged_tokens: int = Field(
        8192,
        ge=0,
        le=MOST_READ,
        description="tokens whose attention patterns weigh the values' directions; 0 takes values as they are",
    )


class Convert(Section):
    """Fewer KV heads."""

    kv_heads: int = Field(ge=1, le=65_536, description="KV heads per layer after conversion (G)")
    method: Method = "calibrated"
    repair: Literal["none", "o_proj", "transfer"] = Field(
        "o_proj", description="after the merge: a closed-form output projection; transfer trains each attention as well"
    )
    calibration: Calibration = Calibration()

    @property
    def calibrates(self) -> bool:
        """Whether the method reads calibration text."""
        return self.method not in ("first", "mean")


class RopeSettings(Section):
    """What of a position encoding is not its method's default; None leaves the default.

    theta: the base (for `ntk` instead of the one that follows from the factor). scale: what positions are divided by,
    where that is not length / original length. attention_factor: what cos and sin are multiplied with, in effect: the
    weights that make the queries hold what differs from the method's own, so that every engine computes it.
    short_factor, long_factor: one divisor of the frequency per rotary pair, up to the original length and beyond it.
    """

    theta: float | None = Field(None, ge=2, le=1e15)
    scale: float | None = Field(None, ge=1, le=MOST_TOKENS)
    attention_factor: float | None = Field(None, ge=0.1, le=10)
    beta_fast: float | None = Field(
        None, ge=1e-3, le=1e6, description="yarn: pairs that turn more often in the window are kept"
    )
    beta_slow: float | None = Field(
        None, ge=1e-3, le=1e6, description="yarn: pairs that turn less often are divided by the scale"
    )
    low_freq_factor: float | None = Field(None, ge=1e-3, le=1e6, description="llama3: as beta_slow")
    high_freq_factor: float | None = Field(None, ge=1e-3, le=1e6, description="llama3: as beta_fast")
    short_factor: tuple[Divisor, ...] | None = Field(None, min_length=1, max_length=4096)
    long_factor: tuple[Divisor, ...] | None = Field(None, min_length=1, max_length=4096)

    def unread_by(self, method: str) -> tuple[str, ...]:
        """Settings that are given and mean nothing to `method`."""
        given = [name for name in RopeSettings.model_fields if getattr(self, name) is not None]
        return tuple(name for name in given if name not in ROPE_SETTINGS.get(method, ()))


class Search(Section):
    """What `method: search` minimises, and for how long: tail loss at the new length + needle_weight x loss of the
    answers about hidden facts + native_weight x what the loss up to the original window rises, in nats per token."""

    tokens: int | None = Field(
        None,
        ge=1,
        le=MOST_READ,
        description="budget: what passes read, but a near-sighted one counts as a quarter; 12 x the length if left out",
    )
    native_weight: float = Field(1.0, ge=0, le=1e6)
    needle_weight: float = Field(0.1, ge=0, le=1e6)
    portable: bool = Field(
        True, description="only encodings that transformers, vLLM and llama.cpp read alike, as far as the linter knows"
    )
    text: Texts = Field(default_factory=lambda: _mix("python-docs", "python-stdlib"))

    def tokens_for(self, length: int) -> int:
        """The budget of a search over windows of `length` tokens."""
        return self.tokens or 12 * length


class Context(RopeSettings):
    """A longer window: exactly one of `length` (tokens) and `factor` (times the present window).

    method `none` writes the length and leaves the encoding as it is; `search` measures which one suits the model.
    Learned positions know `linear` only.
    """

    length: Length | None = None
    factor: float | None = Field(None, ge=1, le=MOST_TOKENS)
    method: RopeMethod = "yarn"
    search: Search | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Context:
        if (self.length is None) == (self.factor is None):
            raise ValueError("give exactly one of `length` and `factor`")
        unread = self.unread_by(self.method)
        if unread:
            raise ValueError(f"`{self.method}` does not read {', '.join(f'`{name}`' for name in unread)}")
        if self.method == "longrope" and (self.short_factor is None or self.long_factor is None):
            raise ValueError("`longrope` needs `short_factor` and `long_factor`, a number per rotary pair each")
        if self.search is not None and self.method != "search":
            raise ValueError(f"`search` is read by `method: search` only, not by `{self.method}`")
        return self

    def target(self, native: int) -> int:
        """Positions afterwards; native: those before."""
        return self.length or round(native * (self.factor or 1))

    @property
    def searches(self) -> Search | None:
        """How to search; None for a method that is named."""
        return (self.search or Search()) if self.method == "search" else None

    @property
    def settings(self) -> RopeSettings:
        """The settings without length and method."""
        return RopeSettings(**{name: getattr(self, name) for name in RopeSettings.model_fields})


class Adapter(Section):
    """LoRA by peft. attention/mlp: which projections carry an adapter; norms/embeddings (learned positions with them):
    trained in full as well."""

    rank: int = Field(64, ge=1, le=65_536)
    alpha: int = Field(128, ge=1, le=131_072)
    dropout: float = Field(0.0, ge=0, le=0.9)
    attention: bool = True
    mlp: bool = True
    norms: bool = False
    embeddings: bool = False

    @model_validator(mode="after")
    def _somewhere(self) -> Adapter:
        if not (self.attention or self.mlp):
            raise ValueError("the adapter sits nowhere; set `attention: true` or `mlp: true` (or both)")
        return self


class Stage(Section):
    """One stage of a length schedule: `tokens` training tokens whose positions reach `length`."""

    length: Length
    tokens: int = Field(ge=1, le=MOST_READ)


class Recover(Section):
    """Short adapter training that wins the quality back, and where asked for teaches a longer window.

    positions: with `full` a row's tokens stand at 0, 1, 2, ...; with `pose` (arXiv 2309.10400) a row is cut into
    `pose_chunks` chunks whose positions skip ahead at random, up to the length of the window, so that rows of
    `sequence_length` tokens train long distances. stages: with `pose` the length that skips reach, with `full` the
    length of the rows (divisors of `sequence_length`, which the longest stage has); one learning-rate schedule spans
    all stages, and `tokens` is their sum.
    """

    loss: Literal["distill", "lm"] = "distill"
    tokens: int = Field(200_000, ge=1, le=MOST_READ, description="training tokens in all")
    sequence_length: Length = 1024
    positions: Literal["full", "pose"] = "full"
    pose_chunks: int = Field(2, ge=2, le=65_536, description="with pose: chunks of a row")
    short_share: float = Field(
        0.35, ge=0, lt=1, description="with pose: share of rows that keep ordinary positions, for short-context quality"
    )
    document_masking: bool = Field(
        False, description="packed documents do not see each other and count their positions from 0"
    )
    stages: tuple[Stage, ...] = Field((), max_length=1000)
    batch_size: int = Field(1, ge=1, le=65_536, description="sequences per optimizer step and process")
    learning_rate: float | None = Field(
        None,
        ge=1e-9,
        le=1,
        description="the highest one of the schedule; by default 0.576 / hidden size: 1e-3 for 576 channels",
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, ge=1e-6, le=1e6)
    row_chunk: int = Field(512, ge=1, le=2**20, description="rows of logits that exist at one time in the loss")
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass instead of keeping them: slower, less memory. "
        "Turn on when they do not fit, for billions of parameters or many thousand tokens per step; "
        "a small model at 1,024 tokens gains nothing",
    )
    evals: int = Field(
        4, ge=1, le=10_000, description="how often the held-out loss is measured; the best adapter is kept"
    )
    eval_tokens: int = Field(8192, ge=64, le=MOST_READ)
    checkpoints: int = Field(4, ge=1, le=10_000, description="how often training can be resumed from")
    adapter: Adapter = Adapter()
    text: Texts = Field(default_factory=lambda: _mix("python-docs", "python-stdlib"))

    @model_validator(mode="before")
    @classmethod
    def _sum_of_stages(cls, value: object) -> object:
        stages = value.get("stages") if isinstance(value, dict) else None
        if not stages or "tokens" in value:  # type: ignore[operator]
            return value
        try:
            total = sum(Stage.model_validate(stage).tokens for stage in stages)
        except (ValidationError, TypeError):
            return value  # told with its line when the stages themselves are validated
        return {**value, "tokens": total}  # type: ignore[dict-item]

    @model_validator(mode="after")
    def _schedule(self) -> Recover:
        if self.positions == "pose" and self.document_masking:
            raise ValueError("with `positions: pose` a row is read as one text; leave out `document_masking`")
        if self.positions == "pose" and self.pose_chunks > self.sequence_length:
            raise ValueError(f"`pose_chunks` {self.pose_chunks} is more than `sequence_length` tokens")
        step = self.batch_size * self.sequence_length
        if not self.stages and self.tokens < step:
            raise ValueError(
                f"`tokens` is {self.tokens}, and one step reads {step}: `batch_size` rows of `sequence_length` tokens"
            )
        if not self.stages:
            return self
        total, longest = sum(stage.tokens for stage in self.stages), max(stage.length for stage in self.stages)
        if self.tokens != total:
            raise ValueError(f"`tokens` is {self.tokens}, the stages' sum is {total}; leave `tokens` out")
        if self.positions == "pose":
            short = [stage.length for stage in self.stages if stage.length <= self.sequence_length]
            if short:
                raise ValueError(
                    f"a stage of length {short[0]} leaves rows of {self.sequence_length} tokens nothing to skip"
                )
        elif longest != self.sequence_length or any(self.sequence_length % stage.length for stage in self.stages):
            raise ValueError(
                f"with `positions: full` the stages' lengths divide `sequence_length` ({self.sequence_length}), "
                "and the longest is equal to it"
            )
        return self


NEEDLE_KEYS = 12  # names that needles in one haystack are told apart by


class Needle(Section):
    """Needle in a haystack: lengths x depths x samples, each prompt exactly as long as asked for."""

    test: Literal["needle", "passkey"] = "needle"
    lengths: tuple[Annotated[int, Field(ge=64, le=MOST_TOKENS)], ...] = Field(min_length=1, max_length=100)
    depths: int = Field(5, ge=1, le=1000, description="depths from 0 to 1")
    samples: int = Field(1, ge=1, le=10_000, description="needles per length and depth")
    together: bool = Field(
        False, description="the needles of all depths in one haystack, with a key each: one pass a length, and harder"
    )

    _ascending = field_validator("lengths")(lambda value: tuple(sorted(set(value))))

    @model_validator(mode="after")
    def _keys(self) -> Needle:
        if self.together and (self.test != "needle" or self.depths > NEEDLE_KEYS):
            raise ValueError(f"`together` needs the test `needle`, with {NEEDLE_KEYS} depths at most: a key for each")
        return self


class Ruler(Section):
    """RULER's tasks that need no data: retrieval, variable tracking, common and frequent words."""

    tasks: tuple[RulerTask, ...] = Field(RULER_TASKS, min_length=1)
    lengths: tuple[Annotated[int, Field(ge=256, le=MOST_TOKENS)], ...] = Field(min_length=1, max_length=100)
    samples: int = Field(1, ge=1, le=10_000, description="texts per task and length")

    _ascending = field_validator("lengths")(lambda value: tuple(sorted(set(value))))


class Tasks(Section):
    """Tasks of lm-evaluation-harness (the extra `eval`), asked of every model in the same words.

    names: of the harness's own tasks and groups, of those in `folder`, or YAML files of a task or group. folder: YAML
    files of tasks of one's own, which go before the harness's own of the same name.
    """

    names: tuple[Word, ...] = Field(min_length=1, max_length=1000)
    folder: Word | None = None
    fewshot: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="examples before each question; by default, and where a task fixes 0, the task's own",
    )
    limit: int | None = Field(
        None, ge=1, le=10**9, description="questions of each task, from its beginning; by default all"
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

    lengths: tuple[Length, ...] = Field((1024, 2048, 4096, 8192), min_length=1, max_length=100)
    text: Texts = Field(default_factory=lambda: _mix("python-docs", "python-stdlib"))
    documents: int = Field(
        2, ge=1, le=10**6, description="documents per source, each at least as long as the longest length"
    )
    tail: int = Field(1024, ge=1, le=MOST_TOKENS, description="TailPPL(L) looks at the last `tail` tokens before L")
    chunk: int = Field(512, ge=1, le=MOST_TOKENS, description="tokens per forward chunk")
    dtype: Dtype = "auto"
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")
    cost_lengths: tuple[Annotated[int, Field(ge=1, le=MOST_TOKENS)], ...] = Field(
        (512, 2048),
        max_length=100,
        description="lengths, cut to the window, at which prefill, decoding and memory are measured; [] skips it",
    )
    decode_tokens: int = Field(
        64, ge=0, le=8192, description="tokens decoded at each of `cost_lengths`; 0 measures the prefill"
    )
    document_tokens: Length | None = Field(
        None, description="tokens read of each document, for windows that move; by default the longest length"
    )
    context_gain: bool = Field(
        False, description="beyond the native length: does the longer context lower the loss of the same tokens?"
    )
    long_ppl: bool = Field(False, description="perplexity of the tokens that a context beyond 4,096 makes predictable")
    definitions: tuple[Definition, ...] = Field((), max_length=100, description="perplexities as others define them")
    stride: int = Field(
        256, ge=1, le=MOST_TOKENS, description="tokens that the windows of `definitions: [sliding]` move by"
    )
    needle: Needle | None = None
    ruler: Ruler | None = None
    tasks: Tasks | None = None

    @field_validator("lengths", "cost_lengths")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


class Publish(Section):
    """The checkpoint that can be published."""

    license: str | None = Field(None, description="license id for the card; by default the source model's own")
    license_name: str | None = Field(
        None, min_length=1, max_length=200, description="with the license `other`: its name; by default the source's"
    )
    license_link: str | None = Field(None, description="with the license `other`: where its text is")
    base_model: str | None = Field(None, description="hub id of the source for the card, when it cannot be known")
    max_shard_size: str = Field("5GB", description="most bytes of a weight file: 500MB, 5GB; 1KB at least")
    reload_tokens: Length = Field(1024, description="tokens per document that a fresh process scores again")

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
    """A whole run: load -> convert -> extend -> recover -> evaluate -> publish."""

    name: str = Field(pattern=NAME, max_length=100)
    description: str = Field("", max_length=100_000)
    model: Word | None = Field(None, description="hub id | folder | .gguf file | `embedded`; `--model` overrides it")
    revision: Word | None = None
    dtype: Dtype = Field("auto", description="dtype of the written weights; auto is the source's own")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0, le=MOST_SEED)
    kernel: Kernel = "auto"
    link: bool = Field(
        False,
        description="hard links instead of copies of unchanged weights; who writes into one of them changes all",
    )
    convert: Convert | None = None
    context: Context | None = None
    recover: Recover | None = None
    evaluate: Evaluate | None = Evaluate()
    publish: Publish | None = Publish()
    require: dict[str, str] = Field(default_factory=dict, max_length=1000)

    @field_validator("require")
    @classmethod
    def _requirements(cls, value: dict[str, str]) -> dict[str, str]:
        for key, bound in value.items():
            if not _REQUIRE_KEY.fullmatch(key):
                raise ValueError(
                    f"`{shown(key, 60)}` is not a metric; write ppl, ppl_ratio, tail_ppl or tail_ppl_ratio with "
                    "@LENGTH and optionally /SOURCE, or task@NAME, task_drop@NAME, kv_ratio, kernel_max_diff, "
                    "effective_length"
                )
            if parse_bound(bound) is None:
                raise ValueError(f"`{shown(bound, 60)}` is not a bound; write for example '<= 1.5'")
        return value

    @model_validator(mode="after")
    def _steps(self) -> Recipe:
        if self.require and self.evaluate is None:
            raise ValueError("`require` needs `evaluate`: a requirement is checked on what was measured")
        return self
