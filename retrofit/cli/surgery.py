"""`retrofit convert`, `window`, `extend` and `recover`: one checkpoint in, a new one out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import retrofit
from retrofit.cli import following
from retrofit.cli.options import Json, Model, Out, Overwrite, command, console_for
from retrofit.console import Console
from retrofit.views import results

if TYPE_CHECKING:
    from retrofit.workflow.command import Written


def add_to(app: typer.Typer) -> None:
    """Make these commands of the program."""

    @command(
        app,
        "convert",
        "retrofit convert embedded --kv-heads 1 --out out/mqa",
        "retrofit convert ./my-model --kv-heads 4 --method mean --out out/gqa",
        "retrofit convert ./my-model --kv-heads 4 --calibrate notes.txt --calibrate python-docs --out out/gqa",
        "retrofit convert EleutherAI/pythia-160m --reexpress-only --out out/phi",
        shared=True,
    )
    def convert(
        model: Model,
        out: Out,
        moments: Annotated[
            str | None,
            typer.Option(
                "--moments", metavar="DIR", help="Keep what calibration measured in every layer in this folder."
            ),
        ] = None,
        reexpress_only: Annotated[
            bool,
            typer.Option(
                "--reexpress-only", help="Write the same function as an architecture that can share KV heads."
            ),
        ] = False,
        target: Annotated[
            str | None,
            typer.Option("--target", metavar="TYPE", help="With --reexpress-only: the model type to become."),
        ] = None,
        overwrite: Overwrite = False,
        json: Json = False,
        **options: Any,
    ) -> None:
        """Write the model with fewer KV heads, as the same architecture.

        GPT-NeoX, GPT-J, GPT-2 and OPT cannot hold fewer KV heads and are first re-expressed, exactly, as one that can.
        """
        console = console_for(json)
        options |= {"moments": moments, "reexpress_only": reexpress_only, "target": target, "overwrite": overwrite}
        result = retrofit.convert(model, out=out, progress=console.progress, **options)
        _written(console, result, None if options["revision"] else model)

    @command(
        app,
        "window",
        "retrofit window embedded --size 1024 --out out/windows",
        "retrofit window ./my-model --size 512 --full-layers 1/4 --out out/windows",
        "retrofit window ./my-model --size 1024 --full-layers 7,17,18 --target mistral --out out/windows",
        shared=True,
    )
    def window(model: Model, out: Out, overwrite: Overwrite = False, json: Json = False, **options: Any) -> None:
        """Write the model with sliding windows in the layers that look back a short way only.

        Which layers still see everything is measured: on text, and on passages that come again from out of sight.
        """
        console = console_for(json)
        result = retrofit.window(model, out=out, overwrite=overwrite, progress=console.progress, **options)
        _written(console, result, None if options["revision"] else model)

    @command(
        app,
        "extend",
        "retrofit extend embedded --length 32k --out out/long",
        "retrofit extend ./my-model --factor 2 --method ntk --out out/long",
        "retrofit extend ./my-model --factor 4 --attention-factor 1.1 --out out/long",
        "retrofit extend ./my-model --factor 4 --method search --text book.txt --out out/long",
        shared=True,
    )
    def extend(model: Model, out: Out, overwrite: Overwrite = False, json: Json = False, **options: Any) -> None:
        """Write the model with a longer context; only positions change, and with a factor the queries."""
        console = console_for(json)
        _written(console, retrofit.extend(model, out=out, overwrite=overwrite, progress=console.progress, **options))

    @command(
        app,
        "recover",
        "retrofit recover out/mqa --teacher embedded --tokens 200000 --out out/recovered",
        "retrofit recover out/long --teacher embedded --positions pose --tokens 96k --out out/used",
        shared=True,
    )
    def recover(
        model: Model,
        teacher: Annotated[str, typer.Option("--teacher", metavar="ORIGINAL", help="The model before the surgery.")],
        out: Out,
        overwrite: Overwrite = False,
        json: Json = False,
        **options: Any,
    ) -> None:
        """Win quality back by a short adapter training, merged into the written checkpoint."""
        console = console_for(json)
        options |= {"overwrite": overwrite, "progress": console.progress}
        _written(console, retrofit.recover(model, teacher=teacher, out=out, **options), teacher=teacher)


def _written(console: Console, result: Written, original: str | None = None, *, teacher: str | None = None) -> None:
    console.show(result, [*results.written(result), *following.after_written(result, original, teacher=teacher)])
