"""How the processes of a training share its work: which of them read different rows, which hold parts of the weights,
and which share the tokens of a row. Torch-free.

Process r of R x S x Q (replicas, shards, sequence) stands at (r // (S Q), r // Q % S, r % Q), the order of accelerate's
ParallelismConfig(dp_replicate_size, dp_shard_size, cp_size).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from retrofit.errors import UserError
from retrofit.kernels.ring_cost import ulysses_copies
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.recovery import text_lengths
from retrofit.recipe.schema import Recover
from retrofit.system.world import World

Engine = Literal["torch", "ring"]
START = "torchrun --nproc-per-node={} -m retrofit ..."
_CONFIG = "the accelerate configuration"


@dataclass(frozen=True)
class Layout:
    """replicas x shard x sequence processes. sharded: the weights are split over the shard x sequence processes of a
    replica. engine: what carries keys and values where sequence > 1. notes: the choices and their reasons."""

    rank: int = 0
    replicas: int = 1
    shard: int = 1
    sequence: int = 1
    sharded: bool = False
    engine: Engine | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.replicas * self.shard * self.sequence

    @property
    def data_ranks(self) -> int:
        """Processes, or groups of them that share rows, that read different rows."""
        return self.replicas * self.shard

    @property
    def data_rank(self) -> int:
        """Which of them this process belongs to."""
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Its place among those that share its rows."""
        return self.rank % self.sequence


ONE_PROCESS = Layout()


def layout_of(
    recipe: Recover,
    world: World,
    spec: AttentionSpec,
    device: str,
    *,
    fits: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> Layout:
    """The layout for the processes of `world`. fits: student, teacher and what training them takes fit one device.

    What a configuration of accelerate asks for goes before the recipe (`accelerate launch --config_file`, which sets
    ACCELERATE_* and PARALLELISM_CONFIG_*).

    Raises UserError for sizes that the processes, the rows or the batch do not allow, and for what an engine cannot do.
    """
    shard, sequence, wished = sizes_of(recipe, world, environment)
    engine, why = sequence_engine(recipe, spec, device, sequence)
    notes = [] if engine is None else [f"{sequence} processes share every row ({engine}: {why})"]
    sharded, reason = _sharded(shard, world.size, engine, fits)
    degree = shard if shard != "auto" else (world.size // sequence if sharded else 1)
    layout = Layout(world.rank, world.size // (degree * sequence), degree, sequence, sharded, engine)
    if world.size > 1:
        notes.insert(0, f"{world.size} processes: {layout.data_ranks} x different rows; {reason}")
    if wished:
        notes.append("the configuration of accelerate goes before recover.distribute")
    return Layout(**{**vars(layout), "notes": tuple(notes)})


def sizes_of(
    recipe: Recover, world: World, environment: Mapping[str, str] = os.environ
) -> tuple[int | Literal["auto"], int, bool]:
    """(processes that the weights are split over, processes that share a row, whether accelerate's configuration says
    so), for the processes of `world`.

    Raises UserError for sizes that do not multiply to their number, and where there is no launcher.
    """
    wished = _configured(environment, world)
    shard: int | Literal["auto"]
    shard, sequence = wished or (recipe.distribute.shard, recipe.distribute.sequence)
    where = _CONFIG if wished else "recover.distribute"
    known = sequence * (shard if shard != "auto" else 1)
    if known > 1 and world.size == 1:
        raise UserError(
            f"it asks for {known} processes, and this is one",
            where=where,
            fix=f"start it with `{START.format(known)}`",
        )
    if world.size % known:
        sizes = f"shard {shard} x sequence {sequence}" if shard != "auto" else f"sequence {sequence}"
        raise UserError(
            f"{sizes} does not divide {world.size} processes",
            where=where,
            fix=f"start {known} processes or a multiple: `{START.format(known)}`",
        )
    rows = world.size // sequence
    if recipe.batch_size < rows:
        raise UserError(
            f"a step has {recipe.batch_size} row{'s' * (recipe.batch_size > 1)} for {rows} "
            + (f"groups of {sequence} processes" if sequence > 1 else "processes")
            + " that each need one",
            where="recover.batch_size",
            fix=f"use batch_size: {rows} or more, start fewer than {world.size} processes, or let more of them share a "
            "row (recover.distribute.sequence)",
        )
    return shard, sequence, wished is not None


def sequence_engine(recipe: Recover, spec: AttentionSpec, device: str, sequence: int) -> tuple[Engine | None, str]:
    """What carries keys and values between the processes that share a row, and why; None where none do.

    Raises UserError for an engine that cannot express this model or this machine.
    """
    if sequence == 1:
        return None, ""
    if recipe.document_masking:
        raise UserError(
            "documents that do not see each other need a mask, which no engine splits over processes",
            where="recover.document_masking, with recover.distribute.sequence",
            fix="leave out one of them",
        )
    shortest = min(text_lengths(recipe))
    if shortest < 2 * sequence:
        raise UserError(
            f"rows of {shortest} tokens cannot be split into two chunks for each of {sequence} processes",
            where="recover.sequence_length" if shortest == recipe.sequence_length else "recover.stages",
            fix=f"use rows of {2 * sequence} tokens or more, or a smaller recover.distribute.sequence",
        )
    objection = _torch_objection(recipe, spec, device, sequence)
    if recipe.sequence_engine == "torch" and objection:
        raise UserError(
            f"torch's context parallelism cannot do this: {objection}",
            where="recover.sequence_engine",
            fix="use sequence_engine: ring, or auto",
        )
    if recipe.sequence_engine != "auto":
        return recipe.sequence_engine, "asked for"
    return ("ring", f"torch's context parallelism cannot: {objection}") if objection else ("torch", "on CUDA, sdpa")


def ulysses_note(spec: AttentionSpec, sequence: int) -> str | None:
    """What splitting heads instead of tokens over `sequence` processes would come to; None for one process."""
    if sequence == 1:
        return None
    heads, kv_heads = spec.layers[0].query_heads, min(layer.kv_heads for layer in spec.layers)
    copies = ulysses_copies(heads, kv_heads, sequence)
    if copies is None:
        return f"{heads} query and {kv_heads} KV heads could not be split over {sequence} processes instead (Ulysses)"
    if copies == 1:
        return f"heads could be split instead (Ulysses), up to {kv_heads} processes: the KV heads"
    return (
        f"heads split over {sequence} processes instead (Ulysses) would put {copies} copies of each of {kv_heads} "
        f"KV head{'s' * (kv_heads > 1)} on them: more than {kv_heads} save nothing"
    )


def _torch_objection(recipe: Recover, spec: AttentionSpec, device: str, sequence: int) -> str | None:
    if not device.startswith("cuda"):
        return "it needs CUDA"
    if recipe.distribute.shard == 1:
        return "it splits the weights as well, and `shard: 1` keeps them whole"
    if recipe.on_policy:
        return "what the student writes (`on_policy`) needs masks, which it drops"
    if any(length % (2 * sequence) for length in text_lengths(recipe)):
        return f"rows do not divide into {2 * sequence} equal chunks"
    if any(layer.window for layer in spec.layers):
        return "there are sliding windows"
    if any(layer.softcap is not None for layer in spec.layers):
        return "scores are soft-capped"
    if any(layer.sinks for layer in spec.layers):
        return "there are attention sinks"
    return None


def _sharded(shard: int | str, size: int, engine: Engine | None, fits: bool) -> tuple[bool, str]:
    """Whether the weights are split, and why."""
    if engine == "torch":
        return True, "weights are split (FSDP2), as torch's context parallelism has them"
    if shard != "auto":
        return shard != 1, "weights are split (FSDP2), asked for" if shard != 1 else "each holds all weights"
    if size == 1 or fits:
        return False, "each holds all weights, which fit"
    return True, "weights are split (FSDP2), as they do not fit one device"


def _configured(environment: Mapping[str, str], world: World) -> tuple[int, int] | None:
    """(shard, sequence) as a configuration of accelerate has them; None without one that says so.

    Raises UserError for engines that this training is not made for.
    """

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("1", "true")

    other = next((name for name in ("DEEPSPEED", "MEGATRON_LM") if on(f"ACCELERATE_USE_{name}")), None)
    if other:
        raise UserError(
            f"the teacher cannot be trained beside under {other.replace('_', '-').title()}",
            where=_CONFIG,
            fix="use one with FSDP (fsdp_version: 2), or none",
        )
    if on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {
            name: int(environment.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
            for name in ("DP_SHARD", "CP", "TP", "SP")
        }
        unknown = [name for name in ("TP", "SP") if sizes[name] > 1]
        if unknown:
            raise UserError(
                f"{unknown[0].lower()}_size is {sizes[unknown[0]]}: tensors and heads are not split in this training",
                where=_CONFIG,
                fix="use dp_replicate_size, dp_shard_size and cp_size",
            )
        return sizes["DP_SHARD"], sizes["CP"]
    if on("ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION", "1") != "2":
            raise UserError("only FSDP2 splits frozen and trained weights here", where=_CONFIG, fix="fsdp_version: 2")
        if on("FSDP_OFFLOAD_PARAMS"):
            raise UserError(
                "weights stay on the GPUs in this training", where=_CONFIG, fix="fsdp_offload_params: false"
            )
        return world.size, 1
    return None
