"""The public functions that change a model: one checkpoint in, a new one out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retrofit.console import Progress
from retrofit.entry import begun, display
from retrofit.errors import UserError
from retrofit.files import output_path
from retrofit.recipe.options import in_options, recipe_of
from retrofit.recipe.recovery import Divergence, Tracker
from retrofit.recipe.schema import Device, Dtype, Kernel, Method, Recipe, RopeMethod
from retrofit.system.world import from_environment
from retrofit.views.notebook import as_tables
from retrofit.workflow.rows import begun_alone, with_rows

if TYPE_CHECKING:
    from retrofit.workflow.command import Written


@as_tables
def convert(
    model: str | Path,
    *,
    out: str | Path,
    kv_heads: int | str | None = None,
    method: Method | None = None,
    repair: Literal["none", "o_proj", "transfer"] | None = None,
    calibrate: Sequence[str] | None = None,
    tokens: int | str | None = None,
    moments: str | Path | None = None,
    reexpress_only: bool = False,
    target: str | None = None,
    revision: str | None = None,
    dtype: Dtype | str | None = None,
    device: Device | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress | bool = True,
) -> Written:
    """Write `model` with `kv_heads` KV heads per layer to the new folder `out`; the same call resumes after a stop.

    overwrite: `out` and `moments` may hold what an earlier call wrote, which is replaced. What the method does not read
    is refused. moments: a new folder for what calibration measured in every layer.
    reexpress_only: write the same function as an architecture that can share KV heads (`target`, where there is a
    choice), and leave the heads as they are.
    """
    given, shown = locals(), display(progress)
    if reexpress_only == (kv_heads is not None) or (target is not None and not reexpress_only):
        raise UserError(
            "a conversion needs a number of KV heads, or to be a re-expression only (with or without a target)",
            where="convert",
            fix="add either --kv-heads G or --reexpress-only",
        )
    text = {"--repair": repair, "--calibrate": calibrate or None, "--tokens": tokens}
    if reexpress_only:
        _refuse_unread({"--method": method, **text, "--moments": moments}, "a re-expression")
    elif method in ("mean", "first"):
        _refuse_unread(text, f"the method `{method}`")
    recipe = recipe_of("convert", given)
    folder = output_path(out, where="--out")
    kept = None if moments is None else output_path(moments, where="--moments")
    place: Any = {"model": model, "revision": revision, "out": folder, "recipe": recipe}
    with begun(f"convert {model} -> {folder}", shown, **place) as world:
        from retrofit.workflow import command

        usual: Any = {"revision": revision, "overwrite": overwrite, "world": world, "progress": shown}
        if reexpress_only:
            return command.reexpress(str(model), folder, target=target, dtype=recipe.dtype, **usual)
        return command.write(recipe, folder, moments=kept, **usual)


@as_tables
def window(
    model: str | Path,
    *,
    out: str | Path,
    size: int | str | None = None,
    full_layers: Literal["auto"] | int | str | Sequence[int] | None = None,
    sinks: Literal["fitted", "none"] | None = None,
    target: Literal["auto", "granite_swa", "mistral"] | None = None,
    repair: Literal["none", "o_proj"] | None = None,
    text_loss: float | None = None,
    answer_loss: float | None = None,
    calibrate: Sequence[str] | None = None,
    tokens: int | str | None = None,
    sequence_length: int | str | None = None,
    measured_tokens: int | str | None = None,
    revision: str | None = None,
    dtype: Dtype | str | None = None,
    device: Device | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress | bool = True,
) -> Written:
    """Write `model` with sliding windows of `size` tokens in all layers but `full_layers` to the new folder `out`; the
    same call resumes after a stop.

    full_layers: their number, their share ("1/4") or "auto", which are chosen by measuring, or a list of layers.
    text_loss, answer_loss: what the window of one layer may add to the loss, in nats per token, for "auto". calibrate,
    tokens, sequence_length: of the text that windows are fitted on; measured_tokens: of what losses are measured on.
    overwrite: `out` may hold a checkpoint that an earlier call wrote, which is replaced.
    """
    recipe, shown = recipe_of("window", {**locals()}, {"window": {}}), display(progress)
    return _written("window", recipe, model, out, revision=revision, overwrite=overwrite, progress=shown)


@as_tables
def extend(
    model: str | Path,
    *,
    out: str | Path,
    length: int | str | None = None,
    factor: float | None = None,
    method: RopeMethod | None = None,
    attention_factor: float | None = None,
    text: Sequence[str] | None = None,
    tokens: int | str | None = None,
    link: bool | None = None,
    device: Device | None = None,
    seed: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | bool = True,
) -> Written:
    """Write `model` with a window of `length` tokens, or `factor` times its own, to the new folder `out`.

    overwrite: `out` may hold a checkpoint that an earlier call wrote, which is replaced.
    attention_factor: what cos and sin are multiplied with in effect, instead of the method's own. text, tokens: what
    the method `search` reads, and how much of it. link: unchanged weights become hard links to the model's files,
    where the disk allows them: a program that writes into one of the two then changes both.
    """
    recipe, shown = recipe_of("extend", {**locals()}, {"context": {}}), display(progress)
    return _written("extend", recipe, model, out, revision=revision, overwrite=overwrite, progress=shown)


@as_tables
def recover(
    model: str | Path,
    *,
    teacher: str | Path,
    out: str | Path,
    tokens: int | str | None = None,
    text: Sequence[str] | None = None,
    loss: Literal["distill", "lm"] | None = None,
    loss_on: Literal["assistant", "all"] | None = None,
    divergence: Divergence | None = None,
    on_policy: float | None = None,
    sequence_length: int | str | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    find_learning_rate: bool | None = None,
    rank: int | None = None,
    norms: bool | None = None,
    positions: Literal["full", "pose"] | None = None,
    short_share: float | None = None,
    document_masking: bool | None = None,
    gradient_checkpointing: bool | None = None,
    allow_repeats: bool | None = None,
    keep_adapter: bool | None = None,
    report_to: Sequence[Tracker] | Tracker | None = None,
    sequence_parallel: int | None = None,
    sequence_engine: Literal["auto", "torch", "ring"] | None = None,
    kernel: Kernel | None = None,
    device: Device | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress | bool = True,
) -> Written:
    """Train `model` to follow `teacher` (the model before the surgery) and write the merged checkpoint to `out`.

    batch_size: by default that of the training which was begun in `out`, else a row for each process of the launcher.
    keep_adapter: keep the adapter for peft as well, in the folder `<out>-adapter`.
    sequence_parallel: so many processes of a launcher share every row.
    overwrite: `out` may hold a checkpoint that an earlier call wrote, which is replaced.
    """
    if short_share is not None and positions != "pose":
        raise UserError(
            "short rows are a share of rows that skip positions, and none do",
            where="--short-share",
            fix="add --positions pose, or leave --short-share out",
        )
    recipe, shown = recipe_of("recover", {**locals()}, {"recover": {}}), display(progress)
    folder = output_path(out, where="--out")
    recipe, notes = with_rows(recipe, from_environment().size, begun_alone(folder, overwrite=overwrite))
    usual: Any = {"original": str(teacher), "overwrite": overwrite, "progress": shown}
    return _written(
        "recover", recipe, model, folder, notes=tuple(in_options("recover", note) for note in notes), **usual
    )


def _written(
    verb: str,
    recipe: Recipe,
    model: str | Path,
    out: str | Path,
    *,
    progress: Progress | None,
    overwrite: bool,
    revision: str | None = None,
    original: str | None = None,
    notes: Sequence[str] = (),
) -> Written:
    """The checkpoint that the one step of a recipe writes. notes: about the recipe, for people."""
    folder = output_path(out, where="--out")
    place: Any = {"model": model, "revision": revision, "out": folder, "recipe": recipe}
    with begun(f"{verb} {model} -> {folder}", progress, **place) as world:
        from retrofit.workflow.command import write

        for note in notes if progress else ():
            progress.note(note)  # type: ignore[union-attr]
        usual: Any = {"overwrite": overwrite, "world": world, "progress": progress}
        return write(recipe, folder, revision=revision, original=original, **usual)


def _refuse_unread(options: Mapping[str, Any], reader: str) -> None:
    """UserError when one of the options is given, none of which `reader` reads."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{reader} does not read {', '.join(given)}", where="convert", fix="leave it out")
