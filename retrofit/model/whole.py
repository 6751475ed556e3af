"""Whether a checkpoint holds every tensor that its configuration asks for, in its shape: headers alone are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.model.families.experts import EXPERTS
from retrofit.model.load import quiet
from retrofit.model.spec import AttentionSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SHOWN = 4  # names in a message


def require_complete(checkpoint: Checkpoint, config: PretrainedConfig, spec: AttentionSpec) -> None:
    """Raises UserError that lists the tensors which are missing, or have another shape than `config` asks for."""
    missing: list[str] = []
    misshapen: list[str] = []
    for name, shape in expected(config, spec):
        if name not in checkpoint.entries:
            missing.append(name)
        elif checkpoint.shape(name) != shape:
            misshapen.append(f"`{name}` is {list(checkpoint.shape(name))} and not {list(shape)}")
    if missing:
        without = missing[0].partition(".")[2]
        raise UserError(
            f"the checkpoint lacks {len(missing)} tensors of its architecture: {_listed([f'`{n}`' for n in missing])}",
            where=str(checkpoint.folder),
            fix=f"`{without}` is there: write the folder again with transformers (from_pretrained, save_pretrained)"
            if without in checkpoint.entries
            else "download it again, or check that config.json belongs to these weights",
        )
    if misshapen:
        raise UserError(
            f"{len(misshapen)} tensors have another shape than config.json asks for: {_listed(misshapen)}",
            where=str(checkpoint.folder),
            fix="check that config.json belongs to these weights",
        )


def expected(config: PretrainedConfig, spec: AttentionSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(stored name, shape) of every parameter of the stock class, built without memory; experts are stored apart."""
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    tied = {f"{name}.weight" for name, module in model.named_modules() if module is head and spec.tied_embeddings}
    experts = EXPERTS.get(spec.family)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        groups = experts.stored(name, shape[0]) if experts else ((name,),)
        if name in tied:
            continue
        if len(groups) == len(groups[0]) == 1:
            yield groups[0][0], shape
            continue
        for parts in groups:
            yield from ((part, (shape[1] // len(parts), *shape[2:])) for part in parts)


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
