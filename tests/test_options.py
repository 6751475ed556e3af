"""One table of options: the command line, the Python functions and the recipe language agree on every one of them."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

import retrofit
from retrofit.cli.app import app
from retrofit.entry import begun
from retrofit.errors import UserError
from retrofit.recipe.options import OPTIONS, Option, in_options, option_of, recipe_of
from retrofit.views.notebook import VIEWS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LISTS = {"prices": "plan", "window_prices": "plan", "budget_prices": "plan"}
"""Functions that are options of another command."""
EVERY = [(command, option) for command, options in OPTIONS.items() for option in options]
PYTHON: dict[str, Any] = {
    "flag": bool,
    "whole": int,
    "number": float,
    "tokens": int | str,
    "layers": Literal["auto"] | int | str | Sequence[int],
}


def parameter(command: str, option: Option) -> inspect.Parameter:
    return inspect.signature(getattr(retrofit, command)).parameters[option.name]


def annotation(command: str, option: Option) -> Any:
    """The type of a parameter, which allows None as well unless it is needed."""
    return eval(parameter(command, option).annotation, inspect.unwrap(getattr(retrofit, command)).__globals__)


def bare(hint: Any) -> Any:
    """A type without what pydantic reads beside it."""
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return functools.reduce(operator.or_, map(bare, get_args(hint)))
    return hint


def expected(option: Option) -> Any:
    """The type that a parameter has in Python, from the key's."""
    if option.name in ("model", "task_folder"):
        return str | Path
    one = Literal[option.choices] if option.choices else PYTHON.get(option.kind, str)
    if option.name == "common_knowledge":
        return one | int  # how many questions
    if option.name == "dtype":
        return one | str  # bf16, half
    if option.many == "commas":
        return Sequence[one] | one
    return Sequence[one] if option.many else one


def ids(pairs: list[tuple[str, Option]]) -> list[str]:
    return [f"{command}-{option.name}" for command, option in pairs]


@pytest.mark.parametrize(("command", "option"), EVERY, ids=ids(EVERY))
def test_a_python_parameter_is_the_key_of_the_recipe(command: str, option: Option) -> None:
    found = parameter(command, option)
    assert found.default is None or (option.name == "model" and found.default is inspect.Parameter.empty)
    needed = found.default is inspect.Parameter.empty
    assert bare(annotation(command, option)) == expected(option) | (expected(option) if needed else None)


TYPED = [
    (command, option) for command, option in EVERY if not (option.name == "model" and command not in ("run", "plan"))
]


@pytest.mark.parametrize(("command", "option"), TYPED, ids=ids(TYPED))
def test_an_option_is_the_key_of_the_recipe(command: str, option: Option) -> None:
    offered = {one.name: one for one in COMMANDS[LISTS.get(command, command)].params}
    found = offered[option.name]
    assert found.opts == [option.flag]
    assert found.default is None
    assert found.multiple == (option.many == "repeated")
    assert found.is_flag == (option.kind == "flag")
    description = option.field.description or ""
    assert description[1:] in found.help
    assert (f"[default: {option.default}]" in found.help) == (option.default is not None)
    if option.choices:
        one = f"[{'|'.join(option.choices)}]"
        assert found.metavar == (f"{one},{one}" if option.many == "commas" else one)


@pytest.mark.parametrize("command", [name for name in retrofit.COMMANDS if name not in ("schema", "recipes")])
def test_every_python_parameter_is_an_option(command: str) -> None:
    """But those that are for Python alone, and `private`, which is `--public` turned round."""
    flags = {flag for one in COMMANDS[LISTS.get(command, command)].params for flag in (one.name, *one.opts)}
    called = {"overrides": "--set", "budget": "--kv-budget", "bits": "--bits-per-byte", "private": "--public"}
    alone = {"progress", "measure", "token"}
    names = [name for name in inspect.signature(getattr(retrofit, command)).parameters if name not in alone]
    assert [name for name in names if called.get(name, name) not in flags] == []


def test_every_result_has_its_tables() -> None:
    """By the name of its class, which a rename would lose."""
    returned = [getattr(retrofit, name).__annotations__["return"] for name in retrofit.COMMANDS]
    named = {name for hint in returned for name in re.findall(r"[A-Z]\w+", hint)}
    assert named - {"RecipeEntry", "Any"} == set(VIEWS)


def test_a_wrong_option_is_told_in_its_own_words() -> None:
    with pytest.raises(UserError) as caught:
        recipe_of("recover", {"rank": "many", "tokens": "12q", "text": [""], "loss": "destill", "seed": -1})
    said = str(caught.value)
    assert "--rank: must be a whole number, not `many`" in said
    assert "--tokens: must be a whole number of tokens, for example 4096 or 32k, not `12q`" in said
    assert "--text: must be text of at least 1 character" in said
    assert "--loss: must be one of distill, lm, not `destill`; did you mean `distill`?" in said
    assert "--seed: must be at least 0" in said


def test_an_error_in_a_part_is_told_of_the_option_that_makes_the_part() -> None:
    assert option_of("evaluate")(("evaluate", "needle")) == "--needle"
    assert option_of("convert")(("convert", "calibration", "text", 0, "source")) == "--calibrate"
    assert option_of("extend")(("context",)) is None


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        ("extend", {"length": 2048, "factor": 2}, "give exactly one of --length and --factor"),
        (
            "recover",
            {"tokens": 16, "sequence_length": 256},
            "--tokens is 16, and one step reads 256: --batch-size rows",
        ),
    ],
)
def test_an_error_about_several_options_names_them(command: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of(command, values, {"recover": {}} if command == "recover" else None)
    assert said in str(caught.value)
    assert "options:" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        (
            "evaluate",
            "give longer documents, or shorten `evaluate.lengths`",
            "give longer documents, or shorten --lengths",
        ),
        ("evaluate", "use kernel: blockwise, or auto", "use --kernel blockwise, or auto"),
        ("evaluate", "evaluate.lengths_of.x", "evaluate.lengths_of.x"),
        ("extend", "write `length: 2048` instead", "write `--length 2048` instead"),
        ("recover", "recover.positions: pose", "--positions pose"),
        ("recover", "or set allow_repeats: true", "or set --allow-repeats"),
        ("convert", "convert.calibration.text: self", "--calibrate self"),
        ("certify", "made in /tmp/engines: retrofit certify x", "made in /tmp/engines: retrofit certify x"),
    ],
)
def test_a_command_speaks_of_its_options(command: str, text: str, said: str) -> None:
    assert in_options(command, text) == said


def test_an_error_in_the_work_of_a_command_names_its_option() -> None:
    with pytest.raises(UserError) as caught, begun("extend x", None, torch=True):
        raise UserError("no", where="context.length", fix="write length: 2k")
    assert caught.value.where == "--length"
    assert caught.value.fix == "write --length 2k"
    with pytest.raises(UserError) as caught, begun("run x", None, torch=True):
        raise UserError("no", where="context.length")
    assert caught.value.where == "context.length"


def test_a_length_may_be_typed_as_it_is_said() -> None:
    found = recipe_of("evaluate", {"lengths": "1k,4k", "needle": ["32k"], "dtype": "half"}).evaluate
    assert found is not None
    assert found.needle is not None
    assert (found.lengths, found.needle.lengths, found.dtype) == ((1024, 4096), (32768,), "float16")


@pytest.mark.parametrize("command", ["convert", "extend", "recover", "evaluate", "run"])
def test_what_is_left_out_is_as_the_recipe_language_has_it(command: str) -> None:
    given = {"convert": {"kv_heads": 1}, "extend": {"factor": 2}}.get(command, {})
    recipe = recipe_of(command, given)
    for option in OPTIONS[command]:
        section: Any = recipe
        for name in option.key[:-1]:
            section = getattr(section, name, None)
        if section is not None and option.name not in given and not option.field.is_required():
            assert getattr(section, option.key[-1]) == option.field.get_default(call_default_factory=True)


EARLY = """
import sys
from retrofit.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "nosuch", "--kv-heads", "x", "--out", "out"], "--kv-heads: must be a whole number"),
        (["run", "gqa", "--set", "recover.tokens=many"], "recover.tokens: must be a whole number of tokens"),
        (["run", "gqq"], "did you mean `gqa`?"),
        (["plan", "gqa", "--model", "./missing/model"], "is no folder, no file and no hub id"),
        (["convert", "./missing/model", "--kv-heads", "1", "--out", "out"], "is no folder, no file and no hub id"),
        (["extend", "owner/model", "--length", "32k", "--out", "out"], "not in the local cache"),
        (["evaluate", "missing.gguf", "--lengths", "1k"], "there is no such file"),
        (["recover", "model", "--teacher", "model", "--out", "full"], "the output folder exists and is not empty"),
        (["run", "gqa", "--model", "model", "--out", "full"], "something that is not a run"),
        (["inspect", "./missing/model"], "is no folder, no file and no hub id"),
        (["compare", "a", "b", "--lengths", "1q"], "--lengths: must be a whole number of tokens"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_needs_no_torch_is_told_before_it_is_imported(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", EARLY, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "heavy: []" in done.stdout


def test_short_and_long_help_and_completion() -> None:
    short, long = (CliRunner().invoke(app, ["convert", flag]).output for flag in ("-h", "--help"))
    assert short == long
    assert "[calibrated|" in short or "|calibrated]" in short
    assert "--install-completion" in CliRunner().invoke(app, ["-h"]).output


def test_the_shell_completes_choices() -> None:
    words = "retrofit convert m --method cal"
    environment = {"_RETROFIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
    code = "from retrofit.cli.main import main; main()"
    run = [sys.executable, "-c", f"import sys; sys.argv = ['retrofit']; {code}"]
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.split() == ["calibrated"], done.stderr


def test_a_public_function_shows_its_parameters() -> None:
    code = "import retrofit, sys; help(retrofit.convert); print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "kv_heads: 'int | str | None' = None" in done.stdout
    assert done.stdout.rstrip().endswith("False False"), done.stderr
    assert Path(str(retrofit.__file__)).with_name("py.typed").exists()
