"""Second moments of one layer's queries, keys and values before RoPE: all that a merge needs to know of the text.

They are kept on disk, a file a layer (`save`, `load`, `saved`), so that every grouping, every number of KV heads and
every predicted cost is arithmetic without the model. Beside them stands whose they are (`MomentsSource`).

Legend: T tokens, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.files import read_json
from retrofit.system.device import float64
from retrofit.system.world import World

STREAM_QUANTILES = (0.5, 0.9, 0.99, 1.0)
# Rows of averaged values for each of a Gram's columns, below which the plain Gram is mixed in.
_ROWS_PER_COLUMN = 8
ORIGIN = "moments.json"
PROBES = "probes.json"
_FILE = re.compile(r"layer-(\d{3,})\.safetensors")
_OWN = re.compile(r"\.?layer-\d{3,}\.safetensors(\.partial)?|moments\.json|probes\.json")


@dataclass(frozen=True)
class MomentsSource:
    """Whose moments a folder holds. weights: digests of the checkpoint. stream: "original", or "converted to 2 KV
    heads" where the layers before each were converted when it was measured. content: digest of the text that was read,
    None where it was not recorded."""

    weights: Mapping[str, str]
    stream: str
    content: str | None = None

    def write(self, folder: Path) -> None:
        """Keep it beside the moments in `folder`."""
        (folder / ORIGIN).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, folder: Path, weights: Mapping[str, str]) -> MomentsSource:
        """What `write` left in `folder`. Raises UserError unless the moments there are of `weights`."""
        another, path = "name another --moments folder", folder / ORIGIN
        if not path.is_file():
            raise UserError("these moments do not say which weights they are of", where=str(folder), fix=another)
        record = read_json(path, missing="")
        if record.get("weights") != dict(weights):
            raise UserError("these moments are of other weights", where=str(folder), fix=another)
        content = record.get("content")
        return cls(dict(weights), str(record.get("stream")), content if isinstance(content, str) else None)


@dataclass(frozen=True)
class LayerMoments:
    """Means over tokens, float64.

    key_KDKD, value_KDKD: E[k k^T], E[v v^T] over all KV heads. query_KDD: E[q q^T] summed over the query heads that
    read each KV head. key_mean_KD, value_mean_KD: E[k], E[v]. stream_energy: mean over tokens of mean(h^2) of the
    residual stream that enters the layer, stream_quantiles: its STREAM_QUANTILES over tokens (None and () where the
    stream was not given).

    averaged_KDKD: the values' Gram after attention, E over tokens and query heads of (A_h v)(A_h v)^T for all KV
    heads' v jointly, A_h the attention pattern of query head h; of `averaged_tokens` tokens. averaged_mean_KD: the mean
    of the same. None where it was not computed.
    """

    tokens: int
    key_KDKD: Tensor
    query_KDD: Tensor
    value_KDKD: Tensor
    key_mean_KD: Tensor
    value_mean_KD: Tensor
    stream_energy: float | None = None
    stream_quantiles: tuple[float, ...] = ()
    averaged_KDKD: Tensor | None = None
    averaged_mean_KD: Tensor | None = None
    averaged_tokens: int = 0

    @property
    def merged_values_KDKD(self) -> Tensor:
        """The Gram that a merge of values minimises: after attention where that is known."""
        return self.value_KDKD if self.averaged_KDKD is None else self.averaged_KDKD

    @property
    def merged_mean_KD(self) -> Tensor:
        """The mean that belongs to `merged_values_KDKD`."""
        return self.value_mean_KD if self.averaged_mean_KD is None else self.averaged_mean_KD


class MomentSums:
    """Adds up the moments of a layer from chunks of tokens."""

    def __init__(self, kv_heads: int) -> None:
        self._kv_heads = kv_heads
        self._tokens = 0
        self._sums: list[Tensor] | None = None
        self._energies: list[Tensor] = []
        self._averaged: Tensor | None = None
        self._averaged_sum: Tensor | None = None
        self._averaged_rows = self._averaged_tokens = 0

    def add(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, stream_TC: Tensor | None = None) -> None:
        """Add a chunk. Chunks are multiplied in fp32 and summed in fp64, where the model runs; the sums are read from
        there when all is added. stream: the residual stream."""
        q = q_THD.float().unflatten(1, (self._kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
        k, v = k_TKD.float(), v_TKD.float()
        grams = k.flatten(1).T @ k.flatten(1), q.mT @ q, v.flatten(1).T @ v.flatten(1)
        parts = [float64(x) for x in (*grams, k.sum(0), v.sum(0))]
        self._sums = parts if self._sums is None else [a.add_(b) for a, b in zip(self._sums, parts, strict=True)]
        self._tokens += q_THD.shape[0]
        if stream_TC is not None:
            self._energies.append(stream_TC.float().square().mean(-1))

    def add_averaged(self, averaged_THKD: Tensor) -> None:
        """Add a chunk of values after attention: entry [t, h, k] is query head h's average of KV head k's values."""
        rows = averaged_THKD.float().flatten(2).flatten(0, 1)
        gram = float64(rows.T @ rows)
        total = float64(rows.sum(0))
        self._averaged = gram if self._averaged is None else self._averaged.add_(gram)
        self._averaged_sum = total if self._averaged_sum is None else self._averaged_sum.add_(total)
        self._averaged_rows += rows.shape[0]
        self._averaged_tokens += averaged_THKD.shape[0]

    def together(self, world: World) -> None:
        """Take in what the other processes have added; all of them call this, after at least an empty chunk."""
        assert self._sums is not None
        counts = self._tokens, self._averaged_rows, self._averaged_tokens
        self._tokens, self._averaged_rows, self._averaged_tokens = map(sum, zip(*world.gather(counts), strict=True))
        if self._averaged_rows and self._averaged is None:  # rows of other processes only
            self._averaged = torch.zeros_like(self._sums[2])
            self._averaged_sum = self._averaged.new_zeros(len(self._averaged))
        for tensor in (*self._sums, self._averaged, self._averaged_sum):
            if tensor is not None:
                world.sum_(tensor)
        if self._energies:
            self._energies = world.gather(torch.cat(self._energies).cpu())

    def finish(self, layer: int) -> LayerMoments:
        """Raises UserError where a moment is not finite (the weights or the text gave NaN or infinity)."""
        assert self._sums is not None and self._tokens, "no tokens were added"
        self._sums = [s.cpu() for s in self._sums]  # what follows is arithmetic on the CPU
        if self._averaged is not None and self._averaged_sum is not None:
            self._averaged, self._averaged_sum = self._averaged.cpu(), self._averaged_sum.cpu()
        key, query, value, key_mean, value_mean = (s / self._tokens for s in self._sums)
        named = [("keys", key), ("queries", query), ("values", value)]
        if self._averaged is not None:
            named.append(("averaged values", self._averaged))
        for name, tensor in named:
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"the {name} of the calibration pass are not finite",
                    where=f"layer {layer}",
                    fix="check the checkpoint for NaN weights (`retrofit inspect MODEL`), or calibrate on other text",
                )
        k = self._kv_heads
        d = value.shape[0] // k
        energies = torch.cat(self._energies).cpu().double() if self._energies else None
        averaged, averaged_mean = (None, None) if self._averaged is None else self._blended(value, value_mean.flatten())
        return LayerMoments(
            tokens=self._tokens,
            key_KDKD=key.reshape(k, d, k, d),
            query_KDD=query,
            value_KDKD=value.reshape(k, d, k, d),
            key_mean_KD=key_mean,
            value_mean_KD=value_mean,
            stream_energy=None if energies is None else float(energies.mean()),
            stream_quantiles=() if energies is None else _quantiles(energies),
            averaged_KDKD=None if averaged is None else averaged.reshape(k, d, k, d),
            averaged_mean_KD=None if averaged_mean is None else averaged_mean.reshape(k, d),
            averaged_tokens=self._averaged_tokens,
        )

    def _blended(self, value_NN: Tensor, mean_N: Tensor) -> tuple[Tensor, Tensor]:
        """The averaged Gram and mean; with few rows, the plain ones (at the same energy) fill in for what they lack."""
        assert self._averaged is not None and self._averaged_sum is not None
        averaged, averaged_mean = self._averaged / self._averaged_rows, self._averaged_sum / self._averaged_rows
        missing = max(0.0, 1 - self._averaged_rows / (_ROWS_PER_COLUMN * len(averaged)))
        scale = averaged.trace() / value_NN.trace().clamp_min(1e-300)
        gram = averaged * (1 - missing) + value_NN * scale * missing
        return gram, averaged_mean * (1 - missing) + mean_N * scale.sqrt() * missing


def _quantiles(values_T: Tensor) -> tuple[float, ...]:
    """STREAM_QUANTILES as order statistics (torch.quantile takes at most 16 million values)."""
    ordered = values_T.sort().values
    return tuple(float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for q in STREAM_QUANTILES)


def save(folder: str | Path, index: int, moments: LayerMoments) -> Path:
    """Write layer `index`'s moments to `layer-007.safetensors` (for 7) in `folder`; returns the file.

    Values are fp32 (a share of a Gram's energy is exact to 1e-7), a symmetric Gram its upper triangle. The file
    appears whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    averaged = moments.averaged_KDKD
    tensors = {
        "key": _packed(moments.key_KDKD),
        "query": moments.query_KDD,
        "value": _packed(moments.value_KDKD),
        "key_mean": moments.key_mean_KD,
        "value_mean": moments.value_mean_KD,
        **({} if averaged is None else {"averaged": _packed(averaged)}),
        **({} if moments.averaged_mean_KD is None else {"averaged_mean": moments.averaged_mean_KD}),
    }
    facts = {
        "tokens": moments.tokens,
        "averaged_tokens": moments.averaged_tokens,
        "stream_energy": moments.stream_energy,
        "stream_quantiles": moments.stream_quantiles,
    }
    path = layer_file(folder, index)
    partial = path.with_name(f".{path.name}.partial")
    save_file(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()},
        partial,
        metadata={"moments": json.dumps(facts)},
    )
    partial.replace(path)
    return path


def load(folder: str | Path, index: int) -> LayerMoments:
    """The moments that `save` wrote, in float64. Raises UserError when there are none or the file is broken."""
    path = layer_file(Path(folder), index)
    if not path.is_file():
        raise UserError(
            f"there are no moments of layer {index}",
            where=str(path),
            fix="convert with the method `calibrated` first, and let it keep its moments",
        )
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["moments"])
            stored = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"the moments of layer {index} cannot be read: {error}", where=str(path), fix="remove the file, run again"
        ) from error
    return _moments(stored, facts)


def saved(folder: str | Path) -> tuple[int, ...]:
    """Layers whose moments `folder` holds, in order."""
    folder = Path(folder)
    found = [_FILE.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return tuple(sorted(int(match[1]) for match in found if match))


def _moments(stored: Mapping[str, Tensor], facts: Mapping[str, object]) -> LayerMoments:
    k, d = stored["key_mean"].shape
    averaged = stored.get("averaged")
    moments = LayerMoments(
        tokens=0,
        key_KDKD=_unpacked(stored["key"], k, d),
        query_KDD=stored["query"],
        value_KDKD=_unpacked(stored["value"], k, d),
        key_mean_KD=stored["key_mean"],
        value_mean_KD=stored["value_mean"],
        averaged_KDKD=None if averaged is None else _unpacked(averaged, k, d),
        averaged_mean_KD=stored.get("averaged_mean"),
    )
    values = {**facts, "stream_quantiles": tuple(facts["stream_quantiles"])}  # type: ignore[arg-type]
    return replace(moments, **values)  # type: ignore[arg-type]


def require_own(folder: Path) -> None:
    """UserError unless `folder` is absent, empty, or holds moments and nothing that this program did not write."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    others = [path.name for path in folder.iterdir() if not _OWN.fullmatch(path.name)] if folder.is_dir() else [""]
    if others or not (folder / ORIGIN).is_file():
        named = f", for example `{shown(others[0])}`" if others and others[0] else ""
        raise UserError(
            f"the folder holds something else than moments{named}",
            where=shown(folder),
            fix="give another folder",
        )


def remove(folder: Path) -> None:
    """Remove the moments in `folder`, and the folder when nothing else is in it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _OWN.fullmatch(path.name):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def layer_file(folder: Path, index: int) -> Path:
    """Where the moments of a layer lie in a folder of moments."""
    return folder / f"layer-{index:03d}.safetensors"


def _packed(gram_KDKD: Tensor) -> Tensor:
    """Upper triangle of a symmetric Gram, row by row."""
    gram = gram_KDKD.flatten(2).flatten(0, 1)
    return gram[torch.ones_like(gram, dtype=torch.bool).triu()]


def _unpacked(upper: Tensor, k: int, d: int) -> Tensor:
    gram = upper.new_zeros(k * d, k * d)
    gram[torch.ones_like(gram, dtype=torch.bool).triu()] = upper
    return (gram + gram.triu(1).T).reshape(k, d, k, d)
