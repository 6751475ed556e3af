"""The `retrofit` command. Every command calls the function of the same name and shows what it returns; no logic here.

Options that set a key of the recipe are made from it (`options.py`); those that are written out here set none.
torch and transformers are imported by the functions, not by this module: `retrofit --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

import retrofit
from retrofit.cli import following, publishing, surgery
from retrofit.cli.group import Commands
from retrofit.cli.options import SIZE, Json, Model, Overwrite, Recipe, Set, command, console_for
from retrofit.cli.recipes import recipes_app
from retrofit.console import Console
from retrofit.errors import GateError, UserError
from retrofit.system.world import from_environment
from retrofit.views import budget as budget_views
from retrofit.views import measured, results
from retrofit.views import windows as window_views

app = typer.Typer(
    cls=Commands,
    name="retrofit",
    help="Give a causal language model cheaper attention and a longer context, and prove what it cost.\n\n"
    "Start with `retrofit inspect MODEL` and `retrofit recipes list`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
NoCost = Annotated[bool, typer.Option("--no-cost", help="Leave out the measurements of speed and memory.")]
Lengths = Annotated[str | None, typer.Option("--lengths", metavar="N,N", help="Context lengths.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"retrofit {retrofit.__version__}\n")
        raise typer.Exit


@command(
    app,
    "run",
    "retrofit run quickstart --out runs/quickstart",
    "retrofit run gqa --model meta-llama/Llama-2-7b-hf --set convert.kv_heads=4",
    "retrofit run quickstart --from recover",
    "retrofit run my.yaml --dry-run",
    shared=True,
)
def run(
    recipe: Recipe,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Run folder; default runs/NAME.")] = None,
    set_: Set = None,
    from_step: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Do this step and those after it again.")
    ] = None,
    no_cost: NoCost = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")] = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Run a recipe: convert, window, extend, recover, evaluate, publish.

    Run it again to go on after an interruption.
    """
    console = console_for(json)
    options |= {"out": out, "from_step": from_step, "no_cost": no_cost, "dry_run": dry_run}
    options["progress"] = console.progress
    try:
        result: Any = retrofit.run(recipe, overrides=set_ or (), **options)
    except GateError as error:  # what was measured is shown before what it misses
        if error.result is not None:
            console.show(error.result, results.run(error.result))
        raise
    if dry_run:
        _plan(console, result, recipe, options, set_)
    else:
        console.show(result, [*results.run(result), *following.after_run(result)])


@command(
    app,
    "prices",
    "retrofit plan gqa --model meta-llama/Llama-2-7b-hf",
    "retrofit plan gqa --model meta-llama/Llama-2-7b-hf --gpu h100",
    "retrofit plan my.yaml --json",
    "retrofit plan ./my-model --kv-heads",
    "retrofit plan ./my-model --kv-heads --kv-budget 2GiB@32k --moments moments/my-model",
    "retrofit plan gqa --model ./my-model --kv-heads",
    "retrofit plan ./my-model --windows --size 1024 --moments moments/my-model",
    "retrofit plan ./my-model --kv-budget 2GiB@128k --moments moments/my-model",
    shared=True,
)
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A bundled recipe's name, a .yaml file, a run's folder; for the lists also a model.",
        ),
    ],
    set_: Set = None,
    kv_heads: Annotated[
        bool, typer.Option("--kv-heads", help="The price list: what every possible number of KV heads costs.")
    ] = False,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            "--kv-budget",
            metavar="BYTES@TOKENS",
            help="What meets a budget, 2GiB@128k: KV heads, windows and cache types; with --kv-heads, heads alone.",
        ),
    ] = None,
    no_pilots: Annotated[
        bool,
        typer.Option("--no-pilots", help="With --kv-budget: the list alone, without measuring and recommending rows."),
    ] = False,
    windows: Annotated[
        bool, typer.Option("--windows", help="The list of windows: which layers need none, and what the others cost.")
    ] = False,
    size: Annotated[str | None, typer.Option("--size", metavar="N", help=SIZE)] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", metavar="N", help="For the lists: tokens of text; by default 16384, or 65536."),
    ] = None,
    no_cost: NoCost = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="Plan for a GPU that is not here: h100, h200, a100, l40s, 4090."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", metavar="N", help="How many of them a run is started on, one process each.")
    ] = None,
    moments: Annotated[
        str | None,
        typer.Option("--moments", metavar="DIR", help="For the lists: keep what was measured here, and read it again."),
    ] = None,
    json: Json = False,
    **options: Any,
) -> None:
    """What each step of a recipe would do, and its memory, disk and time; or what fewer KV heads, windows and smaller
    cache types would save and cost.

    The same command resumes a list that was interrupted.
    """
    console = console_for(json)
    model, revision = options.pop("model"), options.pop("revision")
    usual: Any = {"revision": revision, "overrides": set_ or (), "progress": console.progress}
    listed = kv_heads or windows or kv_budget is not None
    if windows and (kv_heads or kv_budget is not None):
        raise UserError("these are two lists", where="--windows", fix="leave it out, or ask for it alone")
    if size is not None and (kv_heads or not listed):
        raise UserError("--size belongs to windows", where="retrofit plan", fix="add --windows or --kv-budget")
    if no_pilots and (kv_heads or kv_budget is None):
        raise UserError("only --kv-budget has pilots", where="--no-pilots", fix="leave it out")
    if not listed:
        unread = {"calibrate": options["calibrate"], "tokens": tokens, "moments": moments, "device": options["device"]}
        for name, value in unread.items():
            if value:
                fix = "add --kv-heads, --windows or --kv-budget"
                raise UserError(f"--{name} belongs to a list", where="retrofit plan", fix=fix)
        if not from_environment().main:  # only the lists read text, which processes share
            return
        result = retrofit.plan(recipe, model=model, no_cost=no_cost, gpu=gpu, gpus=gpus, **usual)
        _plan(console, result, recipe, {"model": model, "revision": revision, "no_cost": no_cost}, set_)
        return
    if gpu is not None or gpus is not None:
        raise UserError("the lists are made on this machine", where="--gpu", fix="leave out --gpu and --gpus")
    if no_cost:
        raise UserError("the lists measure no speed", where="--no-cost", fix="leave it out")
    from retrofit.api import is_recipe

    named = model is not None or is_recipe(recipe)
    what = {"model": model, "recipe": recipe} if named else {"model": recipe}
    options |= {**what, "tokens": tokens, "moments": moments, **usual}
    if kv_heads:
        prices = retrofit.prices(**options, budget=kv_budget)
        console.show(prices, [*results.prices(prices), *following.after_prices(prices)])
    elif windows:
        found = retrofit.window_prices(**options, size=size)
        console.show(found, window_views.prices(found))
    else:
        met = retrofit.budget_prices(**options, size=size, budget=str(kv_budget), no_pilots=no_pilots)
        console.show(met, budget_views.budget(met))


def _plan(console: Console, plan: Any, recipe: str, options: Mapping[str, Any], values: list[str] | None) -> None:
    """A plan for people, and with its totals for machines."""
    given = [(f"--{name}", options.get(name)) for name in ("model", "revision", "out")]
    words = [word for pair in [*given, *(("--set", value) for value in values or ())] if pair[1] for word in pair]
    words += ["--no-cost"] if options.get("no_cost") else []
    totals = {"seconds": plan.seconds, "disk_bytes": plan.disk_bytes, "peak_bytes": plan.peak_bytes}
    console.show({**vars(plan), "totals": totals}, [*results.plan(plan), *following.after_plan(recipe, *words)])


@command(app, "inspect", "retrofit inspect Qwen/Qwen3-0.6B", "retrofit inspect ./my-model --json")
def inspect(model: Model, json: Json = False, **options: Any) -> None:
    """What a model's attention is, what its KV cache costs, and which conversions are possible. Loads no weights."""
    console = console_for(json)
    result = retrofit.inspect(model, progress=console.progress, **options)
    from retrofit.model.inspect import Inspection

    known = isinstance(result, Inspection)
    after = following.after_inspect(model, options["revision"], result) if isinstance(result, Inspection) else ()
    console.show(result, [*results.inspection(result), *after])
    if not known:
        raise typer.Exit(UserError.exit_code)


surgery.add_to(app)


@command(
    app,
    "evaluate",
    "retrofit evaluate embedded --lengths 1k,4k",
    "retrofit evaluate out/mqa --text book.txt --lengths 2048 --out mqa.npz --json",
    "retrofit evaluate out/mqa --suite long",
    "retrofit evaluate out/long --lengths 8k,16k --context-gain --needle 8k,16k",
    "retrofit evaluate out/long --lengths 8192 --definition yarn --document-tokens 32k",
    "retrofit evaluate out/mqa --lengths 1024 --task arc_easy --task my-task.yaml --limit 500 --out mqa.npz",
    shared=True,
)
def evaluate(
    model: Model,
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="NAME", help="A bundled suite or a .yaml file.")
    ] = None,
    allow_extrapolation: Annotated[
        bool, typer.Option("--allow-extrapolation", help="Allow lengths beyond the model's positions.")
    ] = False,
    no_cost: NoCost = False,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE.npz", help="Keep the token losses.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Perplexity at several context lengths with 95% intervals, bits per byte, KV-cache bytes and decoding speed.

    With --task also what lm-evaluation-harness asks; `retrofit compare` pairs two models' answers.
    """
    console = console_for(json)
    options |= {
        "suite": suite,
        "allow_extrapolation": allow_extrapolation,
        "no_cost": no_cost,
        "out": out,
        "overwrite": overwrite,
        "progress": console.progress,
    }
    result = retrofit.evaluate(model, **options)
    console.show(result, [*measured.evaluation(result), *following.after_evaluate(model, result)])


publishing.add_to(app)


@command(
    app,
    "compare",
    "retrofit compare runs/a runs/b",
    "retrofit compare original.npz converted.npz --lengths 1k,4k --json",
    "retrofit compare smollm2.npz qwen3.npz --bits-per-byte",
)
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run folder, or token losses (.npz).")],
    b: Annotated[str, typer.Argument(metavar="B", help="A run folder, or token losses (.npz).")],
    lengths: Lengths = None,
    bits: Annotated[
        bool, typer.Option("--bits-per-byte", help="Compare bits per byte; the models may have different tokenizers.")
    ] = False,
    json: Json = False,
) -> None:
    """Two models side by side from their stored token losses: perplexities, and the ratio with its 95% interval."""
    console = console_for(json)
    result = retrofit.compare(a, b, lengths=lengths, bits=bits, progress=console.progress)
    console.show(result, [*measured.comparison(result), *following.after_compare(b)])


app.add_typer(recipes_app, name="recipes")


@command(app, "schema", "retrofit schema > recipe.schema.json")
def schema() -> None:
    """The recipe language as JSON Schema, for editors and checkers."""
    Console("json").result(retrofit.schema())


@command(app, "doctor", "retrofit doctor", "retrofit doctor --json")
def doctor(json: Json = False) -> None:
    """What this machine can run: packages, devices, attention kernels, and what to install for the others."""
    console = console_for(json)
    result = retrofit.doctor(progress=console.progress)
    console.show(result, [*results.health(result), *following.lines("retrofit run quickstart")])
