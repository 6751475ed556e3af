"""A checkpoint folder that is opened once and handed on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.model import load

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.checkpoint.read import Checkpoint
    from retrofit.model.spec import AttentionSpec


@dataclass(frozen=True)
class ModelFolder:
    """The checkpoint folder at `path`; configuration, attention, weights' header and tokenizer are read when first
    asked for, and once. Nobody changes `config`: whoever needs another one copies it."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelFolder, (self.path,)  # another process reads it itself

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration, as the stock class reads it."""
        return load.load_config(self.path)

    @cached_property
    def spec(self) -> AttentionSpec:
        """What its attention is."""
        from retrofit.model.families import describe

        return describe(self.config)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights, read tensor by tensor."""
        from retrofit.checkpoint.read import Checkpoint

        return Checkpoint.open(self.path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The stock tokenizer."""
        return load.load_tokenizer(self.path, self.config)

    @property
    def stored_dtype(self) -> str:
        """The dtype that most of its values are stored in."""
        return load.stored_dtype(self.path)

    def dtype(self, name: str = "auto") -> torch.dtype:
        """The dtype of that name; "auto" is the stored one."""
        return load.resolve_dtype(name, self.path)

    def working_dtype(self, name: str, device: str) -> str:
        """What it is run in, as `load.working_dtype` says."""
        return load.working_dtype(name, self.path, device)

    def load(self, *, dtype: str = "auto", device: str = "cpu", dropout: bool = True) -> PreTrainedModel:
        """The stock model with its weights, in eval mode."""
        return load.load_model(
            self.path, dtype=dtype, device=device, dropout=dropout, config=copy.deepcopy(self.config)
        )


def opened(folder: str | Path | ModelFolder) -> ModelFolder:
    """The folder itself where it is opened already, else opened now."""
    return folder if isinstance(folder, ModelFolder) else ModelFolder(Path(folder))
