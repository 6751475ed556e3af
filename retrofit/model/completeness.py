"""Whether the weights of a checkpoint are what its configuration says: nothing missing, left over, quantised or broken.

`require_complete` reads headers alone and comes before any work; `require_sound` reads the values once. Both go by what
stock transformers makes of the stored names, so that nothing is accepted here and refused, or left out, at loading.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from retrofit.checkpoint.files import listed
from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.model.families import stock_class
from retrofit.model.families.experts import EXPERTS
from retrofit.model.load import quiet, without_memory
from retrofit.model.spec import AttentionSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUFFERS: Mapping[str, tuple[str, ...]] = {"gpt_bigcode": (".attn.bias", ".attn.masked_bias")}
"""Endings of tensors that older releases of a family stored and that are no weights, where transformers' own list
(`_keys_to_ignore_on_load_unexpected`) lacks them."""

_HEADS = ("lm_head.weight", "embed_out.weight")
# What quantisers store beside, or instead of, a weight.
_QUANTISED = re.compile(
    r".*(_scale|_scale_inv|\.scales?|_zero_point|\.qweight|\.qzeros|\.g_idx|\.SCB|\.absmax|\.quant_map|_packed|_format"
    r"|\.quant_state\..*|\.nested_.*)"
)
_NOT_WHOLE = "check that config.json belongs to these weights"


@dataclass(frozen=True)
class _Loading:
    """Names of what transformers would miss, find in another shape, and have no place for."""

    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    unknown: tuple[str, ...]


def require_complete(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    spec: AttentionSpec | None = None,
    *,
    ignored: tuple[str, ...] = (),
) -> None:
    """Check names, dtypes and shapes against what `config` asks for; reads no values.

    spec: given where the names must be those that transformers writes, by which tensors are found and which other
    programs know; it reads some older names as well.
    ignored: endings of further names that are left out knowingly. Raises UserError that lists the tensors which are
    quantised, missing, of another shape, or not part of the architecture.
    """
    where = shown(checkpoint.folder)
    loading = _loading(checkpoint, config, checkpoint.names)
    _require_unquantised(checkpoint, config, loading)
    if spec is not None:
        _require_names(checkpoint, config, spec, found=loading is not None and not loading.missing)
    if loading is None:
        raise UserError(
            "transformers cannot put the stored tensors together: some are missing or have another shape",
            where=where,
            fix=_NOT_WHOLE,
        )
    if loading.missing:
        raise _lacking(checkpoint, loading.missing)
    if loading.misshapen:
        raise _misshapen(checkpoint, loading.misshapen)
    allowed = (*ignored, *BUFFERS.get(str(config.model_type), ()))
    unknown = [name for name in loading.unknown if not name.endswith(allowed)]
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors have no place in a {stock_class(config)}: {_quoted(unknown)}",
            where=where,
            fix="give the plain language model; to leave them out, load it with AutoModelForCausalLM.from_pretrained "
            "and save it with save_pretrained into a new folder",
        )


def require_sound(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    *,
    written: torch.dtype | None = None,
    digested: Collection[str] = (),
) -> Mapping[str, str]:
    """Read all values once. Raises UserError for NaN, infinity, what the dtype `written` cannot hold, and a stored head
    that differs from the embedding which the configuration ties it to.

    digested: files whose SHA-256 is wanted; those that hold weights are hashed on the way, and returned by name.
    """
    require_tied(checkpoint, config)
    return checkpoint.require_finite(written=written, digested=digested)


def require_tied(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Raises UserError for a stored head that differs from the embedding which the configuration ties it to.

    transformers 5 then uses both, earlier releases and other engines the embedding alone.
    """
    pair = tied_copy(checkpoint, config)
    if pair and not checkpoint.same(*pair):
        head, embedding = pair
        raise UserError(
            f"`{head}` differs from `{embedding}`, and config.json ties the two (tie_word_embeddings): some programs "
            "use both, others the embedding alone",
            where=shown(checkpoint.folder),
            fix='write "tie_word_embeddings": false into config.json if the head is meant; else save the weights '
            "without it",
        )


def tied_copy(checkpoint: Checkpoint, config: PretrainedConfig) -> tuple[str, str] | None:
    """Stored names of a head and of the embedding it is tied to, where a checkpoint holds both."""
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return None
    if not any(name.endswith(_HEADS) for name in checkpoint.names):
        return None
    model: Any = without_memory(config)
    prefix, modules = f"{model.base_model_prefix}.", dict(model.named_modules())
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    names = [next(f"{name}.weight" for name, module in modules.items() if module is end) for end in ends]
    head, embedding = (
        next((one for one in (name, name.removeprefix(prefix)) if one in checkpoint.entries), None) for name in names
    )
    return (head, embedding) if head and embedding else None


def leftovers(checkpoint: Checkpoint, model_type: str) -> tuple[str, ...]:
    """Names of stored tensors that are no weights and that transformers finds unexpected: nothing we write has them."""
    return tuple(name for name in checkpoint.names if name.endswith(BUFFERS.get(model_type, ("\0",))))


def expected(config: PretrainedConfig, spec: AttentionSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(stored name, shape) of every parameter of the stock class, built without memory; experts are stored apart."""
    model: Any = without_memory(config)
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


def _loading(checkpoint: Checkpoint, config: PretrainedConfig, names: Collection[str]) -> _Loading | None:
    """What transformers says of tensors with these names, dtypes and shapes, loaded without their values.

    None where it does not get that far: tensors of experts that it cannot stack.
    """
    stored = {name: torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name), device="meta") for name in names}
    loader: Any = type(without_memory(config))
    try:
        with quiet():
            _, info = loader.from_pretrained(
                None,
                config=config,
                state_dict=stored,
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError:
        return None
    shapes = sorted((name, tuple(one), tuple(other)) for name, one, other in info["mismatched_keys"])
    return _Loading(
        missing=tuple(sorted(info["missing_keys"])),
        misshapen=tuple(f"`{shown(name, 120)}` is {list(one)} and not {list(other)}" for name, one, other in shapes),
        unknown=tuple(sorted(info["unexpected_keys"])),
    )


def _require_unquantised(checkpoint: Checkpoint, config: PretrainedConfig, loading: _Loading | None) -> None:
    """Raises UserError for weights that are whole numbers or 8 bits wide, and for scales."""
    found = [name for name in (loading.unknown if loading else checkpoint.names) if _QUANTISED.fullmatch(name)]
    narrow = [name for name in checkpoint.names if _is_narrow(checkpoint.dtype(name))]
    if narrow:  # masks and other leftovers may be whole numbers; transformers does not miss them
        rest = _loading(checkpoint, config, [name for name in checkpoint.names if name not in set(narrow)])
        before = loading.missing if loading else ()
        if rest is None or set(rest.missing) - set(before):
            found = [*narrow, *found]
    if found:
        stored = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in narrow})
        raise UserError(
            f"the weights look quantised{' (' + ', '.join(stored) + ')' if stored else ''}, and config.json has no "
            f"quantization_config: {_quoted(found)}",
            where=shown(checkpoint.folder),
            fix="give the unquantised checkpoint that they were made from",
        )


def _is_narrow(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point or dtype.itemsize == 1


def _require_names(checkpoint: Checkpoint, config: PretrainedConfig, spec: AttentionSpec, *, found: bool) -> None:
    """UserError for names that are not those transformers writes. found: it finds the tensors under those that are."""
    missing: list[str] = []
    misshapen: list[str] = []
    for name, shape in expected(config, spec):
        if name not in checkpoint.entries:
            missing.append(name)
        elif checkpoint.shape(name) != shape:
            misshapen.append(f"`{name}` is {shown(list(checkpoint.shape(name)), 120)} and not {list(shape)}")
    if missing and found:
        raise UserError(
            f"{len(missing)} tensors have older names, which transformers changes at loading and other programs do not "
            f"know; missing: {_quoted(missing)}",
            where=shown(checkpoint.folder),
            fix="write the folder again with transformers (from_pretrained, save_pretrained)",
        )
    if missing:
        raise _lacking(checkpoint, missing)
    if misshapen:
        raise _misshapen(checkpoint, misshapen)


def _lacking(checkpoint: Checkpoint, names: Collection[str]) -> UserError:
    return UserError(
        f"the checkpoint lacks {len(names)} tensors of its architecture: {_quoted(names)}",
        where=shown(checkpoint.folder),
        fix="download it again, or check that config.json belongs to these weights",
    )


def _misshapen(checkpoint: Checkpoint, problems: Collection[str]) -> UserError:
    return UserError(
        f"{len(problems)} tensors have another shape than config.json asks for: {listed(problems)}",
        where=shown(checkpoint.folder),
        fix=_NOT_WHOLE,
    )


def _quoted(names: Collection[str]) -> str:
    return listed([f"`{shown(name, 100)}`" for name in names])
