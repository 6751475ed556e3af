"""The same function as another architecture, exactly: for models whose own class cannot hold fewer KV heads.

    reexpression_of(config)              # what a GPT-NeoX, GPT-J, GPT-2 or OPT configuration becomes; None for others
    reexpression_of(config, target)      # what a known family becomes on demand: a Llama as granite_swa
    reexpress(folder, out)               # the checkpoint, written anew, tensor by tensor, into a staged folder

Every target is a stock class of transformers and one of `retrofit.model.families`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import UserError
from retrofit.model.families.refused import OPTIONAL, REEXPRESSED
from retrofit.model.reexpress import gpt_bigcode, granite_swa, ministral, others, phi
from retrofit.model.reexpress.base import Made, Reexpression
from retrofit.model.reexpress.write import FORMAT, ReexpressReport, reexpressed, write

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.model.folder import ModelFolder


def _gpt_neox(config: Any) -> Reexpression:
    return phi.from_gpt_neox(config) if config.use_parallel_residual else others.starcoder2_from_gpt_neox(config)


_RULES: dict[str, Callable[[Any], Reexpression]] = {
    "gpt_neox": _gpt_neox,
    "gptj": phi.from_gptj,
    "gpt2": gpt_bigcode.from_gpt2,
    "opt": gpt_bigcode.from_opt,
}
_ON_DEMAND: dict[str, Callable[[Any], Reexpression]] = {
    "granite_swa": granite_swa.from_llama,
    "granitemoe_swa": granite_swa.from_experts,
    "llama": others.llama_from_qwen2,
    "ministral": ministral.from_llama,
}
"""By target, for the families that `OPTIONAL` names with it."""


def reexpression_of(config: Any, target: str | None = None) -> Reexpression | None:
    """How the model that `config` configures becomes another architecture; None where it has no need to.

    target: the wanted `model_type`; needed for a model that can share KV heads as it is (Llama into granite_swa).
    Raises UserError for a target that the architecture cannot become, and for a variant of it that none can hold.
    """
    name = str(config.model_type)
    if target in OPTIONAL.get(name, ()):
        return _ON_DEMAND[str(target)](config)
    found = _RULES[name](config) if name in _RULES else None
    if target is not None and (found is None or found.target != target):
        reason = granite_swa.REASONS.get(name) if target in granite_swa.TARGETS else None
        known = sorted([*REEXPRESSED.items(), *((a, b) for a, targets in OPTIONAL.items() for b in targets)])
        raise UserError(
            f"`{name}` cannot be re-expressed as `{target}`" + (f": {reason}" if reason else ""),
            where=f"target: {target}",
            fix=f"leave the target out: it becomes {found.target}"
            if found
            else f"what can be re-expressed: {', '.join(f'{a} as {b}' for a, b in known)}",
        )
    return found


def reexpress(
    source: str | Path | ModelFolder,
    out: str | Path,
    *,
    target: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    resume: bool = False,
    progress: Progress | None = None,
) -> ReexpressReport:
    """Write the checkpoint `source` as another architecture into the (existing, staged) folder `out`.

    target: the wanted `model_type` (the only one there is, by default). dtype: "auto" is the source's own. resume:
    `out` may hold what an earlier call with the same arguments left.
    Raises UserError as `reexpression_of` does, for a model that has no need of it, and for a broken checkpoint.
    """
    from retrofit.model.folder import opened

    folder = opened(source)
    config = folder.config
    reexpression = reexpression_of(config, target)
    if reexpression is None:
        optional = OPTIONAL.get(config.model_type)
        raise UserError(
            f"`{config.model_type}` has nothing to be re-expressed for",
            where=str(folder.path),
            fix=f"convert it as it is, or name the target: {' or '.join(optional)}"
            if optional
            else "convert it as it is (`retrofit inspect MODEL` says whether it can be)",
        )
    chosen = None if dtype == "auto" else folder.dtype(dtype)
    return write(
        reexpression,
        folder.path,
        Path(out),
        dtype=chosen,
        max_shard_size=max_shard_size,
        resume=resume,
        progress=progress,
    )


__all__ = ["FORMAT", "Made", "ReexpressReport", "Reexpression", "reexpress", "reexpressed", "reexpression_of"]
