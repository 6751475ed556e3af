"""Command-line options made from the fields of the recipe: name, choices, help and default are those of the key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from retrofit.console import Console
from retrofit.recipe.options import OPTIONS, Option
from retrofit.system.world import from_environment

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, progress on stderr.")]
Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A bundled recipe's name, a .yaml file, or a run's folder.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe.")]
Out = Annotated[str, typer.Option("--out", metavar="DIR", help="Folder to write; it must not exist.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what this program wrote there before.")]

Function = TypeVar("Function", bound=Callable[..., None])


def command(
    app: typer.Typer,
    function: str,
    *examples: str,
    name: str | None = None,
    without: Sequence[str] = (),
    shared: bool = False,
) -> Callable[[Function], Function]:
    """Make a command of a function whose `**options` are those of the public function that OPTIONS names.

    examples: lines for its help. name: where it is not the function's own. without: options that it does not offer, or
    that it has parameters of its own for. shared: the processes of a launcher share the work; otherwise rank 0 does it,
    and the others have nothing to do.
    """

    def decorate(body: Function) -> Function:
        offered = [option for option in OPTIONS.get(function, ()) if option.name not in without]
        app.command(name or body.__name__, epilog=_examples(examples))(_with_options(body, offered, shared))
        return body

    return decorate


def _with_options(body: Callable[..., None], offered: Sequence[Option], shared: bool) -> Callable[..., None]:
    """The function with a parameter for each option in the place of its `**options`."""
    hints = get_type_hints(body, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(body).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    named = {parameter.name for parameter in own}
    made = [_parameter(option) for option in offered if option.name not in named]
    first = [parameter for parameter in own if parameter.default is parameter.empty]
    parameters = [*first, *made, *(parameter for parameter in own if parameter not in first)]

    def run(**values: Any) -> None:
        if shared or from_environment().main:
            body(**values)

    run.__name__, run.__doc__ = body.__name__, body.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(option: Option) -> inspect.Parameter:
    """An option that is None unless given, and then the text that was typed: the recipe language reads it."""
    help_text = described(option, "; may be repeated" if option.many == "repeated" else "")
    kind: Any = str | None
    extra: dict[str, Any] = {"metavar": option.metavar}
    if option.kind == "flag":
        kind, extra = bool | None, {}
    elif option.many == "repeated":
        kind = list[str] | None
    if option.choices:
        extra["autocompletion"] = _completion(option.choices)
    if option.default is not None:
        help_text += f" [default: {option.default}]"
    annotation = Annotated[kind, typer.Option(option.flag, help=help_text, show_default=False, **extra)]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def described(option: Option, more: str = "") -> str:
    """What an option is, as a sentence in the words of its key."""
    text = f"{option.field.description}{more}"
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('?') else '.'}"


def _completion(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _examples(lines: Sequence[str]) -> str:
    return "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)


def console_for(json: bool) -> Console:
    """Where a command writes, for machines or for people."""
    return Console("json" if json else None)


Model = Annotated[str, typer.Argument(metavar="MODEL", help=described(OPTIONS["inspect"][0]))]
_SIZE = next(option for option in OPTIONS["window_prices"] if option.name == "size")
SIZE = f"With --windows: {_SIZE.field.description}. [default: {_SIZE.default}]"
