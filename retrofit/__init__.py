"""Model surgery for Hugging Face checkpoints: fewer KV heads, flash-style kernels, longer context, measured.

    import retrofit

    retrofit.inspect("embedded")
    retrofit.run("quickstart", out="runs/quickstart")
    retrofit.evaluate("runs/quickstart/final", lengths=[1024, 2048])

Every command of the `retrofit` program is a function of the same name here. They are imported when first used:
`import retrofit` alone imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrofit.api import (
        budget_prices,
        certify,
        compare,
        convert,
        doctor,
        evaluate,
        export,
        extend,
        inspect,
        plan,
        prices,
        publish,
        recipes,
        recover,
        run,
        schema,
        window,
        window_prices,
    )
    from retrofit.errors import UserError

__version__ = "0.1.0"

COMMANDS = (
    "run",
    "plan",
    "prices",
    "window_prices",
    "budget_prices",
    "inspect",
    "convert",
    "window",
    "extend",
    "recover",
    "evaluate",
    "certify",
    "export",
    "publish",
    "compare",
    "recipes",
    "schema",
    "doctor",
)
__all__ = [
    "UserError",
    "__version__",
    "budget_prices",
    "certify",
    "compare",
    "convert",
    "doctor",
    "evaluate",
    "export",
    "extend",
    "inspect",
    "plan",
    "prices",
    "publish",
    "recipes",
    "recover",
    "run",
    "schema",
    "window",
    "window_prices",
]


def __getattr__(name: str) -> Any:
    if name == "UserError":
        from retrofit.errors import UserError

        return UserError
    if name in COMMANDS:
        from retrofit import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
