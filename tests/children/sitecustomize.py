"""Makes torch report bfloat16 products, or none, as the variable BFLOAT16 says, whatever the processor has.

`tests/conftest.py` imports it, and puts this folder on the path of the processes that tests start: Python imports a
module of this name before anything else. torch is not imported here, only changed once something imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import MappingProxyType, ModuleType
from typing import Any

BFLOAT16 = "RETROFIT_TESTS_BFLOAT16"  # yes, no, or machine: what the processor really has
MODULE = "torch.cpu"


def told(real: dict[str, Any]) -> dict[str, Any]:
    """The capabilities `real` of this processor with those for bfloat16 products that BFLOAT16 asks for."""
    asked = os.environ.get(BFLOAT16, "machine")
    if asked == "machine":
        return dict(real)
    found = {name: value for name, value in real.items() if not ("bf16" in name or name.startswith("amx"))}
    return found | {"avx512_bf16": asked == "yes"}


def change(module: ModuleType) -> None:
    """Make `torch.cpu.get_capabilities` tell what was asked for, again at every call."""
    real = getattr(module, "get_capabilities", dict)  # older releases of torch list none
    module.get_capabilities = lambda: MappingProxyType(told(real()))  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    """Finds `torch.cpu` as the other finders do, and changes it when it has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def changed(module: ModuleType) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec


if MODULE in sys.modules:
    change(sys.modules[MODULE])
else:
    sys.meta_path.insert(0, Finder())
