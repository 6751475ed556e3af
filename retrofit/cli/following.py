"""The next command to type after each one, in a form that a shell takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.escape import shell_word

if TYPE_CHECKING:
    from retrofit.evaluation.result import ModelEvaluation
    from retrofit.kv_heads.sweep.price_list import PriceList
    from retrofit.model.inspect import Inspection
    from retrofit.workflow.certify import Certified
    from retrofit.workflow.command import Written
    from retrofit.workflow.repair import Repaired
    from retrofit.workflow.run import RunResult


def lines(*commands: str) -> Iterator[str]:
    """The last lines of a command's output: one command, or a choice of them."""
    for index, command in enumerate(commands):
        yield f"\nnext: {command}" if index == 0 else f"  or: {command}"


def after_run(result: RunResult) -> Iterator[str]:
    """A run without a checkpoint to publish is the last one."""
    return lines(_command("publish", result.folder, "--repo", "OWNER/NAME")) if result.final else lines()


def after_plan(recipe: str, *options: object) -> Iterator[str]:
    """A plan is followed by the run with the same options."""
    return lines(_command("run", recipe, *options))


def after_prices(result: PriceList) -> Iterator[str]:
    """A list with a budget names its own command."""
    fewer = [price.kv_heads for price in result.prices[1:]]
    if result.command or not fewer:
        return lines()
    heads = max(fewer)
    return lines(_command("convert", result.model, "--kv-heads", heads, "--out", f"out/kv{heads}"))


def after_inspect(model: str, revision: str | None, result: Inspection) -> Iterator[str]:
    """The mildest conversion that is possible, or else a longer context."""
    pinned = () if revision is None else ("--revision", revision)
    heads = max(
        (one.kv_heads for one in result.conversions if one.possible and one.kv_heads != result.kv_heads), default=None
    )
    if heads is None:
        return lines(_command("extend", model, *pinned, "--factor", 2, "--out", "out/long"))
    return lines(_command("convert", model, *pinned, "--kv-heads", heads, "--out", f"out/kv{heads}"))


def after_certified(result: Certified) -> Iterator[str]:
    """What is proven can be published."""
    return lines(_command("publish", result.folder, "--repo", "OWNER/NAME"))


def after_repaired(result: Repaired) -> Iterator[str]:
    """A folder of this program's is certified; any other is looked at."""
    return lines(_command("certify" if result.recorded else "inspect", result.folder))


def after_written(result: Written, original: str | None = None, *, teacher: str | None = None) -> Iterator[str]:
    """What was written is measured, recovered, or certified. original: the model before, which teaches what was lost.
    teacher: the one that has taught it."""
    length = result.report.get("length")
    lengths = ("--lengths", length) if result.step == "extend" and length else ()
    commands = [_command("evaluate", result.folder, *lengths)]
    if result.step == "reexpress":
        return lines(*commands)
    if original is not None:
        out = result.folder.with_name(f"{result.folder.name}-recovered")
        commands.append(_command("recover", result.folder, "--teacher", original, "--out", out))
    before = original or teacher or ("MODEL" if result.step in ("convert", "window") else None)
    commands.append(_command("certify", result.folder, *(("--original", before) if before else ())))
    return lines(*commands)


def after_evaluate(model: str, result: ModelEvaluation) -> Iterator[str]:
    """Losses that were kept are compared; others are kept first."""
    if result.losses:
        return lines(_command("compare", "ORIGINAL.npz", result.losses))
    return lines(_command("evaluate", model, "--out", f"{Path(model).name}.npz"))


def after_compare(b: str) -> Iterator[str]:
    """A run that compares well is published."""
    return lines(_command("publish", b, "--repo", "OWNER/NAME")) if (Path(b) / "final").is_dir() else lines()


def after_recipe(recipe: object) -> Iterator[str]:
    """A recipe is planned before it is run."""
    return lines(_command("plan", recipe, "--model", "MODEL"))


def _command(*words: object) -> str:
    return " ".join(["retrofit", *map(shell_word, words)])
