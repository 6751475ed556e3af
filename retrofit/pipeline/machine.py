"""How much memory this machine has for a step."""

from __future__ import annotations

from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory(device: str) -> int | None:
    """Bytes of memory and swap that this process may have, of the GPU on CUDA; None where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = [line.split() for line in info.read_text(encoding="ascii").splitlines()]
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdigit()}
    total = sizes.get("MemTotal:", 0) + sizes.get("SwapTotal:", 0)
    limits = [
        int(text) for path in _LIMITS if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdigit()
    ]
    return min([total, *limits]) if total else None
