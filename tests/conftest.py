"""Every test meets the same machine: its variables, home, locale, threads, devices and bfloat16 products are set here.

They are set before anything imports torch or huggingface_hub, and the processes that tests start inherit them. A test
that needs something else sets it itself.
"""

from __future__ import annotations

import gc
import locale
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

CHILDREN = Path(__file__).parent / "children"
# All that is left of the variables tests are started with: where programs and libraries are, and where there is room.
KEPT = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "CC", "CXX")
SET = {
    "USER": "tester",
    "TZ": "UTC",
    "COLUMNS": "80",
    "LINES": "24",
    "TERM": "dumb",
    "PYTHONUTF8": "1",  # of child processes
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that spins for another takes the core from it on a busy machine
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
UTF8_LOCALES = ("C.UTF-8", "en_US.UTF-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("machine", "what every test believes of the machine")
    group.addoption(
        "--bfloat16",
        choices=["no", "yes", "machine"],
        default="no",
        help="whether the processor is said to have bfloat16 products, in child processes too",
    )
    group.addoption("--threads", type=int, default=1, help="threads of a matrix product, in child processes too")


def pytest_configure(config: pytest.Config) -> None:
    home = tempfile.mkdtemp(prefix="retrofit-tests-home-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("PYTEST_")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(config.getoption("--threads")))
    path = os.pathsep.join([str(CHILDREN), *filter(None, [kept.get("PYTHONPATH")])])
    os.environ.clear()
    os.environ.update(kept | SET | threads | {"HOME": home, "PYTHONPATH": path})
    time.tzset()
    os.umask(0o022)
    for name in UTF8_LOCALES:
        try:
            locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            continue
        os.environ["LC_ALL"] = name
        break

    from tests.children import sitecustomize

    os.environ[sitecustomize.BFLOAT16] = config.getoption("--bfloat16")
    assert "torch" not in sys.modules, "torch has read the variables of the machine already"


def pytest_report_header(config: pytest.Config) -> str:
    return f"bfloat16 products: {config.getoption('--bfloat16')}, threads: {config.getoption('--threads')}"


def pytest_collection_finish() -> None:
    """The modules of torch and transformers, a million objects, are never looked through for garbage again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["no", "yes"], ids=["float32 products", "bfloat16 products"])
def bfloat16_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is said to have bfloat16 products: a test with this runs both ways on every machine."""
    from tests.children.sitecustomize import BFLOAT16

    monkeypatch.setenv(BFLOAT16, request.param)
    return request.param == "yes"


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are in float32 on any processor: for tests of identities, which bfloat16 products blur."""
    from tests.children.sitecustomize import BFLOAT16

    monkeypatch.setenv(BFLOAT16, "no")
