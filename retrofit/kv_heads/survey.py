"""One pass over a model, layer by layer: the moments of every layer on some text, and the loss on other text.

Memory is that of one layer, the residual streams of the text, and the head for some rows of logits at a time.

Legend: N sequences, B sequences of a batch, T tokens, C model width, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.kv_heads.measure import layer_moments
from retrofit.kv_heads.moments import save
from retrofit.kv_heads.stream import LayerStream
from retrofit.kv_heads.text import AVERAGED_TOKENS, CalibrationText
from retrofit.kv_heads.weights import Reader, read_layer
from retrofit.model.families import describe
from retrofit.model.load import load_config, multiplies_in_bfloat16
from retrofit.model.spec import AttentionSpec

if TYPE_CHECKING:
    from retrofit.console import Progress

TOKENS_PER_BATCH = 4096
ROWS = 256


def survey(
    folder: str | Path,
    scored_NT: Tensor,
    *,
    measured: CalibrationText | None = None,
    moments: str | Path | None = None,
    averaged_tokens: int = AVERAGED_TOKENS,
    device: str = "cpu",
    task: str = "read the model",
    progress: Progress | None = None,
) -> Tensor:
    """Mean loss in nats per token of each sequence of `scored_NT`, [N], float64.

    measured: text whose moments in every layer are written to the folder `moments`; averaged_tokens: as in `convert`.
    The stream is fp32, its matrix products bfloat16 where the processor has them. Raises UserError for moments or
    losses that are not finite.
    """
    checkpoint, config = Checkpoint.open(folder), load_config(folder)
    spec = describe(config)
    autocast = torch.bfloat16 if multiplies_in_bfloat16(device) else None
    stream = LayerStream(copy.deepcopy(config), spec, checkpoint.tensor, device=device, autocast=autocast)
    scored = list(scored_NT.split(max(1, TOKENS_PER_BATCH // scored_NT.shape[1])))
    seen = measured.batches() if measured else []
    embedded = [stream.embed(ids) for ids in (*(ids for _, ids in seen), *scored)]
    x, kwargs = [hidden for hidden, _ in embedded], [per_layer for _, per_layer in embedded]
    single = stream.embed(seen[0][1][:1])[1] if seen else []
    stream.free_embeddings()
    if progress:
        progress.start(task, len(spec.layers), "layers")
    for layer in spec.layers:
        with stream.layer(layer.index) as run:
            if moments is not None and seen:
                found = layer_moments(
                    run,
                    read_layer(checkpoint.tensor, layer),
                    layer,
                    seen,
                    x.__getitem__,
                    lambda i, index=layer.index: kwargs[i][index],  # type: ignore[misc]
                    single[layer.index],
                    averaged_tokens=averaged_tokens,
                )
                save(moments, layer.index, found)
            for i, hidden in enumerate(x):
                x[i], _ = run.forward(hidden, kwargs[i][layer.index])
        if progress:
            progress.advance(1)
    del stream
    readout = Readout(config, spec, checkpoint.tensor, device=device)
    losses_N = torch.cat([readout.losses(h, ids) for h, ids in zip(x[len(seen) :], scored, strict=True)])
    if progress:
        progress.finish()
    if not bool(torch.isfinite(losses_N).all()):
        raise UserError(
            "the loss on the calibration text is not finite",
            where=str(folder),
            fix="check the checkpoint for NaN weights (`retrofit inspect MODEL`), or give other text",
        )
    return losses_N


class Readout:
    """What a model makes of the residual stream after its last layer: its own class's final norm, head and scaling."""

    def __init__(self, config: PretrainedConfig, spec: AttentionSpec, read: Reader, *, device: str = "cpu") -> None:
        with init_empty_weights(include_buffers=False):
            self._model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        head = self._model.get_output_embeddings()
        tied = None
        if spec.tied_embeddings:  # not stored under a name of its own
            tied = next(f"{name}.weight" for name, module in self._model.named_modules() if module is head)
        for name, _ in list(self._model.named_parameters()):
            if not name.startswith(f"{spec.layers_path}.") and name != tied:
                set_module_tensor_to_device(self._model, name, device, value=read(name).float())
        if tied:
            head.weight = self._model.get_input_embeddings().weight
        layers: Any = self._model.get_submodule(spec.layers_path)
        self._given: Tensor | None = None
        for layer in layers:
            layer.forward = self._replace
        self._device = device

    def _replace(self, *_: object, **__: object) -> Tensor:
        """Stands in for every layer: the stream as it is given."""
        assert self._given is not None
        return self._given

    def losses(self, hidden_BTC: Tensor, ids_BT: Tensor) -> Tensor:
        """Mean next-token loss of each sequence, [B], float64; logits exist for `ROWS` rows at a time."""
        out = []
        with torch.no_grad():
            for hidden_TC, ids_T in zip(hidden_BTC, ids_BT.to(self._device), strict=True):
                total = 0.0
                for start in range(0, len(ids_T) - 1, ROWS):
                    rows = slice(start, min(start + ROWS, len(ids_T) - 1))
                    self._given = hidden_TC[None, rows]
                    logits_RV = self._model(input_ids=ids_T[None, rows], use_cache=False).logits[0].float()
                    targets_R = ids_T[rows.start + 1 : rows.stop + 1]
                    total += float(nn.functional.cross_entropy(logits_RV, targets_R, reduction="sum"))
                out.append(total / (len(ids_T) - 1))
        self._given = None
        return torch.tensor(out, dtype=torch.float64)
