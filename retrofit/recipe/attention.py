"""What changes a model's attention: fewer KV heads (`convert`), sliding windows (`window`) and a longer context
(`context`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retrofit.recipe.layers import FULL_LAYERS, Layer
from retrofit.recipe.relative import RELATIVE_HEADS
from retrofit.recipe.values import (
    MOST_READ,
    MOST_TOKENS,
    TOKEN_COUNT,
    AnyLength,
    Divisor,
    Length,
    Section,
    Texts,
    Tokens,
    text_mix,
)

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


class Calibration(Section):
    """Text that the calibration pass reads: of several kinds, because what is fitted to one kind fails on others."""

    text: Texts = Field(
        default_factory=lambda: text_mix("python-docs", "python-stdlib", "self"), description="text to calibrate on"
    )
    tokens: Tokens = Field(49_152, ge=256, le=MOST_READ, description="tokens read in all")
    sequence_length: Length = Field(1024, description="tokens per sequence")
    averaged_tokens: Tokens = Field(
        8192,
        ge=0,
        le=MOST_READ,
        description="tokens whose attention patterns weigh the values' directions; 0 takes values as they are",
    )


class Convert(Section):
    """Fewer KV heads."""

    kv_heads: Annotated[int, Field(ge=1, le=65_536), RELATIVE_HEADS] = Field(
        description="KV heads per layer after conversion (G), or a share of the model's: 1/4"
    )
    method: Method = Field(
        "calibrated", description="how KV heads are merged: `calibrated` keeps most; `mean` and `first` read no text"
    )
    repair: Literal["none", "o_proj", "transfer"] = Field(
        "o_proj", description="after the merge: a closed-form output projection; transfer trains each attention as well"
    )
    calibration: Calibration = Field(Calibration(), description="the text that the method and the repair read")

    @property
    def calibrates(self) -> bool:
        """Whether the method reads calibration text."""
        return self.method not in ("first", "mean")


class WindowCalibration(Section):
    """Text that windows are fitted and measured on: documents that are longer than what a window shows."""

    text: Texts = Field(
        default_factory=lambda: text_mix("python-docs", "python-stdlib"), description="text to fit windows on"
    )
    tokens: Tokens = Field(65_536, ge=256, le=MOST_READ, description="tokens read in all")
    sequence_length: Length | None = Field(
        None,
        description="tokens per sequence, twice the window at least; by default four windows, or the model's context",
    )
    measured_tokens: Tokens = Field(
        8192, ge=256, le=MOST_READ, description="tokens of other text that losses are measured on, layer by layer"
    )

    def in_sequences(self, length: int) -> Calibration:
        """What is read, in sequences of `length` tokens."""
        return Calibration(text=self.text, tokens=self.tokens, sequence_length=length)


class Window(Section):
    """Sliding windows in the layers that look back a short way only."""

    size: Length = Field(1024, description="tokens that a windowed layer sees, the present one included")
    full_layers: Annotated[Literal["auto"] | Layer | str | tuple[Layer, ...], FULL_LAYERS] = Field(
        "auto",
        description="layers that still see everything: their number, or their share (1/4), chosen by measuring; `auto` "
        "measures how many; or a list of layers",
    )
    sinks: Literal["fitted", "none"] = Field(
        "fitted", description="a logit for each windowed head that takes the probability of what is out of sight"
    )
    target: Literal["auto", "granite_swa", "mistral"] = Field(
        "auto",
        description="architecture that is written: `granite_swa` (of experts: `granitemoe_swa`) holds windows by "
        "layer and sinks, `mistral` windows alone; `auto` keeps one that has windows by layer, and else chooses",
    )
    repair: Literal["none", "o_proj"] = Field(
        "o_proj", description="after the windows: a closed-form output projection, where that costs no answers"
    )
    text_loss: float = Field(
        0.02, gt=0, le=100, description="with `auto`: nats per token of text that one layer's window may add"
    )
    answer_loss: float = Field(
        0.1, gt=0, le=100, description="with `auto`: the same of answers that lie outside of the window"
    )
    calibration: WindowCalibration = Field(WindowCalibration(), description="the text that windows are fitted on")


class RopeSettings(Section):
    """What of a position encoding is not its method's default; None leaves the default."""

    theta: float | None = Field(
        None, ge=2, le=1e15, description="the base; for `ntk` instead of the one that follows from the factor"
    )
    scale: float | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="what positions are divided by, where that is not length / original length",
    )
    attention_factor: float | None = Field(
        None,
        ge=0.1,
        le=10,
        description="what cos and sin are multiplied with, in effect, instead of the method's own: the query weights "
        "hold it, so that every engine computes it",
    )
    beta_fast: float | None = Field(
        None, ge=1e-3, le=1e6, description="yarn: pairs that turn more often within the original length are kept"
    )
    beta_slow: float | None = Field(
        None, ge=1e-3, le=1e6, description="yarn: pairs that turn less often are divided by the scale"
    )
    low_freq_factor: float | None = Field(None, ge=1e-3, le=1e6, description="llama3: as beta_slow")
    high_freq_factor: float | None = Field(None, ge=1e-3, le=1e6, description="llama3: as beta_fast")
    short_factor: tuple[Divisor, ...] | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="longrope: a divisor of the frequency per rotary pair, up to the original length",
    )
    long_factor: tuple[Divisor, ...] | None = Field(
        None, min_length=1, max_length=4096, description="longrope: the same beyond the original length"
    )

    def unread_by(self, method: str) -> tuple[str, ...]:
        """Settings that are given and mean nothing to `method`."""
        given = [name for name in RopeSettings.model_fields if getattr(self, name) is not None]
        return tuple(name for name in given if name not in ROPE_SETTINGS.get(method, ()))


class Search(Section):
    """What `method: search` minimises, and for how long: tail loss at the new length + needle_weight x loss of the
    answers about hidden facts + native_weight x what the loss up to the original length rises, in nats per token."""

    tokens: Annotated[int, Field(ge=1, le=MOST_READ), TOKEN_COUNT] | None = Field(
        None,
        description="budget of a search: what passes read, but a near-sighted one counts as a quarter; by default 12 x "
        "the length",
    )
    native_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the loss up to the original length")
    needle_weight: float = Field(0.1, ge=0, le=1e6, description="weight of the answers about hidden facts")
    portable: bool = Field(
        True,
        description="no encoding that vLLM or llama.cpp was seen to compute otherwise than transformers",
    )
    text: Texts = Field(
        default_factory=lambda: text_mix("python-docs", "python-stdlib"), description="text that a search reads"
    )

    def tokens_for(self, length: int) -> int:
        """The budget of a search over windows of `length` tokens."""
        return self.tokens or 12 * length


class Context(RopeSettings):
    """A longer context: exactly one of `length` (tokens) and `factor` (times the present length).

    Learned positions know the method `linear` only.
    """

    length: AnyLength | None = Field(None, description="positions afterwards; 4x is four times as many")
    factor: float | None = Field(None, ge=1, le=MOST_TOKENS, description="or: this many times as many")
    method: RopeMethod = Field(
        "yarn",
        description="how positions beyond the original ones are encoded; `none` writes only the length, `search` "
        "measures which method suits the model",
    )
    search: Search | None = Field(None, description="how `method: search` measures")

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
