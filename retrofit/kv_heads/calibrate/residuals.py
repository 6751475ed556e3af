"""The work folder of a calibrated conversion: both residual streams, and every layer that is done.

    state.json                what the folder belongs to, how many layers are done, checksums of their streams
    original-0, original-1    residual stream of the original model, before and after the present layer by turns
    converted-0, converted-1  the same of the layers converted so far
    targets, heads            what is per token within one layer
    layer-007.safetensors     a finished layer's changed tensors, and its report

Legend: N batches, B sequences of a batch, T tokens, C width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrofit.checkpoint.copying import copy_file
from retrofit.checkpoint.staging import staged
from retrofit.kv_heads.calibrate.moments import MomentsSource, require_own
from retrofit.kv_heads.disk import StreamFolder
from retrofit.kv_heads.disk_tensors import DiskTensors
from retrofit.kv_heads.repair.outcome import LayerReport
from retrofit.system.world import ALONE, World

STREAMS = ("original", "converted")


@dataclass(frozen=True)
class Shapes:
    """Shapes of every batch's tensors: residual stream [B, T, C] and head outputs [B, T, H D]."""

    hidden: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, batches: Sequence[tuple[int, int]], width: int, heads_width: int) -> Shapes:
        """batches: (B, T) of each."""
        return cls(tuple((*b, width) for b in batches), tuple((*b, heads_width) for b in batches))


class WorkFolder(StreamFolder):
    """Streams and finished layers of one conversion on disk. repairs: whether what they read is kept as well."""

    def __init__(
        self,
        folder: Path,
        key: str,
        shapes: Shapes,
        *,
        layers: int,
        repairs: bool,
        device: str = "cpu",
        own: Sequence[int] | None = None,
        world: World = ALONE,
        say: Callable[[str], None],
    ) -> None:
        # What only repairs read is not kept without them.
        self.targets = DiskTensors(folder / "targets", shapes.hidden if repairs else ())
        self.heads = DiskTensors(folder / "heads", shapes.heads if repairs else ())
        super().__init__(
            folder,
            key,
            STREAMS,
            shapes.hidden,
            layers=layers,
            within=(self.targets, self.heads),
            whole=self._report,
            device=device,
            own=own,
            world=world,
            say=say,
        )

    @property
    def moments(self) -> Path:
        """Folder of the moments of finished layers."""
        return self.folder / "moments"

    def finish_layer(self, report: LayerReport, tensors: Mapping[str, Tensor]) -> None:
        """Keep a layer that is done; its streams into the next one are written. tensors: those of rank 0 are kept."""
        if self._world.main:
            path = self._layer(report.index)
            partial = path.with_name(f".{path.name}.partial")
            save_file(dict(tensors), partial, metadata={"report": json.dumps(asdict(report))})
            partial.replace(path)
        self.finished(report.index)

    def reports(self) -> list[LayerReport]:
        """Of every finished layer."""
        return self._world.only(lambda: [self._report(index) for index in range(self.layers_done)])

    def tensor_names(self) -> dict[str, int]:
        """{changed tensor: its layer}, of finished layers."""
        names: dict[str, int] = {}
        for index in range(self.layers_done):
            with safe_open(self._layer(index), "pt") as file:
                names |= dict.fromkeys(file.keys(), index)
        return names

    def tensor(self, layer: int, name: str) -> Tensor:
        """A changed tensor of a finished layer."""
        with safe_open(self._layer(layer), "pt") as file:
            return file.get_tensor(name)

    def copy_moments(self, to: Path, origin: MomentsSource) -> None:
        """Give all layers' moments a place of their own, whole or not at all."""
        require_own(to)
        with staged(to, overwrite=True) as partial:
            for path in sorted(self.moments.glob("layer-*.safetensors")):
                copy_file(path, partial / path.name, link=True)  # the work folder goes when this is done
            origin.write(partial)

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:03d}.safetensors"

    def _report(self, index: int) -> LayerReport:
        with safe_open(self._layer(index), "pt") as file:
            return LayerReport.of(json.loads(file.metadata()["report"]))
