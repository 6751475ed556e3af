"""`retrofit certify`, `export` and `publish`: from a folder to a repository on the hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import retrofit
from retrofit.cli import following
from retrofit.cli.options import Json, Overwrite, command, console_for
from retrofit.views import releases


def add_to(app: typer.Typer) -> None:
    """Make these commands of the program."""

    @command(
        app,
        "certify",
        "retrofit certify out/long --original embedded",
        "retrofit certify out/long --lengths 8k,32k --text book.txt",
        "retrofit certify out/long --engine vllm --engine llama.cpp --make-environment",
        "retrofit certify out/long --gguf q8_0,q4_k_m",
        "retrofit certify my-fine-tune --repair",
    )
    def certify(
        folder: Annotated[
            str, typer.Argument(metavar="FOLDER", help="What retrofit convert, window, extend or recover wrote.")
        ],
        original: Annotated[
            str | None,
            typer.Option("--original", metavar="MODEL", help="The model before the surgery, measured as well."),
        ] = None,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace a README.md that was not written here.")
        ] = False,
        repair: Annotated[
            bool,
            typer.Option(
                "--repair", help="Only write the names again that saving with transformers 5 dropped from config.json."
            ),
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
        result = retrofit.certify(folder, repair=repair, **options)
        from retrofit.workflow.repair import Repaired

        if isinstance(result, Repaired):
            console.show(result, [*releases.repaired(result), *following.after_repaired(result)])
            return
        console.show(result, [*releases.certified(result), *following.after_certified(result)])

    @command(
        app,
        "export",
        "retrofit export runs/quickstart/final --gguf f16,q8_0,q4_k_m",
        "retrofit export out/long --gguf q8_0 --out out/long-gguf --make-environment",
    )
    def export(
        folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A checkpoint folder.")],
        out: Annotated[
            str | None,
            typer.Option("--out", metavar="DIR", help="Folder to write; it must not exist. [default: FOLDER-gguf]"),
        ] = None,
        overwrite: Overwrite = False,
        json: Json = False,
        **options: Any,
    ) -> None:
        """Write a checkpoint as GGUF files with llama.cpp's own programs, and compare each in llama.cpp with it."""
        console = console_for(json)
        result = retrofit.export(folder, out=out, overwrite=overwrite, progress=console.progress, **options)
        console.show(result, [*releases.exported(result), *following.lines()])

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
        console.show(result, releases.published(result))
