"""What a layer's attention is called with, for every family: computed from it, the layer gives what eager gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.checkpoint.read import Checkpoint
from retrofit.kernels.sinks import with_sinks
from retrofit.kv_heads.calibrate.stream import LayerStream
from retrofit.model.families import describe
from retrofit.windows.nested import nested_windows
from tests.tiny import FAMILIES, VARIANTS, save_tiny, tiny_model

CASES = [*((family, {}) for family in FAMILIES), *VARIANTS]


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("family", "over"), CASES)
def test_attention_of_the_captured_inputs_is_the_layers_own(tmp_path: Path, family: str, over: dict[str, Any]) -> None:
    model = tiny_model(family, **over)
    spec, read = describe(model.config), Checkpoint.open(save_tiny(tmp_path, family, **over)).tensor
    ids_BT = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    expected: list[Tensor] = []
    for layer in model.get_submodule(spec.layers_path):
        layer.register_forward_hook(lambda _m, _args, out: expected.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids_BT)
    stream = LayerStream(model.config, spec, read, captures=True)
    hidden_BTC, kwargs = stream.embed(ids_BT)
    for layer in spec.layers:
        with stream.layer(layer.index) as run:
            inputs = run.attention_inputs(hidden_BTC, kwargs[layer.index])
            assert inputs.window == layer.window
            assert inputs.scale == pytest.approx(layer.scaling)
            assert inputs.softcap == layer.softcap
            chunks = [with_sinks(out[-1], lse[-1], inputs.sinks_H)[0] for _, out, lse in nested_windows(inputs, (), 16)]
            heads_BTN = torch.cat(chunks, 2).transpose(1, 2).flatten(2)
            hidden_BTC, _ = run.forward(hidden_BTC, kwargs[layer.index], heads_BTN=heads_BTN)
        torch.testing.assert_close(hidden_BTC, expected[layer.index], atol=5e-5, rtol=1e-4)
