"""The layers that see everything, found on text: moments, sinks, and measured rounds.

What was measured is kept in a folder, so that the same call after a stop measures nothing twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
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
from retrofit.windows.probes import Needles, Probes, keys, probes, short_contexts
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
    hidden: Needles | None,
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

    text: to fit sinks on. rows, hidden: of other text, to measure on. always: layers that get the window whatever is
    chosen. full: how many, by default those that need it. sinks: whether the architecture has any. windows: further
    sizes whose moments are kept. work: a folder with the moments (in `moments`) and what was measured; the caller
    removes it. world: the processes that make this call, with the same arguments; what is read is dealt out to them,
    and all choose by the same numbers.
    """
    sizes, work = tuple(sorted({size, *windows})), world.share(work)
    survey(
        model, text, rows, sizes, work / MOMENTS, work=work / "survey", device=device, world=world, progress=progress
    )
    fitted = world.only(lambda: fitted_sinks(work / MOMENTS, [*candidates, *always], size, sinks=sinks))
    measured = _Measured(model, rows, hidden, frozenset(always), fitted, text.digest(), work, device, world, progress)
    return replace(choose(candidates, measured, limits, full=full), tokens=measured.probes.tokens)


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
        hidden: Needles | None,
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
        self.probes = probes(rows, hidden)
        ids_NR = self.probes.input_ids_NR
        text = CalibrationText(ids_NR, ("",) * len(ids_NR)).digest()
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
            losses = self._losses(self.probes, [*first, *(variant | self._always for variant in variants)], task)
            if self._calls == 1:
                self._find_keys(losses[0])
            means = [self.probes.means(own) for own in losses]
            known = self._world.share({"variants": asked, "losses": means})
            if self._world.main:
                self._kept.put_values(name, known)
        elif self._calls == 1:
            self.probes = self.probes.with_keys(torch.from_numpy(self._kept.arrays(["keys"])["keys"]))
        rises = [Rise(**losses) for losses in known["losses"]]
        if self._calls == 1:
            self._before, *rises = rises
        return [rise - self._before for rise in rises]

    def _find_keys(self, original_NP: Tensor) -> None:
        """The tokens that need the far context, by the losses of the model as it is."""
        short = short_contexts(self._rows)
        (short_NS,) = self._losses(short, [frozenset()], "find tokens that need the far context")
        found = keys(self._rows, self.probes, original_NP, short_NS)
        if self._world.main:
            self._kept.put("keys", found.numpy())
        self.probes = self.probes.with_keys(found)

    def _losses(self, rows: Probes, variants: Sequence[Variant], task: str) -> Tensor:
        """[V, N, P]."""
        scratch = self._work / "variants"
        if self._world.main:
            shutil.rmtree(scratch, ignore_errors=True)  # of a call that was killed
            scratch.mkdir(parents=True)
        self._world.wait()
        losses = ablated_losses(
            self._model,
            rows,
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
        return losses
