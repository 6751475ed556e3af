"""What a recovery did."""

from __future__ import annotations

from dataclasses import dataclass

from retrofit.recovery.callbacks import TrainPoint


@dataclass(frozen=True)
class RecoverReport:
    """What a recovery did. Losses are nats per token, of the objective trained on (KL for distill).

    history: the start (step 0) and every step. best_step: whose weights were kept, 0 for the start. start_passages,
    best_passages: of held-out passages out of sight of the student's windows, which the weights that are kept may not
    lose by; None where it has no windows. seconds and peak_bytes: wall time over all sessions, and the largest memory
    of this process (of the GPU on CUDA). notes: how it went; cautions: those among them that its reader has to know.
    """

    history: tuple[TrainPoint, ...]
    steps: int
    tokens: int
    best_step: int
    start_loss: float | None
    best_loss: float | None
    start_passages: float | None
    best_passages: float | None
    seconds: float
    peak_bytes: int
    trained_parameters: int
    kernel: str
    compute_dtype: str
    shared_bytes: int
    resumed_from: int
    notes: tuple[str, ...]
    cautions: tuple[str, ...] = ()
