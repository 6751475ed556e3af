"""The generated parts of the documentation: Markdown made from the program itself each time the pages are built.

A page names a part in a comment, `<!-- generate: NAME -->`, and `fill` puts it there; PARTS says which there are.
Nothing here imports torch, transformers or mkdocs.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from pydantic.fields import FieldInfo

import retrofit
from retrofit import bundled
from retrofit.cli.app import app
from retrofit.recipe import schema as sections
from retrofit.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evals" / "results"
MARK = re.compile(r"<!-- generate: ([a-z-]+) -->")
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->\s*", re.DOTALL)
_COMMAND = re.compile(r"^(?:```\n(?P<block>.*?)\n```|`(?P<span>[^`]+)`)", re.DOTALL | re.MULTILINE)


def fill(markdown: str) -> str:
    """The page with every generated part in the place of its comment; KeyError for a part that there is not."""
    return MARK.sub(lambda match: PARTS[match[1]](), markdown)


def command_line() -> str:
    """Every command with its usage, arguments, options and examples, in the words of its `--help`."""
    return "\n".join(_command_section(path, command) for path, command in commands())


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command that does something, in the order of `retrofit --help`."""
    yield from _commands((), typer.main.get_command(app))


def recipes() -> str:
    """Every bundled recipe as it is written, comments included."""
    return "\n".join(_file_section(bundled.folder("recipes") / f"{name}.yaml") for name in bundled.names("recipes"))


def suites() -> str:
    """Every bundled evaluation suite as it is written, comments included."""
    return "\n".join(_file_section(bundled.folder("suites") / f"{name}.yaml") for name in bundled.names("suites"))


def recipe_keys() -> str:
    """Every key of the recipe language: type and range, default, meaning; a table for each section."""
    schema = retrofit.schema()
    parts = {"Recipe": schema, **schema["$defs"]}
    order = sorted(parts, key=lambda name: (name != "Recipe", name))
    return "\n".join(_keys_section(name, parts[name]) for name in order)


def python_api() -> str:
    """Every public function and what it returns, as blocks that mkdocstrings fills with signature and docstring."""
    module = functions()
    lines = ["## Functions", *(_reference(f"{module.__name__}.{name}") for name in retrofit.COMMANDS)]
    results = {path: None for name in retrofit.COMMANDS for path in _returned(getattr(module, name))}
    lines += ["## Results", *map(_reference, results)]
    lines += ["## Errors", _reference("retrofit.errors.UserError"), _reference("retrofit.errors.GateError")]
    return "\n\n".join(lines)


def functions() -> ModuleType:
    """The module that holds the public functions."""
    from retrofit import api

    return api


def measures() -> str:
    """The measures of a report, in its own words."""
    from retrofit.report import glossary

    return "\n\n".join(f"**{name}**: {text.format(units='')}" for name, text in glossary._TEXTS)


def layers() -> str:
    """The layers of the package, lowest first, from the contract that `make lint` checks."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]
    rows = [re.split(r"\s*[|:]\s*", layer) for layer in reversed(contract["layers"])]
    return "\n".join(f"{number}. {', '.join(f'`{name}`' for name in row)}" for number, row in enumerate(rows, 1))


def modules() -> str:
    """Every module of the package with the first line of its docstring, by folder."""
    folders = sorted({path.parent for path in (ROOT / "retrofit").rglob("*.py")})
    return "\n".join(filter(None, map(_modules_section, folders)))


def results() -> str:
    """The list of all result files: title, and the command that measured it."""
    lines = []
    for path in sorted(RESULTS.glob("*.md")):
        title, command = title_and_command(path.read_text("utf-8"))
        lines += [f"**[{title}](../evals/results/{path.name})**", "", "```", command, "```", ""]
    return "\n".join(lines)


def title_and_command(markdown: str) -> tuple[str, str]:
    """The heading of a result file and the command that made it, which stands at its beginning."""
    heading = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    comment = _COMMENT.match(markdown)
    command = _COMMAND.search(markdown)
    assert heading is not None, "a result file has a heading"
    if comment:  # `report.md of `COMMAND`, machine`
        spans = re.findall(r"`([^`]+)`", comment[1])
        return heading[1], max(spans, key=len)
    assert command is not None, f"{heading[1]}: no command"
    return heading[1], command["block"] or command["span"]


def result_page(markdown: str) -> str:
    """A result file as a page: what its first comment says is shown below the heading."""
    comment = _COMMENT.match(markdown)
    if comment is None:
        return markdown
    heading, rest = markdown[comment.end() :].split("\n", 1)
    return f"{heading}\n\nThis is the {comment[1]}.\n{rest}"


PARTS: Mapping[str, Callable[[], str]] = {
    "command-line": command_line,
    "recipes": recipes,
    "suites": suites,
    "recipe-keys": recipe_keys,
    "python-api": python_api,
    "measures": measures,
    "layers": layers,
    "modules": modules,
    "results": results,
}


def _commands(path: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from _commands((*path, name), child)


def _command_section(path: tuple[str, ...], command: Any) -> str:
    words = " ".join(("retrofit", *path))
    with command.make_context(words, [], resilient_parsing=True) as context:
        usage = " ".join(context.get_usage().removeprefix("Usage:").split())
        records = [parameter.get_help_record(context) for parameter in command.params]
    lines = [f"## {words}", "", inspect.cleandoc(command.help), "", "```", usage, "```", ""]
    rows = [(_cell(f"`{name}`"), _cell(" ".join(text.split()))) for name, text in filter(None, records)]
    if rows:
        lines += [_table(("argument or option", "meaning"), rows), ""]
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    return "\n".join([*lines, "```", *examples, "```", ""])


def _file_section(path: Path) -> str:
    return f"### {path.stem}\n\n```yaml\n{path.read_text('utf-8').rstrip()}\n```\n"


def _keys_section(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    model = Recipe if schema.get("title") == "Recipe" else getattr(sections, name)
    rows = [
        (
            f"`{key}`",
            _cell(_type_of(field)),
            "required" if key in required else _default(model.model_fields[key]),
            _cell(field.get("description", "")),
        )
        for key, field in schema["properties"].items()
    ]
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in schema.get("description", "").split("\n\n"))
    return f"### {name}\n\n{text}\n\n{_table(('key', 'type', 'default', 'meaning'), rows)}\n"


def _type_of(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type_of(option) for option in field["anyOf"])
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "examples" in field:  # another way of writing the same value
        return " or ".join(f"`{example}`" for example in field["examples"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = {"array": "list", "object": "mapping"}.get(field["type"], field["type"])
    if kind == "list":
        return f"list of {_type_of(field['items'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_number(field[key])}" if key in field else "" for key, sign in signs.items()]
    return ", ".join(filter(None, [kind, *limits]))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value < 10**12 else f"{value:g}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, sections.Section):
        return f"{type(value).__name__} with its defaults"
    if isinstance(value, tuple) and value and isinstance(value[0], sections.TextSource):
        value = [source.source for source in value]
    if isinstance(value, tuple):
        value = list(value)
    if value is None or value in ("", [], {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`".replace("'", "")


def _returned(function: Callable[..., Any]) -> list[str]:
    """Full names of the classes of this package that a function returns."""
    name = function.__module__
    tree = ast.parse(Path(str(sys.modules[name].__file__)).read_text("utf-8"))
    known = {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retrofit.")
        for alias in node.names
    }
    known |= {node.name: f"{name}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
    words = re.findall(r"\w+", str(function.__annotations__.get("return", "")))
    return [known[word] for word in words if word in known]


def _reference(name: str) -> str:
    return f"::: {name}"


def _modules_section(folder: Path) -> str:
    lines = []
    for path in sorted(folder.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        if text:
            name = folder.name if path.name == "__init__.py" else path.name
            lines.append((f"`{name}`", _cell(text.splitlines()[0])))
    place = folder.relative_to(ROOT).as_posix()
    return f"### {place}\n\n{_table(('module', 'what it is'), lines)}\n" if lines else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text for a cell of a table: no bar and no tag ends it."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else part.replace("|", "\\|").replace("<", "&lt;")
        for part in parts
    )
