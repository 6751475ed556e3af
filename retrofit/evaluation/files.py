"""Where token losses lie: of a run by model, and beside them those of other passes over the same documents."""

from __future__ import annotations

from pathlib import Path

from retrofit.evaluation.scoring.losses import TokenLosses

LOSSES = "losses"


def losses_file(run: Path, label: str) -> Path:
    """Where a run keeps the token losses of one of its models."""
    return run / LOSSES / f"{label}.npz"


def pass_file(losses: Path, name: str) -> Path:
    """Where the losses of the same documents with another context lie: `original.native.npz` beside `original.npz`."""
    return losses.with_name(f"{losses.stem}.{name}.npz")


def save_losses(losses: TokenLosses, path: Path) -> None:
    """Write token losses so that a kill leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    losses.save(partial)
    partial.replace(path)
