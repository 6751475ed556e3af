"""Every test runs offline and on one thread; set before anything imports torch or huggingface_hub."""

from __future__ import annotations

import gc
import os

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402 (after the environment is set)


def pytest_collection_finish() -> None:
    """The modules of torch and transformers, a million objects, are never looked through for garbage again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration multiplies in float32 on any processor: for tests of identities, which bfloat16 products blur."""
    for module in ("calibrate", "survey"):
        monkeypatch.setattr(f"retrofit.kv_heads.{module}.multiplies_in_bfloat16", lambda device: False)
