"""What is known about each architecture: literal tables, one file per way of storing attention; no name guessing.

    spec = describe(config)                          # AttentionSpec
    smaller = family_of(config).with_kv_heads(config, 1)

`config` is a transformers configuration of one of `KNOWN` model types. Works without torch.
"""

from __future__ import annotations

from typing import Any

from retrofit.errors import UserError
from retrofit.model.families import fused, separate
from retrofit.model.families.base import Conversion, Family
from retrofit.model.families.refused import REASONS, REEXPRESSED
from retrofit.model.spec import AttentionSpec

_FAMILIES: dict[str, Family] = {family.name: family for family in (*separate.TABLE, *fused.TABLE)}

KNOWN: tuple[str, ...] = tuple(sorted(_FAMILIES))
"""The supported `model_type`s."""


def with_windows() -> tuple[str, ...]:
    """The families whose own class holds sliding windows, in all of its layers or in some."""
    return tuple(name for name in KNOWN if _FAMILIES[name].window != "none")


def family_of(config: Any) -> Family:
    """The family of a configuration; raises UserError with the reason and the list of known ones when there is none."""
    name = str(getattr(config, "model_type", None) or "(no model_type)")
    if name in _FAMILIES:
        return _FAMILIES[name]
    reason, target = REASONS.get(name), REEXPRESSED.get(name)
    raise UserError(
        f"the architecture `{name}` is not supported" + (f": {reason}" if reason else ""),
        where="model_type of config.json",
        fix=f"re-express it as {target} first: retrofit convert MODEL --reexpress-only --out DIR"
        if target
        else f"choose a model of a known architecture: {', '.join(KNOWN)}",
    )


def is_known(config: Any) -> bool:
    """Whether the architecture is a known family or can be re-expressed as one."""
    return str(getattr(config, "model_type", None)) in (*KNOWN, *REEXPRESSED)


def require_known(config: Any) -> None:
    """UserError unless the architecture is a known family or can be re-expressed as one."""
    if not is_known(config):
        family_of(config)


def stock_class(config: Any) -> str:
    """The name of transformers' own causal language model of this configuration, whatever its `architectures` says."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def describe(config: Any) -> AttentionSpec:
    """The attention of the model that `config` configures; raises as `family_of` does."""
    return family_of(config).describe(config)


__all__ = ["KNOWN", "Conversion", "Family", "describe", "family_of", "is_known", "require_known", "stock_class"]
