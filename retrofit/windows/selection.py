"""The layers that see everything, found on text: moments, sinks, and measured rounds.

What was measured is kept in a folder, so that the same call after a stop measures nothing twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.data.calibration import CalibrationText
from retrofit.kv_heads.disk import work_key
from retrofit.model.folder import ModelFolder
from retrofit.system.resume import Kept
from retrofit.system.world import ALONE, World
from retrofit.windows import VERSION
from retrofit.windows.ablation import Variant, ablated_losses
from retrofit.windows.choice import choose
from retrofit.windows.outcome import Choice, Limits, Rise
from retrofit.windows.rows import Repeats
from retrofit.windows.sinks import fit_sinks
from retrofit.windows.store import load
from retrofit.windows.survey import survey

if TYPE_CHECKING:
    from retrofit.console import Progress

MOMENTS = "moments"


def select(
    model: ModelFolder,
    candidates: Sequence[int],
    size: int,
    text: CalibrationText,
    rows: Repeats,
    limits: Limits,
    *,
    always: Collection[int] = (),
    full: int | None,
    sinks: bool,
    windows: Sequence[int] = (),
    work: Path,
    device: str = "cpu",
    world: World = ALONE,
    progress: Progress | None = None,
) -> Choice:
    """Choose the layers of `candidates` that see everything when the others get windows of `size` tokens.

    text: to fit sinks on. rows: of other text, to measure on. always: layers that get the window whatever is chosen.
    full: how many, by default those that need it. sinks: whether the architecture has any. windows: further sizes whose
    moments are kept. work: a folder with the moments (in `moments`) and what was measured; the caller removes it.
    world: the processes that make this call, with the same arguments; what is read is dealt out to them, and all choose
    by the same numbers.
    """
    sizes, work = tuple(sorted({size, *windows})), world.share(work)
    survey(
        model, text, rows, sizes, work / MOMENTS, work=work / "survey", device=device, world=world, progress=progress
    )
    fitted = world.only(lambda: fitted_sinks(work / MOMENTS, [*candidates, *always], size, sinks=sinks))
    measured = _Measured(model, rows, frozenset(always), fitted, text.digest(), work, device, world, progress)
    return choose(candidates, measured, limits, full=full)


def fitted_sinks(moments: Path, layers: Sequence[int], size: int, *, sinks: bool) -> dict[int, Tensor]:
    """Sinks of every layer under windows of `size` tokens, [H] each, from moments on disk."""
    found = {}
    for index in layers:
        own = load(moments, index).text
        found[index] = fit_sinks(own, sinks=sinks).sinks_WH[own.windows.index(size)].float()
    return found


class _Measured:
    """What the loss rises by under variants; each call's results are kept. All processes of `world` make each call."""

    def __init__(
        self,
        model: ModelFolder,
        rows: Repeats,
        always: Variant,
        sinks: Mapping[int, Tensor],
        fitted_on: str,
        work: Path,
        device: str,
        world: World,
        progress: Progress | None,
    ) -> None:
        self._model, self._rows, self._always, self._sinks = model, rows, always, sinks
        self._work, self._device, self._world, self._progress = work, device, world, progress
        text = CalibrationText(rows.input_ids_NR, rows.kinds).digest()
        question = work_key(model.checkpoint, [VERSION, rows.window, fitted_on, text, torch.device(device).type])
        self._kept = Kept(work / "rounds", {"question": question}, world)
        self._calls = 0

    def __call__(self, variants: Sequence[Variant]) -> list[Rise]:
        name = f"round-{self._calls}"
        self._calls += 1
        asked = [sorted(variant) for variant in variants]
        known: Any = self._kept.values([name]).get(name)
        if known is None or known["variants"] != asked:
            task = f"measure windows, round {self._calls}"
            first = [frozenset[int]()] if self._calls == 1 else []  # what the loss rises from
            losses = self._losses([*first, *(variant | self._always for variant in variants)], task)
            known = self._world.share({"variants": asked, "losses": losses})
            if self._world.main:
                self._kept.put_values(name, known)
        rises = [Rise(**losses) for losses in known["losses"]]
        if self._calls == 1:
            self._before, *rises = rises
        return [rise - self._before for rise in rises]

    def _losses(self, variants: Sequence[Variant], task: str) -> list[dict[str, float]]:
        scratch = self._work / "variants"
        if self._world.main:
            shutil.rmtree(scratch, ignore_errors=True)  # of a call that was killed
            scratch.mkdir(parents=True)
        self._world.wait()
        losses = ablated_losses(
            self._model,
            self._rows,
            variants,
            self._sinks,
            device=self._device,
            work=scratch,
            world=self._world,
            task=task,
            progress=self._progress,
        )
        self._world.wait()
        if self._world.main:
            shutil.rmtree(scratch)
        return [self._rows.means(own) for own in losses]
