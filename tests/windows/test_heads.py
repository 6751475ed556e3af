"""Both ways to the heads of a layer under a window give the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retrofit.windows.heads import as_it_is, windowed
from tests.windows.test_maths import dense, random_inputs


@pytest.mark.parametrize("window", [3, 14, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("own", [None, 8])
def test_heads_under_a_window_are_those_of_a_mask(window: int, softcap: float | None, own: int | None) -> None:
    inputs = random_inputs(softcap=softcap, window=own)
    sinks_H = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
    expected, _ = dense(inputs, window, sinks_H)
    found = windowed(inputs, window, sinks_H)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2), atol=5e-6, rtol=1e-5)


def test_heads_as_they_are_have_the_layers_own_window_and_sinks() -> None:
    sinks_H = torch.tensor([0.5, -1.0, 2.0, 0.0])
    inputs = replace(random_inputs(window=8), sinks_H=sinks_H)
    expected, _ = dense(inputs, None, sinks_H)
    torch.testing.assert_close(as_it_is(inputs), expected.transpose(1, 2).flatten(2), atol=5e-6, rtol=1e-5)
    bare, _ = dense(inputs, 4)
    torch.testing.assert_close(windowed(inputs, 4, None), bare.transpose(1, 2).flatten(2), atol=5e-6, rtol=1e-5)
