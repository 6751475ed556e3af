"""The position encodings that a search may choose from: published defaults, and points between and around them.

All are fixed frequencies of native types, so that every length comes from one pass and stock engines read the winner.
Three families: a larger base (`ntk`), `llama3` and `yarn`, the last two with a base of their own as well. A base larger
by m and a divisor f stretch the slowest rotary pair by m^((d-2)/d) f together, d being the rotated dimensions. Each may
have any attention factor around yarn's own formula, which the weights hold (`temperature`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrofit.context.engines import unread
from retrofit.context.fields import as_dict, rotary_dim, text_part, views
from retrofit.context.frequencies import yarn_attention_factor
from retrofit.context.rope import extend_and_plan
from retrofit.errors import UserError
from retrofit.recipe.schema import RopeMethod, RopeSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PUBLISHED: tuple[RopeMethod, ...] = ("yarn", "ntk", "llama3", "linear")
"""Methods whose defaults are always tried; the first is what a winner is compared with to the end."""
FIRST, SECOND = 16, 4  # a pass of the first and the second rung counts as this part of one over the whole window
NEAR = 32  # the second rung's middle sees this part of the window
TAIL = 2048  # tokens that the tail loss looks at
GENTLER = (0.5, 0.75, 0.25)  # of yarn's own excess over 1: attention factors for its other defaults
STEEPEST = 1.5  # times yarn's own excess over 1, the largest attention factor tried
MOST = 10_000  # encodings that one search tries; all of them are in memory
SHORTEST = 256  # tokens of a pass, or the whole window where that is shorter


@dataclass(frozen=True)
class Candidate:
    """One position encoding. config: the whole configuration with it; query_scale: as of `Extension`; published: a
    method's own defaults; gentler: yarn's with a smaller attention factor."""

    method: RopeMethod
    settings: RopeSettings
    config: PretrainedConfig
    query_scale: float = 1.0
    published: bool = False
    gentler: bool = False

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        given = {name: value for name, value in self.settings.model_dump().items() if value is not None}
        return " ".join([self.method, *(f"{name} {value:g}" for name, value in given.items())])


def candidates(
    config: PretrainedConfig, *, length: int, count: int, portable: bool = True, seed: int = 0, held: float = 1.0
) -> tuple[Candidate, ...]:
    """Up to `count` different encodings of a window of `length` tokens, the published ones first.

    portable: none that vLLM or llama.cpp was seen to compute otherwise than transformers; without it yarn's scale is
    free as well. held: what earlier extensions multiplied the queries with. The same arguments give the same
    candidates.

    Raises: UserError where no method can extend this model.
    """
    _, text = text_part(as_dict(config))
    view = next((view for view in views(text) if view.layer_type in (None, "full_attention")), None)
    if view is None or view.parameters.get("rope_theta") is None:
        raise UserError(
            "there is no rotary position encoding with a theta to search from",
            where="context.method: search",
            fix="use `method: linear` for learned positions, or leave `context` out",
        )
    theta, dim = float(view.parameters["rope_theta"]), rotary_dim(text, view.parameters)
    stretch = length / text["max_position_embeddings"]
    known = unread(config)
    found: list[Candidate] = []
    refused: UserError | None = None
    wanted = [(method, RopeSettings()) for method in PUBLISHED]
    excess = yarn_attention_factor(stretch) - 1
    wanted += [("yarn", RopeSettings(attention_factor=_digits(1 + share * excess))) for share in GENTLER]
    # More than asked for: some cannot be put on this model, or are read differently elsewhere.
    wanted += [one for _, one in zip(range(8 * count), _points(theta, dim, stretch, portable, seed), strict=False)]
    clamped = text.get("clip_qkv") is not None  # such queries hold no attention factor
    if clamped:
        wanted = [(method, one.model_copy(update={"attention_factor": None})) for method, one in wanted]
        wanted = list(dict.fromkeys(wanted))
    for index, (method, settings) in enumerate(wanted):
        if len(found) >= count:
            break
        try:
            extended, done = extend_and_plan(config, length=length, method=method, settings=settings, held=held)
        except UserError as error:
            refused = refused or error
            continue
        published = index < len(PUBLISHED)
        gentler = not clamped and not published and index < len(PUBLISHED) + len(GENTLER)
        if not portable or unread(extended) <= known:
            found.append(Candidate(method, settings, extended, done.query_scale, published, gentler))
    if not found:
        raise refused or UserError(
            "vLLM or llama.cpp computes something else with every method on this model",
            where="context.search.portable",
            fix="write `portable: false` to search what transformers alone reads",
        )
    return tuple(found)


def rungs(length: int, tokens: int) -> tuple[tuple[int, int], ...]:
    """(tokens that a pass counts as, passes) of each rung within a budget of `tokens`.

    Raises: UserError for a budget that does not let two encodings read the whole window, or is for more than `MOST`.
    """
    sizes = sorted({min(length, max(SHORTEST, length // share)) for share in (FIRST, SECOND, 1)})
    plan = tuple((size, tokens // len(sizes) // size) for size in sizes)
    if plan[-1][1] < 2:
        raise UserError(
            f"a search over {length} tokens needs a budget of {2 * len(sizes) * length} tokens at least, not {tokens}",
            where="context.search.tokens",
            fix="raise it, or leave it out",
        )
    if plan[0][1] > MOST:
        raise UserError(
            f"a budget of {tokens} tokens is one for {plan[0][1]:,} encodings, and at most {MOST:,} are tried",
            where="context.search.tokens",
            fix=f"lower it to {MOST * len(sizes) * sizes[0]} at most, or leave it out",
        )
    return plan


def _points(
    theta: float, dim: int, stretch: float, portable: bool, seed: int
) -> Iterator[tuple[RopeMethod, RopeSettings]]:
    """Endless (method, settings), the families in turn, each spread evenly over its own box."""
    rng = np.random.default_rng(seed)
    exponent = dim / max(dim - 2, 1)

    def base(by: float) -> float:
        """The theta that stretches the slowest pair `by` times, to three digits."""
        return float(f"{theta * by**exponent:.3g}")

    while True:
        for u in _latin(rng, 8, 5):
            total = stretch * _between(0.75, 2.5, u[0])  # a little less than the length asks for, or a good deal more
            share = u[1]  # of it that the divisor does, the rest the base
            factor = _digits(1 + u[4] * STEEPEST * (yarn_attention_factor(stretch) - 1))
            yield "ntk", RopeSettings(theta=base(total), attention_factor=factor)
            low = _between(0.5, 4, u[2])
            yield (
                "llama3",
                RopeSettings(
                    theta=base(total ** (1 - share)),
                    scale=_digits(max(1.0, total**share)),
                    attention_factor=factor,
                    low_freq_factor=_digits(low),
                    high_freq_factor=_digits(low * _between(1.5, 8, u[3])),
                ),
            )
            slow = _between(0.5, 4, u[2])
            yarn = {
                "beta_slow": _digits(slow),
                "beta_fast": _digits(slow * _between(3, 64, u[3])),
                "attention_factor": factor,
            }
            if portable:  # vLLM takes the window from yarn's scale
                yield "yarn", RopeSettings(theta=base(_between(1, 4, share)), **yarn)
            else:
                scale = _digits(max(1.0, total**share))
                yield "yarn", RopeSettings(theta=base(total ** (1 - share)), scale=scale, **yarn)


def _latin(rng: np.random.Generator, points: int, dimensions: int) -> np.ndarray:
    """A Latin hypercube [points, dimensions] in [0, 1)."""
    order = np.stack([rng.permutation(points) for _ in range(dimensions)], axis=1)
    return np.asarray((order + rng.random((points, dimensions))) / points)


def _between(low: float, high: float, share: float) -> float:
    """Log-uniform from `low` to `high`."""
    return float(low * (high / low) ** share)


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
