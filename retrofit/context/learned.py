"""A longer window for models with a table of learned positions: the table is interpolated, as RoPE's angles are.

Row p of the new table reads the old one at p (N - 1) / (M - 1), between its two nearest rows: both ends stay, nothing
is extrapolated, and M = N is the identity. That is position interpolation (arXiv 2306.15595) for a table.

Legend: N rows before, M rows after, C model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import UserError
from retrofit.recipe.schema import RopeSettings

if TYPE_CHECKING:
    from torch import Tensor

    from retrofit.checkpoint.read import Checkpoint


@dataclass(frozen=True)
class Table:
    """Where a family keeps its positions: possible tensor names, and rows before the first position."""

    names: tuple[str, ...]
    offset: int = 0


TABLES = {
    "gpt2": Table(("transformer.wpe.weight", "wpe.weight")),
    "gpt_bigcode": Table(("transformer.wpe.weight", "wpe.weight")),
    "opt": Table(("model.decoder.embed_positions.weight", "decoder.embed_positions.weight"), offset=2),
}
_LENGTHS = ("n_positions", "n_ctx", "max_position_embeddings")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old checkpoints store, as wide as the old window


def has_table(text: Mapping[str, Any]) -> bool:
    """Whether the family of this configuration learns its positions."""
    return str(text.get("model_type")) in TABLES


def require_interpolation(method: str, settings: RopeSettings) -> None:
    """Raises UserError for every method but `linear`, and for settings of RoPE."""
    if method != "linear" or settings != RopeSettings():
        raise UserError(
            f"The model has learned positions, not RoPE: `{method}` has nothing to change"
            if method != "linear"
            else "The model has learned positions, not RoPE: theta and scale mean nothing to it",
            where="context.method" if method != "linear" else "context",
            fix="use `method: linear` without settings, which interpolates the table of positions",
        )


def fields(text: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The fields of `config.json` that hold the window, as the file names them."""
    return {name: length for name in _LENGTHS if name in text}


def note(before: int, length: int) -> str:
    """What a person should know of such an extension."""
    return (
        f"Learned positions: the table of {before} positions is interpolated to {length}, so the weights are "
        "rewritten and every position changes; without a training the quality falls at all lengths."
    )


def interpolate(table_NC: Tensor, rows: int, offset: int = 0) -> Tensor:
    """The table with `rows` positions, [offset + rows, C] in float32; the first `offset` rows stay as they are."""
    import torch

    head, old = table_NC[:offset].float(), table_NC[offset:].float()
    at = torch.arange(rows, dtype=torch.float64) * (len(old) - 1) / max(rows - 1, 1)
    low = at.floor().long().clamp(max=max(len(old) - 2, 0))
    weight = (at - low).float()[:, None]
    high = (low + 1).clamp(max=len(old) - 1)
    return torch.cat([head, old[low] * (1 - weight) + old[high] * weight])


def rewrite_table(checkpoint: Checkpoint, out: Path, config: Mapping[str, Any], before: int, length: int) -> None:
    """Write the checkpoint into the existing folder `out` with a table of `length` positions in place of `before`.

    Raises UserError when the table is not where the family keeps it, or has other rows than the configuration says.
    """
    from retrofit.checkpoint.rewrite import rewrite

    table = TABLES[str(checkpoint.config["model_type"])]
    name = next((name for name in table.names if name in checkpoint.entries), None)
    if name is None:
        raise UserError(
            "The checkpoint has no table of positions",
            where=f"{checkpoint.folder}: {table.names[0]}",
            fix="download the checkpoint again",
        )
    found = checkpoint.entries[name].shape[0] - table.offset
    if found != before:
        raise UserError(
            f"The table holds {found} positions, config.json says {before}",
            where=f"{checkpoint.folder}: {name}",
            fix="correct config.json, or download the checkpoint again",
        )

    def rule(name: str, stored: Tensor) -> list[tuple[str, Tensor]]:
        return [(name, interpolate(stored, length, table.offset))]

    dropped = {key: None for key in checkpoint.names if key.endswith(_BUFFERS)}
    rewrite(checkpoint, out, {name: rule, **dropped}, config=config)
