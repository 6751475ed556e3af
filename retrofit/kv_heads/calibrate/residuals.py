"""The work folder of a layer-by-layer conversion: both residual streams, and every layer that is done.

    state.json                what the folder belongs to, how many layers are done, checksums of their streams
    original-0, original-1    residual stream of the original model, before and after the present layer by turns
    converted-0, converted-1  the same of the layers converted so far
    targets, heads, ...       what is per token within one layer
    layer-007.safetensors     a finished layer's changed tensors, and its report

Legend: N batches, B sequences of a batch, T tokens, C width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

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


class Report(Protocol):
    """What was done to one layer. index: of the layer."""

    @property
    def index(self) -> int: ...


AnyReport = TypeVar("AnyReport", bound=Report)


class LayerFolder(StreamFolder, Generic[AnyReport]):
    """Streams and finished layers of one conversion on disk.

    shapes: [B, T, C] of every batch. report_of: what makes a layer's report, a dataclass, of its JSON values.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        shapes: Sequence[tuple[int, ...]],
        report_of: Callable[[Mapping[str, Any]], AnyReport],
        *,
        layers: int,
        within: Sequence[DiskTensors] = (),
        to_the_end: bool = False,
        device: str = "cpu",
        own: Sequence[int] | None = None,
        world: World = ALONE,
        say: Callable[[str], None],
    ) -> None:
        self._report_of = report_of
        super().__init__(
            folder,
            key,
            STREAMS,
            shapes,
            layers=layers,
            within=within,
            whole=self._report,
            to_the_end=to_the_end,
            device=device,
            own=own,
            world=world,
            say=say,
        )

    def finish_layer(self, report: AnyReport, tensors: Mapping[str, Tensor]) -> None:
        """Keep a layer that is done; its streams into the next one are written. tensors: those of rank 0 are kept."""
        if self._world.main:
            path = self._layer(report.index)
            partial = path.with_name(f".{path.name}.partial")
            save_file(dict(tensors), partial, metadata={"report": json.dumps(asdict(cast(Any, report)))})
            partial.replace(path)
        self.finished(report.index)

    def reports(self) -> list[AnyReport]:
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

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer-{index:03d}.safetensors"

    def _report(self, index: int) -> AnyReport:
        with safe_open(self._layer(index), "pt") as file:
            return self._report_of(json.loads(file.metadata()["report"]))


class WorkFolder(LayerFolder[LayerReport]):
    """That of a conversion to fewer KV heads. repairs: whether what they read is kept as well."""

    def __init__(self, folder: Path, key: str, shapes: Shapes, *, repairs: bool, **usual: Any) -> None:
        # What only repairs read is not kept without them.
        self.targets = DiskTensors(folder / "targets", shapes.hidden if repairs else ())
        self.heads = DiskTensors(folder / "heads", shapes.heads if repairs else ())
        super().__init__(folder, key, shapes.hidden, LayerReport.of, within=(self.targets, self.heads), **usual)

    @property
    def moments(self) -> Path:
        """Folder of the moments of finished layers."""
        return self.folder / "moments"

    def copy_moments(self, to: Path, origin: MomentsSource) -> None:
        """Give all layers' moments a place of their own, whole or not at all."""
        require_own(to)
        with staged(to, overwrite=True) as partial:
            for path in sorted(self.moments.glob("layer-*.safetensors")):
                copy_file(path, partial / path.name, link=True)  # the work folder goes when this is done
            origin.write(partial)
