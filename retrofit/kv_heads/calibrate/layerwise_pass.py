"""One pass over a model, layer by layer: the moments of every layer on some text, and the loss on other text.

The residual stream lies on disk (`disk.StreamFolder`): memory is one layer, its Grams, a batch, and the head for some
rows of logits at a time. A pass that was killed resumes at its layer.

Legend: N sequences, B sequences of a batch, T tokens, C model width, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from retrofit.data.calibration import AVERAGED_TOKENS, TOKENS_PER_BATCH, CalibrationText
from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.measure import layer_moments
from retrofit.kv_heads.calibrate.moments import load, save
from retrofit.kv_heads.calibrate.stream import LayerStream
from retrofit.kv_heads.disk import StreamFolder, work_key
from retrofit.kv_heads.merge.weights import Reader, read_layer
from retrofit.model.folder import ModelFolder, opened
from retrofit.model.load import product_dtype
from retrofit.model.spec import AttentionSpec
from retrofit.system.dealing import collected, own_share
from retrofit.system.device import calibration_tokens, logit_rows
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from retrofit.console import Progress

SCORED_TOKENS = 4096  # of a batch of text that is scored on a CPU
STREAM = "original"


def layerwise_pass(
    folder: str | Path | ModelFolder,
    scored_NT: Tensor,
    *,
    measured: CalibrationText | None = None,
    moments: str | Path | None = None,
    averaged_tokens: int = AVERAGED_TOKENS,
    device: str = "cpu",
    work: Path | None = None,
    world: World = ALONE,
    task: str = "read the model",
    progress: Progress | None = None,
) -> Tensor:
    """Mean loss in nats per token of each sequence of `scored_NT`, [N], float64.

    measured: text whose moments in every layer are written to the folder `moments`; averaged_tokens: as in `convert`.
    The stream is fp32, its matrix products bfloat16 where the processor has them. work: a folder for the stream, which
    a later call with the same arguments resumes from; the caller removes it. Raises UserError for moments or losses
    that are not finite, and where the disk has no room for the stream.

    world: the processes that make this call; batches of sequences are dealt out to them, and all return all losses.
    work, moments: rank 0's are taken, which all see.
    """
    model = opened(folder)
    checkpoint, config, spec = model.checkpoint, model.config, model.spec
    autocast = product_dtype(device)
    scored = list(scored_NT.split(max(1, calibration_tokens(device, spec, SCORED_TOKENS) // scored_NT.shape[1])))
    tokens = calibration_tokens(device, spec, TOKENS_PER_BATCH)
    seen = measured.batches(tokens) if measured and moments is not None else []
    batches = [*(ids for _, ids in seen), *scored]
    key = work_key(
        checkpoint,
        config.to_dict(),
        [CalibrationText(scored_NT, ("",) * len(scored_NT)).digest(), measured.digest() if measured and seen else None],
        [averaged_tokens, torch.device(device).type, str(autocast)],
    )
    own = own_share({i: ids.numel() for i, ids in enumerate(batches)}, world)
    with ExitStack() as stack:
        if work is None and world.main:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retrofit-stream-"))) / "stream"
        work = world.share(work)
        assert work is not None
        on_disk = StreamFolder(
            work,
            key,
            (STREAM,),
            [(*ids.shape, spec.hidden_size) for ids in batches],
            layers=len(spec.layers),
            whole=partial(load, moments) if moments is not None and seen else lambda index: None,
            to_the_end=True,
            device=device,
            own=own,
            world=world,
            say=progress.note if progress else lambda _: None,
        )
        if progress:
            if on_disk.resumed_from:
                progress.note(f"{task}: resumes after {on_disk.resumed_from} of {len(spec.layers)} layers")
            progress.start(task, len(spec.layers), "layers")
            progress.advance(on_disk.layers_done)
        stream = LayerStream(copy.deepcopy(config), spec, checkpoint.tensor, device=device, autocast=autocast)
        kwargs = _embedded(stream, on_disk, batches, own) if on_disk.layers_done < len(spec.layers) else {}
        for layer in spec.layers[on_disk.layers_done :]:
            x, after = (on_disk.stream(STREAM, layer.index + i) for i in (0, 1))
            named = {i: kwargs[tuple(batches[i].shape)][layer.index] for i in own}
            with stream.layer(layer.index) as run:
                if moments is not None and seen:
                    single = kwargs[1, seen[0][1].shape[1]][layer.index]
                    weights, hidden = read_layer(checkpoint.tensor, layer), partial(x.read, device=device)
                    taken = layer_moments(
                        run,
                        weights,
                        layer,
                        seen,
                        hidden,
                        named.__getitem__,
                        single,
                        averaged_tokens=averaged_tokens,
                        own=[i for i in own if i < len(seen)],
                        world=world,
                    )
                    if world.main:
                        save(moments, layer.index, taken)
                for i in own:
                    after.write(i, run.forward(x.read(i, device), named[i])[0])
            on_disk.finished(layer.index)
            if progress:
                progress.advance(1)
        del stream
        readout = Readout(config, spec, checkpoint.tensor, device=device)
        last, first = on_disk.stream(STREAM, len(spec.layers)), len(seen)
        read = {i: readout.losses(last.read(i, device), batches[i]) for i in own if i >= first}
        found = collected(read, world)
        losses_N = torch.cat([found[i] for i in range(first, len(batches))])
    if progress:
        progress.finish()
    if not bool(torch.isfinite(losses_N).all()):
        raise UserError(
            "the loss on the calibration text is not finite",
            where=str(folder),
            fix="check the checkpoint for NaN weights (`retrofit inspect MODEL`), or give other text",
        )
    return losses_N


def _embedded(
    stream: LayerStream, on_disk: StreamFolder, batches: list[Tensor], own: Sequence[int]
) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """Every layer's keyword arguments by the shape of a batch, of one sequence too; a fresh start also writes the
    stream into layer 0. own: numbers of the batches that this process has."""
    fresh, kwargs = on_disk.resumed_from is None, {}
    for i in own:
        ids = batches[i]
        if fresh or tuple(ids.shape) not in kwargs:
            hidden, kwargs[tuple(ids.shape)] = stream.embed(ids)
            if fresh:
                on_disk.stream(STREAM, 0).write(i, hidden)
    single = batches[0][:1]  # for averaged values
    kwargs[tuple(single.shape)] = stream.embed(single)[1]
    stream.free_embeddings()
    if fresh:
        on_disk.started()
    return kwargs


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

    def token_losses(self, hidden_BRC: Tensor, targets_BR: Tensor) -> Tensor:
        """Loss of each row's target, [B, R], float32; logits exist for a few rows at a time."""
        step = logit_rows(self._device, self._model.config.get_text_config().vocab_size)
        found: list[Tensor] = []
        with torch.no_grad():
            for hidden_RC, targets_R in zip(hidden_BRC, targets_BR.to(self._device), strict=True):
                for rows in (slice(start, start + step) for start in range(0, len(targets_R), step)):
                    self._given = hidden_RC[None, rows]
                    # The layers' stand-ins look at no ids; any of that number will do.
                    logits_RV = self._model(input_ids=targets_R[None, rows], use_cache=False).logits[0].float()
                    found.append(nn.functional.cross_entropy(logits_RV, targets_R[rows], reduction="none"))
        self._given = None
        return torch.cat(found).cpu().view(targets_BR.shape)  # read once, when all are computed

    def losses(self, hidden_BTC: Tensor, ids_BT: Tensor) -> Tensor:
        """Mean next-token loss of each sequence, [B], float64."""
        return self.token_losses(hidden_BTC[:, :-1], ids_BT[:, 1:]).double().mean(1)
