"""Running a model layer by layer on stored activations: memory of one layer and the residual streams.

The model is built without weights; one pass with stubbed layers gives the embedded tokens and the keyword arguments
each layer is called with (masks, position embeddings), so no family needs code of its own here.

Legend: B sequences, T tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from retrofit.checkpoint.heap import give_back
from retrofit.kernels import captured, registry
from retrofit.kernels.captured import AttentionInputs
from retrofit.model.families.experts import EXPERTS
from retrofit.model.spec import AttentionSpec

Reader = Callable[[str], Tensor]


class _Captured(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass at a hook."""


class LayerStream:
    """Embedding and decoder layers of one model, one layer in memory at a time, in fp32.

    Matrix products run in `autocast` where that is not None; the residual stream stays in fp32. captures: attention is
    computed by the caller, from what `LayerRun.attention_inputs` gives, and not by a kernel.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        spec: AttentionSpec,
        read: Reader,
        *,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        captures: bool = False,
    ) -> None:
        self._spec, self._read = spec, read
        self.device, self._autocast = device, autocast
        with init_empty_weights(include_buffers=False):
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        if captures:
            captured.register()
            choice = registry.KernelChoice("auto", captured.NAME, "attention is computed by the caller")
        else:
            compute = str(autocast or torch.float32).removeprefix("torch.")
            choice = registry.choose("auto", spec, device, training=True, dtype=compute)
        registry.apply(self._model, choice)
        self._layers: nn.ModuleList = self._model.get_submodule(spec.layers_path)  # type: ignore[assignment]
        self._base_path = spec.layers_path.rpartition(".")[0]
        self._base = self._model.get_submodule(self._base_path)
        self._embeds = False

    def _materialise(self, prefix: str, values: dict[str, Tensor] | None = None) -> None:
        """Give the parameters below `prefix` their stored tensors, or those of `values` by full name."""
        module = self._model.get_submodule(prefix)
        for name, parameter in list(module.named_parameters()):
            full = f"{prefix}.{name}"
            tensor = values[full] if values and full in values else self._parameter(full, parameter.shape[0])
            set_module_tensor_to_device(module, name, self.device, value=tensor.float())

    def _parameter(self, name: str, rows: int) -> Tensor:
        """A parameter by its name in the module; stacked experts are put together from their matrices."""
        experts = EXPERTS.get(self._spec.family)
        groups = experts.stored(name, rows) if experts else ((name,),)
        if len(groups) == len(groups[0]) == 1:
            return self._read(groups[0][0])
        return torch.stack([torch.cat([self._read(part) for part in parts]) for parts in groups])

    @contextmanager
    def precision(self) -> Iterator[None]:
        """No gradients; matrix products in `autocast`."""
        with torch.no_grad(), self.products():
            yield

    def products(self) -> Any:
        """Matrix products in `autocast`."""
        return torch.autocast(torch.device(self.device).type, self._autocast, enabled=self._autocast is not None)

    def free_embeddings(self) -> None:
        """Drop what `embed` loaded."""
        self._embeddings("free")

    def _embeddings(self, what: Literal["load", "free"]) -> None:
        """Token embeddings, and positions where they are learned."""
        if self._embeds == (what == "load"):
            return
        for name, module in self._base.named_children():
            if isinstance(module, nn.Embedding) and what == "load":
                self._materialise(f"{self._base_path}.{name}")
            elif isinstance(module, nn.Embedding):
                _free(module)
        self._embeds = what == "load"

    def embed(self, input_ids_BT: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Residual stream that enters layer 0, [B, T, C], and each layer's keyword arguments for this batch shape.

        The embeddings stay in memory until `free_embeddings`.
        """
        self._embeddings("load")
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def stub(hidden_BTC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            assert all(arg is None for arg in args), "beside the residual stream, a layer is called with keywords"
            seen.append((hidden_BTC, kwargs))
            return hidden_BTC

        norms = [m for name, m in self._base.named_children() if "norm" in name or name == "ln_f"]
        patched = [*self._layers, *norms]
        for module in self._layers:
            module.forward = stub
        for norm in norms:
            norm.forward = lambda hidden, *a, **k: hidden
        try:
            with torch.no_grad():
                self._base(input_ids=input_ids_BT.to(self.device), use_cache=False)
        finally:
            for module in patched:
                del module.forward
        assert len(seen) == len(self._layers)
        return seen[0][0], [kwargs for _, kwargs in seen]

    @contextmanager
    def layer(self, index: int, values: dict[str, Tensor] | None = None) -> Iterator[LayerRun]:
        """Materialise one layer; `values` replaces stored tensors by full name. Freed at the end."""
        self._materialise(f"{self._spec.layers_path}.{index}", values)
        module = self._layers[index]
        try:
            yield LayerRun(self, module, self._spec, index)
        finally:
            _free(module)
            give_back()


class LayerRun:
    """One layer with its weights in memory."""

    def __init__(self, stream: LayerStream, module: nn.Module, spec: AttentionSpec, index: int) -> None:
        self._stream, self._module = stream, module
        self._prefix = f"{spec.layers_path}.{index}."
        self._attention = module.get_submodule(spec.attention_path)
        self._output = self._attention.get_submodule(_leaf(spec, index))
        self._path = f"{self._prefix}{spec.attention_path}."

    @property
    def device(self) -> str:
        """Where it computes."""
        return self._stream.device

    def load(self, values: dict[str, Tensor]) -> None:
        """Replace tensors of the layer by full name."""
        for full, tensor in values.items():
            set_module_tensor_to_device(
                self._module, full.removeprefix(self._prefix), self._stream.device, value=tensor.float()
            )

    def forward(
        self, hidden_BTC: Tensor, kwargs: dict[str, Any], *, heads_BTN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Residual stream after the layer, and the output projection's result before any norm, [B, T, C] each.

        heads: what `head_outputs` gave for the same stream, so that attention is not computed again.
        """
        kept: list[Tensor] = []
        hook = self._output.register_forward_hook(lambda _m, _args, out: kept.append(out))
        if heads_BTN is not None:
            self._attention.forward = lambda *args, **named: (self._output(heads_BTN), None)  # type: ignore[method-assign]
        try:
            with self._stream.precision():
                out = self._module(hidden_BTC, **kwargs)
        finally:
            hook.remove()
            if heads_BTN is not None:
                del self._attention.forward
        return out.float(), kept[0].float()

    def attention_input(self, hidden_BTC: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the q, k and v projections read, [B, T, C]."""
        return self._capture(self._attention, hidden_BTC, kwargs)

    def attention_inputs(self, hidden_BTC: Tensor, kwargs: dict[str, Any]) -> AttentionInputs:
        """Queries, keys and values as the attention of a stream that captures is called with them."""
        try:
            with self._stream.precision():
                self._module(hidden_BTC, **kwargs)
        except captured.Captured as found:
            return found.inputs
        raise AssertionError("the layer has no attention, or the stream does not capture it")

    def attend(self, hidden_BTC: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The output projection's result, [B, T, C], with gradients to those of the attention's parameters that ask for
        them."""
        args, named = self._call(self._attention, hidden_BTC, kwargs)
        kept: list[Tensor] = []
        hook = self._output.register_forward_hook(lambda _m, _args, out: kept.append(out))
        try:
            with self._stream.products():
                self._attention(*args, **named)
        finally:
            hook.remove()
        return kept[0].float()

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the attention by full name."""
        return {f"{self._path}{name}": parameter for name, parameter in self._attention.named_parameters()}

    def head_outputs(self, hidden_BTC: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the output projection reads, [B, T, H D]."""
        return self._capture(self._output, hidden_BTC, kwargs)

    def _capture(self, module: nn.Module, hidden_BTC: Tensor, kwargs: dict[str, Any]) -> Tensor:
        args, named = self._call(module, hidden_BTC, kwargs)
        tensor: Tensor = args[0] if args else named["hidden_states"]
        return tensor.float()

    def _call(
        self, module: nn.Module, hidden_BTC: Tensor, kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that `module`, a part of this layer, is called with."""
        kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept.append((args, named))
            raise _Captured

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with self._stream.precision():
                self._module(hidden_BTC, **kwargs)
        except _Captured:
            pass
        finally:
            handle.remove()
        return kept[0]


def _free(module: nn.Module) -> None:
    for name in [name for name, _ in module.named_parameters()]:
        set_module_tensor_to_device(module, name, "meta")


def _leaf(spec: AttentionSpec, index: int) -> str:
    """Path of the output projection below the attention module, from its slot's name."""
    marker = f".{spec.attention_path}."
    return spec.layers[index].o.name.rpartition(marker)[2].removesuffix(".weight")
