"""The documentation is about this program: nothing is missing from its references, and what it says to type exists."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import retrofit
from docs import generate
from hatch_build import portable
from retrofit import bundled
from retrofit.recipe.schema import Recipe

ROOT = generate.ROOT
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "recipes" / "README.md", *PAGES]
COMMANDS = dict(generate.commands())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and Python-Markdown make them."""
    words = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in words}


def lines_to_type(text: str) -> Iterator[str]:
    """Lines of fenced blocks without a language, and code in the text."""
    for language, block in FENCE.findall(text):
        if not language:
            yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", prose(text))


def arguments_of(line: str) -> list[str] | None:
    """The words after `retrofit`; None for a line that is no call of a command."""
    words = shlex.split(line.replace("{", "'{").replace("}", "}'") if "'" not in line else line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if len(words) < 2 or words[0] != "retrofit" or words[1] in ("COMMAND", "--help", "--version"):
        return None
    return words[1:]


def unknown(arguments: list[str]) -> str | None:
    """What a command line holds that the program does not know."""
    path = tuple(arguments[:2]) if tuple(arguments[:2]) in COMMANDS else tuple(arguments[:1])
    if path not in COMMANDS:
        return f"no command {arguments[0]}"
    options = {name: option for option in COMMANDS[path].params for name in option.opts}
    rest = iter(arguments[len(path) :])
    for word in rest:
        if not word.startswith("--") or word == "--help":
            continue
        name, equals, _ = word.partition("=")
        if name not in options:
            return f"no option {name} of {' '.join(path)}"
        value = None
        if not equals and not options[name].is_flag:
            value = next(rest, None)
        if name == "--set" and value and not is_key(value.partition("=")[0]):
            return f"no key {value}"
    return None


def is_key(dotted: str) -> bool:
    """Whether a dotted name is a key of the recipe language."""
    schema = retrofit.schema()
    current: Any = schema
    for part in dotted.split("."):
        found = current.get("properties", {}).get(part)
        if found is None:
            return False
        references = [option["$ref"] for option in [found, *found.get("anyOf", ())] if "$ref" in option]
        current = schema["$defs"][references[0].rpartition("/")[2]] if references else {}
    return True


# ------------------------------------------------------------------------------------------------- generated parts


def test_every_command_and_option_is_in_the_reference() -> None:
    page = generate.command_line()
    for path, command in COMMANDS.items():
        assert f"## retrofit {' '.join(path)}\n" in page
        section = page.split(f"## retrofit {' '.join(path)}\n")[1].split("\n## ")[0]
        options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
        assert [option for option in options if f"`{option}" not in section] == []
        assert section.count("\n| `") == len(command.params)


def test_every_recipe_and_suite_is_shown_as_it_is_written() -> None:
    for kind, page in (("recipes", generate.recipes()), ("suites", generate.suites())):
        for name in bundled.names(kind):
            assert (bundled.folder(kind) / f"{name}.yaml").read_text().rstrip() in page


def test_every_key_of_the_recipe_language_is_in_its_table() -> None:
    page = generate.recipe_keys()
    schema = retrofit.schema()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        table = page.split(f"### {name}\n")[1].split("\n### ")[0]
        assert [key for key in section["properties"] if f"| `{key}` |" not in table] == []


def test_a_default_in_the_table_is_that_of_the_schema() -> None:
    assert "| `tokens` | integer, ≥ 256, ≤ 1e+12 or `32k` | `49152` | tokens read in all |" in generate.recipe_keys()
    assert "| `text` | list of TextSource | `[python-docs, python-stdlib, self]` |" in generate.recipe_keys()


def test_every_public_function_and_result_is_in_the_python_reference() -> None:
    names = re.findall(r"^::: (\S+)$", generate.python_api(), re.MULTILINE)
    assert [name for name in retrofit.COMMANDS if f"retrofit.api.{name}" not in names] == []
    assert {"RunResult", "Plan", "Written", "ModelEvaluation", "Comparison"} <= {
        name.rpartition(".")[2] for name in names
    }


def test_every_result_file_is_listed_with_its_command() -> None:
    page = generate.results()
    for path in generate.RESULTS.glob("*.md"):
        title, command = generate.title_and_command(path.read_text())
        assert f"[{title}](../evals/results/{path.name})" in page
        measured = r"retrofit (run|plan|evaluate|extend)|python -m evals\.(benchmarks\.|engines)"
        assert re.search(measured, command), path.name


def test_what_a_result_file_says_in_a_comment_is_shown_on_its_page() -> None:
    text = (generate.RESULTS / "quickstart.md").read_text()
    assert generate.result_page(text).startswith(
        "# SmolLM2-135M-Instruct: quickstart\n\nThis is the report.md of `retrofit run quickstart-full`"
    )


def test_every_generated_part_stands_on_a_page() -> None:
    used = [name for page in PAGES for name in generate.MARK.findall(page.read_text())]
    assert sorted(used) == sorted(generate.PARTS)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    results = [f"results/{path.name}" for path in generate.RESULTS.glob("*.md")]
    assert [name for name in [page.name for page in PAGES] + results if f": {name}\n" not in navigation] == []


# ------------------------------------------------------------------------------------------- what the pages say


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(generate.fill(file.read_text()))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_files_that_are_named_are_there(path: Path) -> None:
    named = re.findall(r"`((?:retrofit|tests|evals|recipes|docs|examples|constraints)/[\w./-]*)`", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_and_options_that_are_named_exist(path: Path) -> None:
    calls = [(line, arguments_of(line)) for line in lines_to_type(path.read_text()) if "retrofit " in line]
    wrong = {line: problem for line, words in calls if words and (problem := unknown(words))}
    assert wrong == {}


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_make_targets_that_are_named_exist(path: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [match[1] for line in lines_to_type(path.read_text()) if (match := re.match(r"make ([a-z-]+)", line))]
    assert [name for name in named if name not in targets] == []


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_python_examples_call_functions_with_their_own_arguments(path: Path) -> None:
    for language, block in FENCE.findall(path.read_text()):
        if language != "python":
            continue
        for call in ast.walk(ast.parse(block)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("retrofit."):
                name = ast.unparse(call.func).removeprefix("retrofit.")
                function = getattr(generate.functions(), name)
                known = set(inspect.signature(function).parameters)
                assert {keyword.arg for keyword in call.keywords} <= known


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_yaml_examples_are_parts_of_a_recipe(path: Path) -> None:
    for language, block in FENCE.findall(path.read_text()):
        if language == "yaml":
            assert Recipe.model_validate({"name": "example", **yaml.safe_load(block)})


def test_the_checks_see_what_is_wrong() -> None:
    assert unknown(["convert", "M", "--kv-head", "1"]) == "no option --kv-head of convert"
    assert unknown(["recipes", "list", "--all"]) == "no option --all of recipes list"
    assert unknown(["run", "gqa", "--set", "convert.heads=1"]) == "no key convert.heads=1"
    assert unknown(["converts", "M"]) == "no command converts"
    assert arguments_of("OMP_NUM_THREADS=1 retrofit inspect M  # a comment") == ["inspect", "M"]


# ----------------------------------------------------------------------------------------------------- the README


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readme_names_every_architecture() -> None:
    from retrofit.model.families import KNOWN
    from retrofit.model.families.refused import REEXPRESSED

    table = (ROOT / "README.md").read_text().split("## What is supported")[1].split("\n\n")[1]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = {word for row in rows for word in re.findall(r"\w+", re.sub(r"\(.*?\)", "", row))}
    assert named == {*KNOWN, *REEXPRESSED} - {"gpt_bigcode"}  # which nothing but gpt2 and opt becomes


def test_the_readme_of_a_package_index_has_no_link_that_leads_nowhere() -> None:
    text = (ROOT / "README.md").read_text()
    alone, linked = portable(text, None), portable(text, "https://example.org/a/b/")
    assert re.findall(r"\]\((?!https?://)[^)]*\)", alone + linked) == []
    assert "[Recovery](https://example.org/a/b/blob/HEAD/docs/recovery.md)" in linked
    assert "](https://example.org/a/b/raw/HEAD/evals/results/quickstart.svg)" in linked
    assert "Recovery" in alone
