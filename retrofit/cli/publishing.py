"""`retrofit certify` and `retrofit publish`: from a folder to a repository on the hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import retrofit
from retrofit.cli import following
from retrofit.cli.options import Json, command, console_for
from retrofit.views import results


def add_to(app: typer.Typer) -> None:
    """Make these commands of the program."""

    @command(
        app,
        "certify",
        "retrofit certify out/long --original embedded",
        "retrofit certify out/long --lengths 8k,32k --text book.txt",
        "retrofit certify out/long --engine vllm --engine llama.cpp --make-environment",
    )
    def certify(
        folder: Annotated[
            str, typer.Argument(metavar="FOLDER", help="What retrofit convert, extend or recover wrote.")
        ],
        original: Annotated[
            str | None,
            typer.Option("--original", metavar="MODEL", help="The model before the surgery, measured as well."),
        ] = None,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace a README.md that was not written here.")
        ] = False,
        json: Json = False,
        **options: Any,
    ) -> None:
        """Measure a folder, load it again in a fresh process, and write its model card, so that it can be published.

        Its weights stay as they are. With --engine, other engines score the same documents. A run does this for its
        `final` folder by itself.
        """
        console = console_for(json)
        options |= {"original": original, "overwrite": overwrite, "progress": console.progress}
        result = retrofit.certify(folder, **options)
        console.show(result, [*results.certified(result), *following.after_certified(result)])

    @command(
        app,
        "publish",
        "retrofit publish runs/quickstart --repo me/SmolLM2-135M-mqa-16k",
        "retrofit publish runs/quickstart --repo me/SmolLM2-135M-mqa-16k --public",
        "retrofit publish out/long --repo me/long --base-model acme/model --license apache-2.0",
    )
    def publish(
        folder: Annotated[
            str,
            typer.Argument(metavar="FOLDER", help="The folder of a run, or one that `retrofit certify` completed."),
        ],
        repo: Annotated[str, typer.Option("--repo", metavar="ID", help="OWNER/NAME on the hub.")],
        public: Annotated[
            bool, typer.Option("--public", help="Make the repository public; private otherwise.")
        ] = False,
        json: Json = False,
        **options: Any,
    ) -> None:
        """Push a finished checkpoint to the hub. The token is that of `hf auth login` or HF_TOKEN."""
        console = console_for(json)
        result = retrofit.publish(folder, repo=repo, private=not public, progress=console.progress, **options)
        console.show(result, results.published(result))
