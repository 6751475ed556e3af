"""How mixture-of-experts families store their experts: one matrix each, where the transformers class stacks them.

The class holds `mlp.experts.gate_up_proj` [experts, 2 x width, C] (gate above up) and `mlp.experts.down_proj`
[experts, C, width]; checkpoints hold `{block}.experts.{e}.{gate|up|down}.weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

MODULE_BLOCK = "mlp"


@dataclass(frozen=True)
class Experts:
    """Names in the checkpoint, relative to the layer and to one expert."""

    block: str
    gate: str
    up: str
    down: str

    def stored(self, name: str, experts: int) -> tuple[tuple[str, ...], ...]:
        """Stored names behind a parameter of a decoder layer: by expert, those that lie above each other.

        A parameter that is stored as it is gives one group of one name. experts: how many there are.
        """
        layer, _, inner = name.partition(f".{MODULE_BLOCK}.")
        if not inner:
            return ((name,),)
        parts = {"experts.gate_up_proj": (self.gate, self.up), "experts.down_proj": (self.down,)}.get(inner)
        if parts is None:
            return ((f"{layer}.{self.block}.{inner}",),)
        root = f"{layer}.{self.block}.experts"
        return tuple(tuple(f"{root}.{e}.{part}.weight" for part in parts) for e in range(experts))


_QWEN = Experts("mlp", "gate_proj", "up_proj", "down_proj")

EXPERTS: dict[str, Experts] = {
    "mixtral": Experts("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
}
