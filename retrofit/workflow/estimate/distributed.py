"""The memory of a training that several processes share: what each of them holds at its peak."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from retrofit.model.load import resolve_device
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Recover
from retrofit.system.memory import total_memory
from retrofit.workflow.estimate.cost import BASE_BYTES
from retrofit.workflow.estimate.training_memory import TrainingMemory, training_memory

SURE = 0.9
"""Share of a GPU's memory that an estimate may fill."""


def memory_of_one(
    spec: AttentionSpec,
    original: AttentionSpec,
    parameters: int,
    recover: Recover,
    value: int,
    *,
    processes: int = 1,
    split: int = 1,
) -> TrainingMemory:
    """The peak of one process of `processes`; the rest as in `training_memory`. split: over how many the weights are.

    Where they are split, and where processes share a row, rows are computed one at a time; a unit of weights that is
    gathered is a layer, which is little beside the rest.
    """
    sequence = recover.distribute.sequence
    data = max(1, processes // sequence)
    rows = 1 if split > 1 or sequence > 1 else ceil(recover.batch_size / data)
    tokens = ceil(recover.sequence_length / sequence)
    share = recover.model_copy(update={"batch_size": rows, "sequence_length": tokens})
    memory = training_memory(spec, original, parameters, share, value)
    weights, adapters = ceil(memory.weights / split), ceil(memory.adapters / split)
    return replace(memory, weights=weights, adapters=adapters, teacher=ceil(memory.teacher / split))


def fits_one(memory: TrainingMemory, device: str) -> bool:
    """Whether a GPU has room for what a process holds that has all weights. Processes on CPUs share what there is."""
    total = total_memory(device) if device.startswith("cuda") else None
    return total is None or BASE_BYTES + memory.total <= SURE * total


def planned_memory(
    spec: AttentionSpec,
    original: AttentionSpec,
    parameters: int,
    recover: Recover,
    value: int,
    processes: int,
    device: str,
) -> TrainingMemory:
    """The peak of one process as the recipe would be trained. processes: of the launcher, or more where the recipe asks
    for them. device: the recipe's."""
    shard, sequence = recover.distribute.shard, recover.distribute.sequence
    processes = max(processes, sequence * (1 if shard == "auto" else shard))
    shape = (spec, original, parameters, recover, value)
    whole = memory_of_one(*shape, processes=processes, split=1 if shard == "auto" else shard)
    if shard != "auto" or processes == 1 or fits_one(whole, resolve_device(device)):
        return whole
    return memory_of_one(*shape, processes=processes, split=processes)
