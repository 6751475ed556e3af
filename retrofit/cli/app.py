"""The `retrofit` command. Every command calls the function of the same name and shows what it returns; no logic here.

torch and transformers are imported by the functions, not by this module: `retrofit --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import retrofit
from retrofit.cli import streams
from retrofit.console import Console
from retrofit.errors import UserError
from retrofit.escape import shown, visible
from retrofit.surroundings import Stopped, require_usable, stopping

# click's ClickException, which typer has as a copy of its own or not, depending on its version.
_PARSER_ERROR: Any = typer.BadParameter.__mro__[2]
_GOES_ON = "Type the same command again: it goes on where it was."


class Commands(TyperGroup):
    """Commands in the order they are written; errors of people in at most three lines, exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _plain_words():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        try:
            require_usable()
            with stopping(), _plain_words():
                return super().invoke(ctx)
        except UserError as error:
            _stop(str(error), error.exit_code)
        except Stopped as stopped:
            _stop(f"\nstopped ({stopped}). {_GOES_ON}", stopped.exit_code)
        except KeyboardInterrupt:
            _stop(f"\nstopped. {_GOES_ON}", 130)
        except (OSError, MemoryError) as error:
            from retrofit.checkpoint.full import machine_error

            found = machine_error(error)
            if found is None:
                raise
            _stop(str(found), found.exit_code)


def _stop(message: str, code: int) -> None:
    sys.stderr.write(visible(message, keep="\n") + "\n")
    raise typer.Exit(code)


@contextmanager
def _plain_words() -> Iterator[None]:
    """What the command line's parser says about an argument shows its control characters as escapes."""
    try:
        yield
    except _PARSER_ERROR as error:
        error.message = visible(error.message, keep="\n")
        raise


class _Record(logging.LogRecord):
    """A line of a library's log, in which names of files and values of configurations are foreign."""

    def getMessage(self) -> str:
        return visible(super().getMessage(), keep="\n\t")


def _show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace)), keep="\n\t"))


app = typer.Typer(
    cls=Commands,
    name="retrofit",
    help="Give a causal language model cheaper attention and a longer context, and prove what it cost.\n\n"
    "Start with `retrofit inspect MODEL` and `retrofit recipes list`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="List, show and copy the bundled recipes.", no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, progress on stderr.")]
Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or `embedded`.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Hub id, folder, .gguf file, or `embedded`.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
Recipe = Annotated[str, typer.Argument(help="A bundled recipe's name, or a .yaml file.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe.")]
Out = Annotated[str, typer.Option("--out", metavar="DIR", help="Folder to write; it must not exist.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what this program wrote there before.")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="TEXT", help="python-docs, python-stdlib, self, a file, a folder, hub:DATASET."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the source's own), float32, bfloat16 or float16.")]
Kernel = Annotated[str, typer.Option("--kernel", help="auto, or a kernel that `retrofit doctor` lists.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def _examples(*lines: str) -> str:
    return "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"retrofit {retrofit.__version__}\n")
        raise typer.Exit


@app.command(
    epilog=_examples(
        "retrofit run quickstart --out runs/quickstart",
        "retrofit run gqa --model meta-llama/Llama-2-7b-hf --set convert.kv_heads=4",
        "retrofit run quickstart --from recover",
        "retrofit run my.yaml --dry-run",
    )
)
def run(
    recipe: Recipe,
    model: ModelOption = None,
    revision: Revision = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Run folder; default runs/NAME.")] = None,
    set_: Set = None,
    from_step: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Do this step and those after it again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")] = False,
    json: Json = False,
) -> None:
    """Run a recipe: convert, extend, recover, evaluate, publish. Run it again to go on after an interruption."""
    from retrofit.cli import output

    console = _console(json)
    result = retrofit.run(
        recipe,
        model=model,
        revision=revision,
        out=out,
        overrides=set_ or (),
        from_step=from_step,
        dry_run=dry_run,
        progress=console.progress,
    )
    output.run(console, result)


@app.command(
    epilog=_examples(
        "retrofit plan gqa --model meta-llama/Llama-2-7b-hf",
        "retrofit plan my.yaml --json",
        "retrofit plan ./my-model --kv-heads",
        "retrofit plan ./my-model --kv-budget 2GiB@32k --moments moments/my-model",
        "retrofit plan gqa --model ./my-model --kv-heads",
    )
)
def plan(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A bundled recipe's name, a .yaml file; with --kv-heads also a model."),
    ],
    model: ModelOption = None,
    revision: Revision = None,
    set_: Set = None,
    kv_heads: Annotated[
        bool, typer.Option("--kv-heads", help="The price list: what every possible number of KV heads costs.")
    ] = False,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            "--kv-budget", metavar="BYTES@TOKENS", help="With the list: the most KV heads that fit, 2GiB@32k."
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option("--calibrate", metavar="TEXT", help="For the list: text; may be repeated.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=64, help="For the list: tokens of text; default 16384.")
    ] = None,
    moments: Annotated[
        str | None,
        typer.Option("--moments", metavar="DIR", help="For the list: keep what was measured here, and read it again."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """What each step of a recipe would do, and its memory, disk and time; or what fewer KV heads would cost.

    A price list that was interrupted goes on with the same command.
    """
    from retrofit.cli import output

    console = _console(json)
    if not kv_heads and kv_budget is None:
        for name, value in (("--calibrate", calibrate), ("--tokens", tokens), ("--moments", moments)):
            if value:
                raise UserError(f"{name} belongs to the price list", where="retrofit plan", fix="add --kv-heads")
        output.plan(console, retrofit.plan(recipe, model=model, revision=revision, overrides=set_ or ()))
        return
    from retrofit.api import is_recipe

    named = model is not None or is_recipe(recipe)
    output.prices(
        console,
        retrofit.prices(
            model if named else recipe,
            recipe=recipe if named else None,
            budget=kv_budget,
            calibrate=calibrate or (),
            tokens=tokens,
            moments=moments,
            revision=revision,
            overrides=set_ or (),
            device=device,
            progress=console.progress,
        ),
    )


@app.command(epilog=_examples("retrofit inspect Qwen/Qwen3-0.6B", "retrofit inspect ./my-model --json"))
def inspect(model: Model, revision: Revision = None, json: Json = False) -> None:
    """What a model's attention is, what its KV cache costs, and which conversions are possible. Loads no weights."""
    from retrofit.cli import output
    from retrofit.model.inspect import Undescribed

    console = _console(json)
    result = retrofit.inspect(model, revision=revision)
    output.inspection(console, result)
    if isinstance(result, Undescribed):
        raise typer.Exit(UserError.exit_code)


@app.command(
    epilog=_examples(
        "retrofit convert embedded --kv-heads 1 --out out/mqa",
        "retrofit convert ./my-model --kv-heads 4 --method mean --out out/gqa",
        "retrofit convert ./my-model --kv-heads 4 --calibrate notes.txt --calibrate python-docs --out out/gqa",
        "retrofit convert EleutherAI/pythia-160m --reexpress-only --out out/phi",
    )
)
def convert(
    model: Model,
    out: Out,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", metavar="G", min=1, help="KV heads per layer afterwards.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="calibrated (default), mean or first; to compare: procrustes, real-pca."),
    ] = None,
    repair: Annotated[
        str | None, typer.Option("--repair", help="none, o_proj (default), or transfer (slower, better).")
    ] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option("--calibrate", metavar="TEXT", help="Text to calibrate on; may be repeated.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Calibration tokens; default 49152.")] = None,
    moments: Annotated[
        str | None,
        typer.Option("--moments", metavar="DIR", help="Keep what calibration measured in every layer in this folder."),
    ] = None,
    reexpress_only: Annotated[
        bool,
        typer.Option("--reexpress-only", help="Write the same function as an architecture that can share KV heads."),
    ] = False,
    target: Annotated[
        str | None, typer.Option("--target", metavar="TYPE", help="With --reexpress-only: the model type to become.")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the model with fewer KV heads, as the same architecture.

    GPT-NeoX, GPT-J, GPT-2 and OPT cannot hold fewer KV heads and are first re-expressed, exactly, as one that can.
    """
    from retrofit.cli import output

    console = _console(json)
    result = retrofit.convert(
        model,
        kv_heads=kv_heads,
        out=out,
        method=method,
        repair=repair,
        calibrate=calibrate or (),
        tokens=tokens,
        moments=moments,
        reexpress_only=reexpress_only,
        target=target,
        revision=revision,
        dtype=dtype,
        device=device,
        seed=seed,
        overwrite=overwrite,
        progress=console.progress,
    )
    output.written(console, result)


@app.command(
    epilog=_examples(
        "retrofit extend embedded --length 32768 --out out/long",
        "retrofit extend ./my-model --factor 2 --method ntk --out out/long",
        "retrofit extend ./my-model --factor 4 --attention-factor 1.1 --out out/long",
        "retrofit extend ./my-model --factor 4 --method search --text book.txt --out out/long",
    )
)
def extend(
    model: Model,
    out: Out,
    length: Annotated[int | None, typer.Option("--length", metavar="N", help="Positions afterwards.")] = None,
    factor: Annotated[float | None, typer.Option("--factor", metavar="F", help="Or: this many times as many.")] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="yarn, ntk, llama3, linear, none (only the length), or search (measure which is best)."
        ),
    ] = "yarn",
    attention_factor: Annotated[
        float | None,
        typer.Option("--attention-factor", metavar="A", help="Instead of the method's own; the query weights hold it."),
    ] = None,
    text: Texts = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Tokens that search reads; by default 12 times the new length.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links to the model's weights, where they stay as they are, not copies.")
    ] = False,
    revision: Revision = None,
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the model with a longer context window; only positions change, and with a factor the queries."""
    from retrofit.cli import output

    console = _console(json)
    result = retrofit.extend(
        model,
        out=out,
        length=length,
        factor=factor,
        method=method,
        attention_factor=attention_factor,
        text=text or (),
        tokens=tokens,
        link=link,
        device=device,
        seed=seed,
        revision=revision,
        overwrite=overwrite,
        progress=console.progress,
    )
    output.written(console, result)


@app.command(
    epilog=_examples(
        "retrofit recover out/mqa --teacher embedded --tokens 200000 --out out/recovered",
        "retrofit recover out/long --teacher embedded --positions pose --tokens 98304 --out out/used",
    )
)
def recover(
    model: Model,
    teacher: Annotated[str, typer.Option("--teacher", metavar="ORIGINAL", help="The model before the surgery.")],
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Training tokens.")],
    out: Out,
    text: Texts = None,
    loss: Annotated[str, typer.Option("--loss", help="distill or lm.")] = "distill",
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens per sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per optimizer step.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Its peak; by default 0.576 / hidden size."),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="LoRA rank; alpha is twice the rank.")] = 64,
    norms: Annotated[bool, typer.Option("--norms", help="Train the norms as well.")] = False,
    positions: Annotated[
        str, typer.Option("--positions", help="full, or pose: short rows whose positions skip ahead up to the window.")
    ] = "full",
    short_share: Annotated[
        float | None,
        typer.Option("--short-share", help="With pose: share of rows at ordinary positions; default 0.35."),
    ] = None,
    document_masking: Annotated[
        bool, typer.Option("--document-masking", help="Packed documents do not see each other.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    kernel: Kernel = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Win quality back by a short adapter training, merged into the written checkpoint."""
    from retrofit.cli import output

    console = _console(json)
    result = retrofit.recover(
        model,
        teacher=teacher,
        tokens=tokens,
        out=out,
        text=text or (),
        loss=loss,
        sequence_length=sequence_length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rank=rank,
        norms=norms,
        positions=positions,
        short_share=short_share,
        document_masking=document_masking,
        gradient_checkpointing=gradient_checkpointing,
        kernel=kernel,
        device=device,
        seed=seed,
        overwrite=overwrite,
        progress=console.progress,
    )
    output.written(console, result)


@app.command(
    epilog=_examples(
        "retrofit evaluate embedded --lengths 1024,4096",
        "retrofit evaluate out/mqa --text book.txt --lengths 2048 --out mqa.npz --json",
        "retrofit evaluate out/mqa --suite long",
        "retrofit evaluate out/long --lengths 8192,16384 --context-gain --needle 8192,16384",
        "retrofit evaluate out/long --lengths 8192 --definition yarn --document-tokens 32768",
        "retrofit evaluate out/mqa --lengths 1024 --task arc_easy --task my-task.yaml --limit 500 --out mqa.npz",
    )
)
def evaluate(
    model: Model,
    text: Texts = None,
    lengths: Annotated[str | None, typer.Option("--lengths", metavar="N,N", help="Context lengths.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="A bundled suite or a .yaml file.")] = None,
    documents: Annotated[int | None, typer.Option("--documents", help="Documents per text source.")] = None,
    needle: Annotated[str | None, typer.Option("--needle", metavar="N,N", help="Needle test at these lengths.")] = None,
    depths: Annotated[
        int | None, typer.Option("--depths", min=1, help="Depths of the needle, from 0 to 1; default 5.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="The needles of all depths in one text: one pass a length, harder.")
    ] = False,
    ruler: Annotated[str | None, typer.Option("--ruler", metavar="N,N", help="RULER's tasks at these lengths.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="A task of lm-evaluation-harness, or its YAML file; repeatable."),
    ] = None,
    task_folder: Annotated[
        str | None, typer.Option("--task-folder", metavar="DIR", help="With --task: YAML files of tasks of your own.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="With --task: examples before each question.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="With --task: questions of each; default all.")
    ] = None,
    context_gain: Annotated[
        bool, typer.Option("--context-gain", help="What context beyond the native length gives on the same tokens.")
    ] = False,
    long_ppl: Annotated[
        bool, typer.Option("--long-ppl", help="Perplexity of the tokens that need long context.")
    ] = False,
    definition: Annotated[
        list[str] | None,
        typer.Option("--definition", help="sliding, transformers, lm-eval, yarn, yarn-truncated or longlora."),
    ] = None,
    document_tokens: Annotated[
        int | None, typer.Option("--document-tokens", help="With --definition: tokens read of each document.")
    ] = None,
    beyond: Annotated[bool, typer.Option("--beyond", help="Allow lengths beyond the model's positions.")] = False,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE.npz", help="Keep the token losses.")] = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    kernel: Kernel = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Perplexity at several context lengths with 95% intervals, bits per byte, KV-cache bytes and decoding speed.

    With --task also what lm-evaluation-harness asks; `retrofit compare` pairs two models' answers.
    """
    from retrofit.cli import output_measured

    console = _console(json)
    result = retrofit.evaluate(
        model,
        text=text or (),
        lengths=_numbers(lengths),
        suite=suite,
        documents=documents,
        needle=_numbers(needle, "--needle"),
        depths=depths,
        together=together,
        ruler=_numbers(ruler, "--ruler"),
        tasks=task or (),
        task_folder=task_folder,
        fewshot=fewshot,
        limit=limit,
        context_gain=context_gain,
        long_ppl=long_ppl,
        definitions=definition or (),
        document_tokens=document_tokens,
        beyond=beyond,
        out=out,
        overwrite=overwrite,
        revision=revision,
        kernel=kernel,
        dtype=dtype,
        device=device,
        progress=console.progress,
    )
    output_measured.evaluation(console, result)


@app.command(
    epilog=_examples(
        "retrofit publish runs/quickstart/final --repo me/SmolLM2-135M-mqa-16k",
        "retrofit publish runs/quickstart/final --repo me/SmolLM2-135M-mqa-16k --public",
    )
)
def publish(
    folder: Annotated[str, typer.Argument(help="The `final` folder of a run.")],
    repo: Annotated[str, typer.Option("--repo", metavar="ID", help="OWNER/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; private otherwise.")] = False,
    license: Annotated[str | None, typer.Option("--license", help="License id, when the card has none.")] = None,
    json: Json = False,
) -> None:
    """Push a finished checkpoint to the hub. The token is that of `hf auth login` or HF_TOKEN."""
    from retrofit.cli import output

    console = _console(json)
    result = retrofit.publish(folder, repo=repo, private=not public, license=license, progress=console.progress)
    output.published(console, result)


@app.command(
    epilog=_examples(
        "retrofit compare runs/a runs/b",
        "retrofit compare original.npz converted.npz --lengths 1024,4096 --json",
        "retrofit compare smollm2.npz qwen3.npz --bits-per-byte",
    )
)
def compare(
    a: Annotated[str, typer.Argument(help="A run folder, or token losses (.npz).")],
    b: Annotated[str, typer.Argument(help="A run folder, or token losses (.npz).")],
    lengths: Annotated[str | None, typer.Option("--lengths", metavar="N,N", help="Context lengths.")] = None,
    bits: Annotated[
        bool, typer.Option("--bits-per-byte", help="Compare bits per byte; the models may have different tokenizers.")
    ] = False,
    json: Json = False,
) -> None:
    """Two models side by side from their stored token losses: perplexities, and the ratio with its 95% interval."""
    from retrofit.cli import output_measured

    console = _console(json)
    output_measured.comparison(console, retrofit.compare(a, b, lengths=_numbers(lengths), bits=bits))


@recipes_app.command("list", epilog=_examples("retrofit recipes list"))
def recipes_list(json: Json = False) -> None:
    """The bundled recipes."""
    from retrofit.cli import output

    output.recipes(_console(json), retrofit.recipes())


@recipes_app.command("show", epilog=_examples("retrofit recipes show gqa"))
def recipes_show(name: Recipe, set_: Set = None, json: Json = False) -> None:
    """A recipe with every default written out."""
    from retrofit import api
    from retrofit.cli import output

    output.recipe(_console(json), api.show_recipe(name, overrides=set_ or ()))


@recipes_app.command("copy", epilog=_examples("retrofit recipes copy gqa my-gqa.yaml"))
def recipes_copy(
    name: Recipe,
    to: Annotated[str | None, typer.Argument(metavar="FILE", help="Default NAME.yaml here.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Copy a recipe, comments included, to change it."""
    from retrofit import api
    from retrofit.cli import output

    output.copied(_console(json), api.copy_recipe(name, to, overwrite=overwrite))


app.add_typer(recipes_app, name="recipes")


@app.command(epilog=_examples("retrofit schema > recipe.schema.json"))
def schema() -> None:
    """The recipe language as JSON Schema, for editors and checkers."""
    Console("json").result(retrofit.schema())


@app.command(epilog=_examples("retrofit doctor", "retrofit doctor --json"))
def doctor(json: Json = False) -> None:
    """What this machine can run: packages, devices, attention kernels, and what to install for the others."""
    from retrofit.cli import output

    output.health(_console(json), retrofit.doctor())


def _console(json: bool) -> Console:
    return Console("json" if json else None)


def _numbers(text: str | None, option: str = "--lengths") -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,18}", part) and int(part) > 0 for part in parts):
        raise UserError(
            f"`{shown(text, 80)}` is not a list of lengths", where=option, fix="write for example 2048,4096"
        )
    return tuple(int(part) for part in parts)


def main() -> None:
    """Entry point of the `retrofit` command."""
    streams.repair()
    if os.environ.get("HOME") == "":  # nobody's home: libraries would take the root folder for it
        del os.environ["HOME"]
    # Else Python goes through every object of torch and transformers once more before it ends, for a second.
    atexit.register(gc.freeze)
    logging.setLogRecordFactory(_Record)
    logging.raiseExceptions = False  # a library's line about a foreign value that cannot be written is no traceback
    sys.excepthook = _show_exception
    try:
        typer.main.get_command(app)()
    except SystemExit as stop:
        raise SystemExit(stop.code or streams.finish()) from None
