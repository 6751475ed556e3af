"""What differs by device, decided here and nowhere else: sizes that fill it, and what it waits for.

On a CPU every number is what the processor's caches and a person's patience ask for. A GPU needs more rows at a time,
or it spends its time launching kernels; how many follows from its memory, in powers of two, so that one card gives the
same numbers every time, whatever else holds memory on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from retrofit.errors import UserError
from retrofit.model.spec import AttentionSpec
from retrofit.system.memory import available_memory, total_memory

if TYPE_CHECKING:
    from torch import Tensor

FLOAT32 = 4


def is_gpu(device: str) -> bool:
    """Whether work on this device runs beside the program, which then must not wait for every result of it."""
    return device.partition(":")[0] in ("cuda", "mps")


def steps_between_readings(device: str) -> int:
    """Training steps whose losses are read together. Reading one waits until the GPU has done all it was given."""
    return 16 if is_gpu(device) else 1


def chunks_between_readings(device: str) -> int:
    """Chunks of a scoring pass whose losses are read together."""
    return 4 if is_gpu(device) else 1


def forward_tokens(device: str, spec: AttentionSpec, value_bytes: int = 2, *, memory: int | None = None) -> int:
    """Tokens of one forward pass over a cache: 512 on a CPU, on a GPU up to 8,192 that fill an eighth of its memory.

    value_bytes: of a number in the dtype that is computed in. memory: bytes of the GPU, by default what it has.
    """
    return _filling(device, token_bytes(spec, value_bytes), 512, 8192, share=8, memory=memory)


def logit_rows(device: str, vocabulary: int, *, memory: int | None = None) -> int:
    """Rows of float32 logits that exist at a time: 256 on a CPU; on a GPU up to 4,096, three copies of which fill a
    64th of its memory."""
    return _filling(device, 3 * FLOAT32 * vocabulary, 256, 4096, share=64, memory=memory)


def sampled_sequences(
    device: str, spec: AttentionSpec, tokens: int, value_bytes: int, *, memory: int | None = None
) -> int:
    """Sequences of `tokens` tokens that a model samples together. On a CPU 64, or fewer (a power of two) so that their
    cache takes at most 2 GiB; on a GPU up to 512 that fill a quarter of its memory.

    Each token reads all weights once for all of them.
    """
    cache = spec.kv_cache_bytes(tokens, value_bytes)
    if is_gpu(device):
        return _filling(device, cache + 3 * FLOAT32 * spec.vocab_size, 32, 512, share=4, memory=memory)
    most = 64
    while most > 8 and most * cache > 2 << 30:
        most //= 2
    return most


def calibration_tokens(device: str, spec: AttentionSpec, least: int, *, memory: int | None = None) -> int:
    """Tokens of a batch of sequences that goes through one layer in float32: `least` on a CPU, up to 65,536 on a
    GPU."""
    return _filling(device, token_bytes(spec, FLOAT32), least, max(least, 65_536), share=8, memory=memory)


def score_rows(device: str, heads: int, keys: int, *, memory: int | None = None) -> int:
    """Queries whose float32 scores against `keys` keys exist at a time, for `heads` heads: on a CPU up to 256 that fill
    64 MiB, 16 at least; on a GPU up to 2,048 that fill a 32nd of its memory."""
    if not is_gpu(device):
        return max(16, min(256, (64 << 20) // (FLOAT32 * heads * keys)))
    return _filling(device, FLOAT32 * heads * keys, 64, 2048, share=32, memory=memory)


def token_bytes(spec: AttentionSpec, value_bytes: int) -> int:
    """What a token takes at most inside a layer: a few tensors of every width."""
    heads = max((layer.query_heads + 2 * layer.kv_heads) * layer.head_dim for layer in spec.layers)
    return value_bytes * (8 * spec.hidden_size + 3 * spec.mlp.width + 2 * heads)


def logits_at_a_time(device: str, rows: int, vocabulary: int, cached: int) -> int:
    """Rows of logits that a loss is computed of at a time: as many as `cached` values hold on a CPU, where they stay in
    the processor's cache; on a GPU all `rows`, as every operation is a launch."""
    return max(1, rows) if is_gpu(device) else max(1, cached // vocabulary)


Place = Literal["disk", "host", "device"]


def stream_place(device: str, nbytes: int, *, memory: int | None = None, host: int | None = None) -> Place:
    """Where residual streams are read from: the disk on a CPU, as one layer's memory is the promise there; on a GPU its
    own memory where they take at most a quarter of it, else that of the host under the same condition.

    memory, host: bytes of the GPU, and of the host that can be had; by default what there is.
    """
    if not is_gpu(device):
        return "disk"
    if nbytes <= (memory if memory is not None else total_memory(device) or 0) // 4:
        return "device"
    return "host" if nbytes <= (host if host is not None else available_memory() or 0) // 4 else "disk"


def algebra_device(device: str, width: int, seconds: Callable[[str], float] | None = None) -> str:
    """Where matrices of that width are decomposed in float64: on the GPU where they are wide and it is faster, which
    few are, as many have next to no float64; else on the CPU.

    seconds: of one decomposition on a device; measured by default, once.
    """
    if not device.startswith("cuda") or width < 1024:
        return "cpu"
    seconds = seconds or eigen_seconds
    return device if seconds(device) < seconds("cpu") else "cpu"


@lru_cache(maxsize=8)
def eigen_seconds(device: str, width: int = 1024) -> float:
    """Seconds of the eigenvectors of a symmetric float64 matrix."""
    import torch

    from retrofit.system.speed import synchronize

    a = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    a = a + a.T
    torch.linalg.eigh(a[:64, :64])  # loads the library
    synchronize(device)
    began = time.perf_counter()
    torch.linalg.eigh(a)
    synchronize(device)
    return time.perf_counter() - began


def _filling(device: str, bytes_each: int, least: int, most: int, *, share: int, memory: int | None) -> int:
    """The largest power of two times `least`, up to `most`, that takes one part in `share` of a GPU's memory."""
    if not is_gpu(device):
        return least
    memory = memory if memory is not None else total_memory(device) or 0
    size = least
    while 2 * size <= most and 2 * size * bytes_each * share <= memory:
        size *= 2
    return size


def float64(x: Tensor) -> Tensor:
    """In float64 where it is, or on the CPU where its device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def micro_batch(rows: int, attempt: Callable[[int], None], device: str) -> int:
    """Rows of a training step that are computed at a time: all on a CPU, on a GPU the largest divisor that fits.

    attempt: runs one forward and backward pass of so many rows; raises torch.OutOfMemoryError where they do not fit.

    Raises: UserError where not even one row fits.
    """
    if not is_gpu(device):
        return rows
    import torch

    for size in (size for size in range(rows, 0, -1) if rows % size == 0):
        try:
            attempt(size)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):  # MPS only says so
                raise
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            continue
        return size
    raise UserError(
        f"one row of training does not fit into the memory of {device}",
        where="recover",
        fix="set recover.gradient_checkpointing: true, or lower recover.sequence_length",
    )
