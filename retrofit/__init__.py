"""Model surgery for Hugging Face checkpoints: fewer KV heads, flash-style kernels, longer context, measured.

    import retrofit

    retrofit.inspect("embedded")
    retrofit.run("quickstart", out="runs/quickstart")
    retrofit.evaluate("runs/quickstart/final", lengths=[1024, 2048])

Every command of the `retrofit` program is a function of the same name here. They are imported when first used:
`import retrofit` alone imports neither torch nor transformers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

COMMANDS = (
    "run",
    "plan",
    "prices",
    "inspect",
    "convert",
    "extend",
    "recover",
    "evaluate",
    "publish",
    "compare",
    "recipes",
    "schema",
    "doctor",
)
__all__ = [*COMMANDS, "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "UserError":
        from retrofit.errors import UserError

        return UserError
    if name in COMMANDS:
        return _command(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _command(name: str) -> Any:
    from retrofit.pipeline import commands

    return getattr(commands, name)


class _CommandPackage(ModuleType):
    """A subpackage that shares its name with a command: `retrofit.evaluate(...)` runs the command, whether or not
    `retrofit.evaluate.score` was imported before."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _command(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Front(ModuleType):
    """Importing a subpackage binds its name here; those with a command's name become callable as they are bound."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMMANDS and isinstance(value, ModuleType):
            value.__class__ = _CommandPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
