"""Rows whose tokens are shared out over processes: each computes its tokens of a row, attention goes over all of them.

Ids, positions and the tokens that follow are shared out together, after the shift, so that every token keeps what it
stands for; the sum of the shares' losses over the tokens of whole rows is the loss. Student and teacher are shared
alike.

Legend: B batch, T tokens of a row, n of this process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels import registry
from retrofit.kernels.ring_group import Ring
from retrofit.kernels.sequence_parallel import sequence_parallel
from retrofit.model.spec import AttentionSpec
from retrofit.recovery.layout import Engine, Layout
from retrofit.recovery.sharding import parallelism
from retrofit.recovery.student_teacher import StudentTeacher
from retrofit.system.sequence_groups import sequence_groups
from retrofit.system.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

PLACES = "places"
"""Where the tokens of a share stand in their row, which is where the teacher reads them, whatever their positions."""

Batch = dict[str, Any]


class Sharing(ABC):
    """How the tokens of rows are shared out."""

    @abstractmethod
    def share(self, batch: Mapping[str, Any]) -> Batch:
        """This process's tokens of a batch, with `position_ids` and `places`; what is no tensor [B, T] stays."""

    @abstractmethod
    def gather(self, x_Bn: Tensor, tokens: int) -> Tensor:
        """The whole [B, T, ...] of the shares of all processes; not differentiable. tokens: T."""

    @abstractmethod
    @contextmanager
    def attention(self, tokens: int) -> Iterator[None]:
        """In the block, forward and backward, attention is over all shares of rows of `tokens` tokens."""


class Whole(Sharing):
    """Rows of one process each."""

    def share(self, batch: Mapping[str, Any]) -> Batch:
        return dict(batch)

    def gather(self, x_Bn: Tensor, tokens: int) -> Tensor:
        return x_Bn

    @contextmanager
    def attention(self, tokens: int) -> Iterator[None]:
        yield


class RingSharing(Sharing):
    """Shares of our ring (`kernels.ring`): process r of N has the chunks r and 2N - 1 - r of 2N."""

    def __init__(self, layout: Layout, world: World, pair: StudentTeacher, device: str) -> None:
        self.group = sequence_groups(world, layout.sequence, "recover").group
        self.models: tuple[PreTrainedModel, ...] = tuple(filter(None, (pair.student, pair.teacher)))
        self.device = device
        self.rings: dict[int, Ring] = {}

    def ring(self, tokens: int) -> Ring:
        """The ring of rows of `tokens` tokens."""
        if tokens not in self.rings:
            self.rings[tokens] = Ring.over(tokens, self.group, self.device)
        return self.rings[tokens]

    def share(self, batch: Mapping[str, Any]) -> Batch:
        ring = self.ring(batch["input_ids"].shape[1])
        return {key: ring.shard(value) if isinstance(value, Tensor) else value for key, value in _placed(batch).items()}

    def gather(self, x_Bn: Tensor, tokens: int) -> Tensor:
        return self.ring(tokens).unshard(x_Bn)

    @contextmanager
    def attention(self, tokens: int) -> Iterator[None]:
        with sequence_parallel(self.ring(tokens), *self.models):
            yield


class TorchSharing(Sharing):
    """Shares of torch's context parallelism, which cuts and orders them. Its attention stands for sdpa, causal."""

    def __init__(self, layout: Layout, pair: StudentTeacher, mesh: DeviceMesh) -> None:
        self.mesh, self.ranks = mesh, layout.sequence
        _without_masks(pair.student, pair.spec)
        if pair.teacher is not None:
            _without_masks(pair.teacher, pair.teacher_spec or pair.spec)

    def share(self, batch: Mapping[str, Any]) -> Batch:
        whole = {key: value.clone() for key, value in _placed(batch).items() if isinstance(value, Tensor)}
        with self._cutting(list(whole.values())):
            pass  # they are cut in place
        return {**batch, **whole}

    def gather(self, x_Bn: Tensor, tokens: int) -> Tensor:
        row = self.share({"input_ids": torch.zeros(1, tokens, dtype=torch.long, device=x_Bn.device)})
        places_1T = torch.cat(self._shares(row[PLACES]), 1)
        return torch.cat(self._shares(x_Bn), 1)[:, places_1T[0].argsort()]

    @contextmanager
    def attention(self, tokens: int) -> Iterator[None]:
        # Rows come here cut already; it asks for something to cut.
        with self._cutting([torch.empty(1, tokens, device=self.mesh.device_type)]):
            yield

    def _cutting(self, buffers_BT: list[Tensor]) -> AbstractContextManager[None]:
        from torch.distributed.tensor.experimental import context_parallel

        dims = [1] * len(buffers_BT)
        return context_parallel(self.mesh, buffers=buffers_BT, buffer_seq_dims=dims, no_restore_buffers=set(buffers_BT))

    def _shares(self, x_Bn: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        shares = [torch.empty_like(x_Bn, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(shares, x_Bn.contiguous(), group=self.mesh.get_group())
        return shares


def _placed(batch: Mapping[str, Any]) -> Batch:
    """The batch with the places of its tokens, and with their positions, which are the same by default."""
    ids_BT = batch["input_ids"]
    places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    return {"position_ids": places_BT, **batch, PLACES: places_BT}


def sharing_of(layout: Layout, world: World, pair: StudentTeacher, device: str) -> Sharing:
    """How the processes of a layout share rows; all of them call it."""
    if layout.engine == "ring":
        return RingSharing(layout, world, pair, device)
    if layout.engine == "torch":
        return TorchSharing(layout, pair, parallelism(layout).get_device_mesh(torch.device(device).type)["cp"])
    return Whole()


def shared_kernel(
    engine: Engine | None, kernel: str, spec: AttentionSpec, device: str, dtype: str
) -> registry.KernelChoice | None:
    """The kernel of rows whose tokens are shared out by `engine`; None where they are not.

    Raises UserError for a kernel that works on whole rows only, or attention that cannot be split.
    """
    if engine is None:
        return None
    if engine == "ring":
        return registry.split_kernel(kernel, spec, device, dtype)
    if kernel not in ("auto", "sdpa"):
        raise UserError(
            f"torch's context parallelism has no kernel but sdpa, and `{kernel}` is asked for",
            where="kernel, with recover.sequence_engine: torch",
            fix="use kernel: auto, or recover.sequence_engine: ring",
        )
    choice = registry.choose("sdpa", spec, device, training=True, dtype=dtype)
    return registry.KernelChoice(kernel, choice.name, "torch's context parallelism is made of it")


def _without_masks(model: PreTrainedModel, spec: AttentionSpec) -> None:
    """Give attention no mask: rows have no padding, and causality is what torch's attention over shares has itself."""

    def causal(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None, "is_causal": True} if "attention_mask" in kwargs else kwargs

    for layer in model.get_submodule(spec.layers_path).children():
        layer.get_submodule(spec.attention_path).register_forward_pre_hook(causal, prepend=True, with_kwargs=True)
