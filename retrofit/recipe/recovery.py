"""What wins quality back: a short adapter training (`recover`)."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from retrofit.recipe.relative import are_relative
from retrofit.recipe.values import (
    LISTED,
    MOST_READ,
    AnyLength,
    LossOn,
    Section,
    TextSource,
    Tokens,
    TrainingTexts,
    text_mix,
)

Tracker = Literal["tensorboard", "wandb", "trackio"]
TRIES = 3  # learning rates that are tried where the best is to be found
PROBE_SHARE, PROBE_LEAST, PROBE_MOST = 12, 8, 32  # each for a twelfth of the steps, for 8 at least and 32 at most
Divergence = Literal["forward", "reverse", "jsd"]
Positions = Literal["full", "pose"]
Loss = Literal["distill", "lm"]


class Adapter(Section):
    """LoRA by peft."""

    rank: int = Field(64, ge=1, le=65_536, description="LoRA rank")
    alpha: int = Field(128, ge=1, le=131_072, description="LoRA's scale times the rank; by default twice the rank")
    dropout: float = Field(0.0, ge=0, le=0.9, description="dropout before each adapter")
    attention: bool = Field(True, description="adapters on q, k, v and o")
    mlp: bool = Field(True, description="adapters on the MLP's projections")
    norms: bool = Field(False, description="train the norms as well, in full")
    embeddings: bool = Field(False, description="train the embeddings, and learned positions, as well, in full")

    sinks: bool = Field(True, description="train the attention sinks as well, where the model has any")

    @model_validator(mode="before")
    @classmethod
    def _alpha_of_rank(cls, value: object) -> object:
        if not isinstance(value, dict) or "alpha" in value:
            return value
        rank = str(value.get("rank", 64))
        known = rank.isascii() and rank.isdigit() and 1 <= int(rank[:9]) <= 65_536  # else the rank is refused itself
        return {**value, "alpha": 2 * int(rank)} if known else value

    @model_validator(mode="after")
    def _somewhere(self) -> Adapter:
        if not (self.attention or self.mlp):
            raise ValueError("the adapter sits nowhere; set `attention: true` or `mlp: true` (or both)")
        return self


class Distribute(Section):
    """How the processes of a launcher share the training. replicas x shard x sequence is their number.

    The replicas follow: each trains its share of a step's rows, and so do the processes of `shard`; those of `sequence`
    share every row.
    """

    shard: Literal["auto"] | Annotated[int, Field(ge=1, le=65_536)] = Field(
        "auto",
        description="processes over which the weights of both models are split (FSDP2); auto splits them over all "
        "where they do not fit one device",
    )
    sequence: int = Field(1, ge=1, le=4096, description="processes that share the tokens of every row")


class Stage(Section):
    """One stage of a schedule: how many tokens it trains on, in which rows, at which positions, by which loss.

    What a stage leaves out is that of the section.
    """

    tokens: Tokens = Field(ge=1, le=MOST_READ, description="training tokens of this stage")
    length: AnyLength | None = Field(
        None,
        description="the length that positions reach: with `pose` the context by default, with `full` that of the rows",
    )
    sequence_length: AnyLength | None = Field(
        None,
        description="tokens per row, a divisor of the section's; with `full` also `length` says so",
    )
    positions: Positions | None = Field(None, description="`full` or `pose`, as in the section")
    loss: Loss | None = Field(
        None, description="`lm` for rows longer than the original's window, of which it has nothing to teach"
    )
    short_length: AnyLength | None = Field(
        None,
        description="with `full`: `short_share` of the steps read texts of this length, a divisor of the rows', by the "
        "section's loss",
    )


class Recover(Section):
    """Short adapter training that wins the quality back, and where asked for teaches a longer context.

    With `positions: full` a row's tokens stand at 0, 1, 2, ...; with `pose` (arXiv 2309.10400) a row is cut into
    `pose_chunks` chunks whose positions skip ahead at random, up to the context length, so that rows of
    `sequence_length` tokens train long distances. One learning-rate schedule spans all stages, `tokens` is their sum,
    and every step reads as many. The original teaches rows that lie within its own window, also where their positions
    skip beyond it; longer rows are learned from the text (`loss: lm` of their stage).
    """

    loss: Loss = Field("distill", description="follow the original model's distribution, or predict the text alone")
    divergence: Divergence = Field(
        "forward",
        description="with distill: what is made small; `forward` KL(original || student), `reverse` KL(student || "
        "original), or `jsd`, half of each towards their mean",
    )
    on_policy: float = Field(
        0.0, ge=0, le=1, description="with distill: share of the rows that the student writes itself while it trains"
    )
    tokens: Tokens = Field(200_000, ge=1, le=MOST_READ, description="training tokens in all")
    sequence_length: AnyLength = Field(1024, description="tokens per row")
    positions: Positions = Field("full", description="`pose`: short rows whose positions skip ahead within the context")
    pose_chunks: int = Field(2, ge=2, le=65_536, description="with pose: chunks of a row")
    short_share: float = Field(
        0.35,
        ge=0,
        lt=1,
        description="for quality at short lengths: share of rows that keep ordinary positions (pose), or of steps that "
        "read texts of a stage's `short_length`",
    )
    document_masking: bool = Field(
        False, description="packed documents do not see each other and count their positions from 0"
    )
    stages: tuple[Stage, ...] = Field(
        (),
        max_length=1000,
        description="a schedule of lengths, positions and losses; the rows of every stage divide `sequence_length`, "
        "which is that of the longest",
    )
    batch_size: int = Field(
        1,
        ge=1,
        le=65_536,
        description="sequences per optimizer step, on all processes together; a training that is begun on several "
        "processes has one for each by default",
    )
    distribute: Distribute = Field(Distribute(), description="how the processes of a launcher share the training")
    sequence_engine: Literal["auto", "torch", "ring"] = Field(
        "auto",
        description="what carries keys and values between the processes of `distribute.sequence`: torch's context "
        "parallelism on CUDA where it can express the model, else our ring",
    )
    learning_rate: float | None = Field(
        None,
        ge=1e-9,
        le=1,
        description="the highest one of the schedule; by default 0.576 / hidden size, 1e-3 for 576 channels; "
        "a fifth of it where sliding windows are all that changed",
    )
    find_learning_rate: bool = Field(
        False,
        description="first try a third of the learning rate, the rate itself and three times it for a few steps each, "
        "and take what learns best",
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's")
    max_grad_norm: float = Field(1.0, ge=1e-6, le=1e6, description="longer gradients are cut to this norm")
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
    eval_tokens: Tokens = Field(8192, ge=64, le=MOST_READ, description="tokens that the held-out loss is measured on")
    checkpoints: int = Field(4, ge=1, le=10_000, description="how often training can be resumed from")
    adapter: Adapter = Field(Adapter(), description="what is trained")
    text: TrainingTexts = Field(
        default_factory=lambda: (*text_mix("python-docs", "python-stdlib"), TextSource(source="self", weight=2)),
        description="text to train on; by default half of it is what the original model writes itself",
    )
    loss_on: LossOn = Field(
        "assistant",
        description="of dialogues: the loss is on the assistant's turns, or on every token; of synthetic text: on the "
        "answers, or on every token",
    )
    token_weights: Literal["even", "long"] = Field(
        "even",
        description="`long`: where rows are learned (`loss: lm`), a token counts by how much likelier the whole row "
        "makes it than the last 4,096 tokens before it, up to 5 times (LongCE, arXiv 2410.23771)",
    )
    allow_repeats: bool = Field(False, description="train on text that is read more than four times")
    keep_adapter: bool = Field(
        False,
        description="keep the adapter for peft as well, in the folder `<checkpoint>-adapter`",
    )
    report_to: Annotated[tuple[Tracker, ...], LISTED] = Field(
        (), max_length=len(get_args(Tracker)), description="where the Trainer logs the losses while it trains"
    )

    @model_validator(mode="before")
    @classmethod
    def _sum_of_stages(cls, value: object) -> object:
        stages = value.get("stages") if isinstance(value, dict) else None
        if not stages or "tokens" in value:  # type: ignore[operator]
            return value
        try:
            total = sum(Stage.model_validate(stage).tokens for stage in stages)
        except (ValidationError, TypeError):
            return value  # reported with its line when the stages themselves are validated
        return {**value, "tokens": total}  # type: ignore[dict-item]

    @model_validator(mode="after")
    def _schedule(self) -> Recover:
        if self.divergence != "forward" and not distils(self):
            raise ValueError(f"`divergence: {self.divergence}` compares with the original; it needs `loss: distill`")
        if self.token_weights == "long" and all(stage.loss != "lm" for stage in stages_of(self)):
            raise ValueError("`token_weights: long` is for rows that are learned; give a stage `loss: lm`")
        if self.token_weights == "long" and self.document_masking:
            raise ValueError("with `document_masking` no token sees a whole row; leave out `token_weights: long`")
        if self.on_policy and not distils(self):
            raise ValueError(
                "what the student writes itself (`on_policy`) has to be judged by the original: use `loss: distill`"
            )
        lengths = [
            one for stage in self.stages for one in (stage.length, stage.sequence_length, stage.short_length) if one
        ]
        if self.document_masking and any(stage.positions == "pose" for stage in stages_of(self)):
            raise ValueError("with `positions: pose` a row is read as one text; leave out `document_masking`")
        if are_relative(self.sequence_length, *lengths):
            return self  # validated once more when the lengths are known
        step = self.batch_size * self.sequence_length
        if self.find_learning_rate and self.tokens < PROBE_SHARE * PROBE_LEAST * step:
            raise ValueError(
                f"`find_learning_rate` needs {PROBE_SHARE * PROBE_LEAST} steps to try rates in a few of them, and "
                f"`tokens` {self.tokens} are {self.tokens // step}; leave it out"
            )
        if not self.stages and self.tokens < step:
            raise ValueError(
                f"`tokens` is {self.tokens}, and one step reads {step}: `batch_size` rows of `sequence_length` tokens"
            )
        for stage in stages_of(self):
            _require_rows(self, stage)
        if not self.stages:
            return self
        total = sum(stage.tokens for stage in self.stages)
        longest = max(stage.sequence_length or 0 for stage in stages_of(self))
        if self.tokens != total:
            raise ValueError(f"`tokens` is {self.tokens}, the stages' sum is {total}; leave `tokens` out")
        if longest != self.sequence_length:
            raise ValueError(
                f"the rows of the longest stage have {longest} tokens, `sequence_length` is {self.sequence_length}; "
                "give it the longest stage's"
            )
        return self


def stages_of(recover: Recover) -> tuple[Stage, ...]:
    """The stages with what they leave out, one where there are none; `length` stays open where it is the context."""
    given = recover.stages or (Stage(tokens=recover.tokens),)
    return tuple(_filled(recover, stage) for stage in given)


def distils(recover: Recover) -> bool:
    """Whether the original model teaches some of the rows."""
    stages = stages_of(recover)
    return any(s.loss == "distill" or (s.short_length is not None and recover.loss == "distill") for s in stages)


def text_lengths(recover: Recover) -> frozenset[int]:
    """Tokens of the texts that are read in one piece."""
    stages = stages_of(recover)
    return frozenset(one for stage in stages for one in (stage.sequence_length, stage.short_length) if one is not None)


def _filled(recover: Recover, stage: Stage) -> Stage:
    positions, rows = stage.positions or recover.positions, stage.sequence_length
    if rows is None:
        rows = (stage.length if positions == "full" else None) or recover.sequence_length
    length = stage.length if positions == "pose" else stage.length or rows
    loss = stage.loss or recover.loss
    return stage.model_copy(update={"positions": positions, "sequence_length": rows, "length": length, "loss": loss})


def _require_rows(recover: Recover, stage: Stage) -> None:
    """ValueError for a stage, with what it leaves out, whose lengths contradict each other or the section's."""
    rows, length, short = stage.sequence_length, stage.length, stage.short_length
    assert rows is not None
    if recover.sequence_length % rows:
        raise ValueError(f"the rows of a stage divide `sequence_length` ({recover.sequence_length}), and {rows} do not")
    if stage.positions == "pose":
        if recover.pose_chunks > rows:
            raise ValueError(f"`pose_chunks` {recover.pose_chunks} is more than `sequence_length` tokens")
        if length is not None and length <= rows:
            raise ValueError(f"a stage of length {length} leaves rows of {rows} tokens nothing to skip")
        if short is not None:
            raise ValueError("`short_length` is for `positions: full`; with `pose` short rows keep their length")
    elif length != rows:
        raise ValueError(f"with `positions: full` rows of {rows} tokens do not reach a `length` of {length}")
    if short is not None and (short >= rows or rows % short):
        raise ValueError(f"`short_length` {short} is no divisor of rows of {rows} tokens that is shorter than they are")
