"""What one layer's heads lose under windows, as sums over tokens: enough for every window and every sink afterwards.

Query i of a head gets, from all keys, a_i; under a window n_i, whose keys have the log-sum-exp l_i; with a sink b on
top of it sigmoid(l_i - b) n_i. What the output projection W makes of the difference has the energy

    E(b) = sum_i w_i |W (a_i - sigmoid(l_i - b) n_i)|^2
         = sum_i w_i [a_i' M a_i - 2 sigmoid(l_i - b) a_i' M n_i + sigmoid(l_i - b)^2 n_i' M n_i],   M = W' W.

b stands in it through l_i - b alone, so the two products are added up on a grid of l (each token to the two nodes
around its own, linearly): E is then a sum over nodes for any b. Tokens that a window hides nothing from (near) and the
others (far) are kept apart: a sink costs the near ones too.

Legend: W windows, H query heads, D head dim, N nodes of the grid, B batch, R rows, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from retrofit.errors import UserError
from retrofit.kernels.captured import AttentionInputs
from retrofit.kernels.sinks import with_sinks
from retrofit.system.device import float64
from retrofit.system.world import World
from retrofit.windows.nested import nested_windows

LOWEST, STEP, NODES = -24.0, 0.75, 129
"""The grid of log-sum-exps; what lies outside counts as its end."""
NEAR, FAR = 0, 1


@dataclass(frozen=True)
class WindowMoments:
    """Means over tokens of weighted values, float64; dimensions of length 2 are near and far, and add up to the whole.

    windows: ascending. tokens: that were counted. weight_2W: the weight. full_2WH: a' M a. cross_2WHN, square_2WHN:
    a' M n and n' M n by node of the log-sum-exp. kept_WHND: n by node, near and far together; mean_HD: a.
    mass_WH: what the far tokens' softmax puts outside of the window, their mean by weight. output_HDD: M.
    """

    windows: tuple[int, ...]
    tokens: int
    weight_2W: Tensor
    full_2WH: Tensor
    cross_2WHN: Tensor
    square_2WHN: Tensor
    kept_WHND: Tensor
    mean_HD: Tensor
    mass_WH: Tensor
    output_HDD: Tensor


TENSORS = tuple(field.name for field in fields(WindowMoments) if field.name not in ("windows", "tokens"))


def nodes() -> Tensor:
    """The grid, [N], float64."""
    return LOWEST + STEP * torch.arange(NODES, dtype=torch.float64)


class WindowSums:
    """Adds up the moments of a layer, sequence by sequence.

    o_CHD: the layer's output projection by head. Chunks are multiplied in float32 and summed in float64.
    """

    def __init__(self, windows: Sequence[int], o_CHD: Tensor, device: str = "cpu") -> None:
        self.windows, self._device = tuple(windows), device
        count, (heads, dim) = len(self.windows), o_CHD.shape[1:]
        o_HCD = o_CHD.float().permute(1, 0, 2).to(device)
        self._output_HDD = o_HCD.mT @ o_HCD
        shapes = {
            "weight": (2, count),
            "full": (2, count, heads),
            "cross": (2, count, heads, NODES),
            "square": (2, count, heads, NODES),
            "kept": (count, heads, NODES, dim),
            "mean": (heads, dim),
            "mass": (count, heads),
        }
        place = "cpu" if device == "mps" else device
        self._sums = {name: torch.zeros(shape, dtype=torch.float64, device=place) for name, shape in shapes.items()}
        self._tokens = torch.zeros((), dtype=torch.int64, device=place)

    def add(self, inputs: AttentionInputs, weight_BT: Tensor) -> Tensor:
        """Add a batch; returns what the heads give without windows, [B, T, H D].

        weight: of each token, 0 for one that does not count.
        """
        chunks = []
        for rows, out, lse in nested_windows(inputs, self.windows):
            full_BHRD = with_sinks(out[-1], lse[-1], inputs.sinks_H)[0]
            self.add_rows(rows, full_BHRD, out[:-1], lse[:-1], lse[-1], weight_BT[:, rows])
            chunks.append(full_BHRD.transpose(1, 2).flatten(2))
        return torch.cat(chunks, 1)

    def add_rows(
        self, rows: slice, full_BHRD: Tensor, n_WBHRD: Tensor, lse_WBHR: Tensor, all_BHR: Tensor, weight_BR: Tensor
    ) -> None:
        """Add a chunk of rows. full: what the layer gives; n, lse: under the windows. all: log-sum-exp of all keys."""
        place = full_BHRD.device
        far_WR = torch.arange(rows.start, rows.stop, device=place) >= torch.tensor(self.windows, device=place)[:, None]
        a_BHRD = full_BHRD * weight_BR[:, None, :, None]
        am_BHRD = a_BHRD @ self._output_HDD
        full_BHR = (am_BHRD * full_BHRD).sum(-1)
        cross_WBHR = (am_BHRD * n_WBHRD).sum(-1)
        square_WBHR = ((n_WBHRD @ self._output_HDD) * n_WBHRD).sum(-1) * weight_BR[:, None]
        mass_WBHR = (1 - torch.exp(lse_WBHR - all_BHR)) * far_WR[:, None, None] * weight_BR[:, None]
        self._add("mean", a_BHRD.sum((0, 2)))
        self._add("mass", mass_WBHR.sum((1, 3)))
        for part, own_WR in ((NEAR, ~far_WR), (FAR, far_WR)):
            self._add("weight", own_WR.float() @ weight_BR.sum(0), part)
            self._add("full", torch.einsum("wr,bhr->wh", own_WR.float(), full_BHR), part)
        self._tokens += (weight_BR > 0).sum().to(self._tokens.device)
        at = ((lse_WBHR - LOWEST) / STEP).clamp(0, NODES - 1.001)
        low, share = at.long(), at - at.floor()
        count, _, heads, _ = lse_WBHR.shape
        line = torch.arange(count * heads, device=place).view(count, 1, heads, 1) * NODES + low
        half = far_WR.long()[:, None, None] * (count * heads * NODES) + line
        for up, portion in ((0, 1 - share), (1, share)):
            for name, values in (("cross", cross_WBHR), ("square", square_WBHR)):
                flat = torch.zeros(2 * count * heads * NODES, device=place)
                flat.index_add_(0, (half + up).flatten(), (values * portion).flatten())
                self._add(name, flat.view(2, count, heads, NODES))
            vectors = n_WBHRD * (portion * weight_BR[:, None])[..., None]
            kept = torch.zeros(count * heads * NODES, vectors.shape[-1], device=place)
            kept.index_add_(0, (line + up).flatten(), vectors.flatten(0, 3))
            self._add("kept", kept.view(count, heads, NODES, -1))

    def _add(self, name: str, values: Tensor, part: int | None = None) -> None:
        total = self._sums[name] if part is None else self._sums[name][part]
        total += float64(values)

    def together(self, world: World) -> None:
        """Take in what the other processes have added; all of them call this."""
        for tensor in (*self._sums.values(), self._tokens):
            world.sum_(tensor)

    def finish(self, layer: int) -> WindowMoments:
        """Raises UserError where a sum is not finite (the weights or the text gave NaN or infinity)."""
        sums = {name: tensor.cpu() for name, tensor in self._sums.items()}
        total = int(self._tokens)
        assert total, "no tokens were counted"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in sums.values()):
            raise UserError(
                "what attention gives on the calibration text is not finite",
                where=f"layer {layer}",
                fix="check the checkpoint for NaN weights (`retrofit inspect MODEL`), or calibrate on other text",
            )
        far_W = sums["weight"][FAR].clamp_min(1e-300)
        return WindowMoments(
            windows=self.windows,
            tokens=total,
            weight_2W=sums["weight"] / total,
            full_2WH=sums["full"] / total,
            cross_2WHN=sums["cross"] / total,
            square_2WHN=sums["square"] / total,
            kept_WHND=sums["kept"] / total,
            mean_HD=sums["mean"] / total,
            mass_WH=sums["mass"] / far_W[:, None],
            output_HDD=self._output_HDD.cpu().double(),
        )
