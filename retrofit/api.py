"""The public functions: one for each command, with the same words. Everything is checked before any long work.

Options are keys of the recipe language, and are validated by it: `convert(..., kv_heads=2)` is a recipe whose one step
is `convert: {kv_heads: 2}`. None means as the recipe language has it (`retrofit schema`); a number of tokens may be
written "32k". progress: True shows it on stderr, as on the command line, and False does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retrofit.catalogue import RecipeEntry, copy_recipe, is_recipe, recipes, schema, show_recipe
from retrofit.console import Progress
from retrofit.entry import begun, display
from retrofit.errors import UserError
from retrofit.files import local_path, output_path
from retrofit.recipe.load import load_suite
from retrofit.recipe.options import recipe_of
from retrofit.recipe.relative import are_relative
from retrofit.recipe.schema import CacheDtype, Definition, Device, Dtype, Kernel
from retrofit.releases import certify, export, publish
from retrofit.runs import budget_prices, plan, prices, run, window_prices
from retrofit.surgery import convert, extend, recover, window
from retrofit.views.notebook import as_tables

if TYPE_CHECKING:
    from retrofit.evaluation.compare import Comparison
    from retrofit.evaluation.result import ModelEvaluation
    from retrofit.model.inspect import Inspection, Undescribed
    from retrofit.system.doctor import Health

__all__ = [
    "RecipeEntry",
    "budget_prices",
    "certify",
    "compare",
    "convert",
    "copy_recipe",
    "doctor",
    "evaluate",
    "export",
    "extend",
    "inspect",
    "is_recipe",
    "plan",
    "prices",
    "publish",
    "recipes",
    "recover",
    "run",
    "schema",
    "show_recipe",
    "window",
    "window_prices",
]


@as_tables
def inspect(
    model: str | Path, *, revision: str | None = None, progress: Progress | bool = True
) -> Inspection | Undescribed:
    """What a model's attention is, what its KV cache costs, and which conversions are possible. Loads no weights.

    A folder of an architecture that transformers knows and this program does not still gets the RoPE linter's verdict.
    """
    shown = display(progress)
    with begun(f"inspect {model}", shown, model=model, revision=revision):
        from retrofit.context.rope import lint_folder, tried
        from retrofit.model.families import is_known
        from retrofit.model.inspect import Undescribed
        from retrofit.model.inspect import inspect as inspect_source
        from retrofit.model.load import load_config
        from retrofit.model.source import resolve

        try:
            source = resolve(model, revision=revision, weights=False, progress=shown)
        except UserError as error:
            folder = local_path(model, where="model")
            if not (folder / "config.json").is_file():
                raise
            config = load_config(folder)  # with the defaults of its class, which engines read too
            if is_known(config):
                raise
            return Undescribed(str(model), str(error), tuple(lint_folder(folder, config)), tried(config))
        config = load_config(source.folder)
        return inspect_source(source, findings=lint_folder(source.folder, config), engines=tried(config))


@as_tables
def evaluate(
    model: str | Path,
    *,
    text: Sequence[str] | None = None,
    lengths: Sequence[int | str] | int | str | None = None,
    suite: str | Path | None = None,
    documents: int | None = None,
    loss_on: Literal["assistant", "all"] | None = None,
    needle: Sequence[int | str] | int | str | None = None,
    depths: int | None = None,
    multi_key: bool | None = None,
    ruler: Sequence[int | str] | int | str | None = None,
    common_knowledge: bool | int | None = None,
    tasks: Sequence[str] | None = None,
    task_folder: str | Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool | None = None,
    system_instruction: str | None = None,
    log_samples: bool | None = None,
    context_gain: bool | None = None,
    long_ppl: bool | None = None,
    definitions: Sequence[Definition] | None = None,
    document_tokens: int | str | None = None,
    sequence_parallel: int | None = None,
    allow_extrapolation: bool = False,
    no_cost: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    kernel: Kernel | None = None,
    dtype: Dtype | str | None = None,
    kv_cache_dtype: CacheDtype | None = None,
    device: Device | None = None,
    progress: Progress | bool = True,
) -> ModelEvaluation:
    """Perplexity of `model` at several context lengths, its KV cache, its decoding speed, and the use of its context.

    suite: what to measure, from a file; the other arguments win over it. needle, ruler: lengths of these tests; depths,
    multi_key: of the needle test, the needles of all depths in one text.
    common_knowledge: the built-in questions; a number, a multiple of 4, asks so many of them.
    tasks: of lm-evaluation-harness (names, or YAML files, or names of files in task_folder), `limit` questions of each
    after `fewshot` examples; apply_chat_template: as turns of a dialogue; system_instruction: text before each.
    log_samples: keep prompts and answers beside `out`.
    definitions: perplexities as others define them, over `document_tokens` tokens of each document.
    sequence_parallel: so many processes of a launcher read each text together.
    kv_cache_dtype: keys and values are read as a serving engine's cache of this type gives them back.
    allow_extrapolation: lengths may lie beyond the model's positions.
    no_cost: leave out the measurements of speed and memory.
    out: where to keep the token losses (.npz), and beside them the answers to tasks; the same call goes on after a
    stop, and measures nothing again when it has ended. overwrite: they may be there.
    """
    given, shown = locals(), display(progress)
    section = {} if suite is None else load_suite(suite).evaluation().model_dump(mode="json")
    recipe = recipe_of("evaluate", given, {"evaluate": section | ({"cost_lengths": []} if no_cost else {})})
    file = None if out is None else output_path(out, where="--out")
    usual: Any = {"model": model, "revision": revision, "writes": (file,), "recipe": recipe}
    with begun(f"evaluate {model}", shown, **usual) as world:
        from retrofit.workflow import command

        return command.evaluate(
            recipe,
            file,
            revision=revision,
            allow_extrapolation=allow_extrapolation,
            overwrite=overwrite,
            world=world,
            progress=shown,
        )


@as_tables
def compare(
    a: str | Path,
    b: str | Path,
    *,
    lengths: Sequence[int | str] | int | str | None = None,
    bits: bool = False,
    progress: Progress | bool = True,
) -> Comparison:
    """Two stored results (run folders or .npz) side by side; no model is loaded.

    bits: compare bits per byte on the same bytes instead, which two models with different tokenizers allow.
    """
    asked = recipe_of("evaluate", {"lengths": lengths}, {"evaluate": {}}).evaluate
    if asked and are_relative(*asked.lengths):
        raise UserError("two results are compared at numbers of tokens", where="--lengths", fix="write 4096 or 4k")
    with begun(f"compare {a} with {b}", display(progress), torch=False):
        from retrofit.workflow.compare import compare_stored

        chosen = asked.lengths if asked and lengths is not None else None
        return compare_stored(local_path(a, where="A"), local_path(b, where="B"), lengths=chosen, bits=bits)


@as_tables
def doctor(*, progress: Progress | bool = True) -> Health:
    """What this machine can run, and what to install for the rest."""
    with begun("doctor", display(progress)):
        from retrofit.system.doctor import doctor as examine

        return examine()
