"""How mixture-of-experts families store their experts.

Their transformers classes stack them: `experts.gate_up_proj` [experts, 2 x width, C] (gate above up) and
`experts.down_proj` [experts, C, width]. Checkpoints hold one matrix each, or the stacks under these or other names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class Experts(ABC):
    """What stands in a checkpoint for the parameters of a layer with experts."""

    @abstractmethod
    def stored(self, name: str, experts: int) -> tuple[tuple[str, ...], ...]:
        """Stored names behind a parameter of a decoder layer: by expert, those that lie above each other.

        A parameter that is stored as it is gives one group of one name. experts: how many there are.
        """


@dataclass(frozen=True)
class Apart(Experts):
    """`{block}.experts.{e}.{gate|up|down}.weight`; the class calls the block `mlp`.

    block: relative to the layer. gate, up, down: relative to one expert.
    """

    block: str
    gate: str
    up: str
    down: str

    def stored(self, name: str, experts: int) -> tuple[tuple[str, ...], ...]:
        """As `Experts.stored`."""
        layer, _, inner = name.partition(".mlp.")
        if not inner:
            return ((name,),)
        parts = {"experts.gate_up_proj": (self.gate, self.up), "experts.down_proj": (self.down,)}.get(inner)
        if parts is None:
            return ((f"{layer}.{self.block}.{inner}",),)
        root = f"{layer}.{self.block}.experts"
        return tuple(tuple(f"{root}.{e}.{part}.weight" for part in parts) for e in range(experts))


@dataclass(frozen=True)
class Stacked(Experts):
    """The class's own stacks. renamed: (ending of a parameter's name in the class, ending in the checkpoint)."""

    renamed: tuple[tuple[str, str], ...] = ()

    def stored(self, name: str, experts: int) -> tuple[tuple[str, ...], ...]:
        """As `Experts.stored`: one name for all experts."""
        for own, other in self.renamed:
            if name.endswith(own):
                return ((name.removesuffix(own) + other,),)
        return ((name,),)


_QWEN = Apart("mlp", "gate_proj", "up_proj", "down_proj")

EXPERTS: dict[str, Experts] = {
    "granitemoe": Stacked(
        (
            (".experts.gate_up_proj", ".input_linear.weight"),
            (".experts.down_proj", ".output_linear.weight"),
            (".router.weight", ".router.layer.weight"),
        )
    ),
    "granitemoe_swa": Stacked(),
    "mixtral": Apart("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
}
