"""GGUF files of what a recipe publishes: what is refused before any work, and the files themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import read_config
from retrofit.context import rope
from retrofit.context.names import with_theta
from retrofit.errors import UserError
from retrofit.model.families import stock_class
from retrofit.publishing.gguf.checking import BEYOND
from retrofit.publishing.gguf.kinds import most_bytes
from retrofit.publishing.gguf.writing import GgufReport, Tools, require_convertible, tools_for, write
from retrofit.publishing.requirements import terms_of
from retrofit.recipe.schema import Publish
from retrofit.workflow.estimate.cost import CostModel

if TYPE_CHECKING:
    from retrofit.model.folder import ModelFolder
    from retrofit.workflow.context import ModelContext

MAKE = "publish.make_environments: true"


def check_gguf(context: ModelContext, section: Publish, *, weights: bool, work: bool) -> Iterable[str]:
    """Notes; UserError where llama.cpp's programs are not there, and where the converter does not know the model.

    weights: they are on this machine. work: what this checks is about to be done, so that environments may be made.
    """
    if not section.gguf:
        return ()
    config = published_config(context)
    tools = _tools(context, section, make=section.make_environments and work)
    if tools is None:
        return ("environments are made for llama.cpp's programs, which are asked then whether they know this model",)
    if weights:
        require_convertible(context.model, tools, config=config, dtype=_written_dtype(context))
    return ()


def published_config(context: ModelContext) -> Mapping[str, Any]:
    """config.json as it will be published, as far as it is known before the work: a search is not."""
    recipe, raw, loaded = context.recipe, read_config(context.model.path), context.config
    if recipe.window is not None:
        from retrofit.workflow.steps.window import after_windows

        loaded = after_windows(recipe.window, loaded, context.spec)
        raw = {**rope.portable(loaded), "architectures": [stock_class(loaded)]}
    extension = recipe.context
    if extension is None or extension.searches:
        return rope.portable(raw)
    return rope.extend_fields(
        raw,
        length=extension.length,
        factor=extension.factor,
        method=str(extension.method),
        settings=extension.settings,
        held=context.held_scale(context.model.path),
        whole=with_theta(raw, loaded),
    )


def write_gguf(context: ModelContext, model: ModelFolder, out: Path, section: Publish, name: str) -> GgufReport:
    """Write the GGUF files of `model` that the section asks for into the folder `out`, and compare them with it."""
    tools = _tools(context, section, make=section.make_environments)
    assert tools is not None
    terms, base = terms_of(section, context.source), section.base_model or context.source.base_model
    return write(
        model,
        out,
        section.gguf,
        name=name,
        documents=context.documents,
        tokens=section.reload_tokens,
        tools=tools,
        identity={key: value for key, value in {"license": terms.license, "base_model": base}.items() if value},
        device=context.device,
        progress=context.progress,
    )


def gguf_bytes(section: Publish, model: CostModel, dtype: str) -> int:
    """Disk that the files of a section take at most. dtype: of the recipe."""
    stored = model.facts.dtype if dtype == "auto" else dtype
    return most_bytes(model.facts.parameters, section.gguf, stored) if section.gguf else 0


def gguf_seconds(section: Publish, model: CostModel, tokens: int) -> float:
    """What writing, quantising and comparing the files takes: `tokens` tokens are read of each, and in float32."""
    if not section.gguf:
        return 0.0
    each = 15 + model.disk_seconds(2) + model.seconds(tokens, section.reload_tokens)
    if model.claimed > model.native:  # past the original window, here and in llama.cpp
        each += 2 * model.seconds(model.native + BEYOND, model.native + BEYOND) / (2 + len(section.gguf))
    return (2 + len(section.gguf)) * each


def _written_dtype(context: ModelContext) -> str:
    asked = context.recipe.dtype
    return context.source.dtype if asked == "auto" else asked


def _tools(context: ModelContext, section: Publish, *, make: bool) -> Tools | None:
    """The environments; None where some will be made, and are not now."""
    try:
        return tools_for(section.gguf, make=make, command=MAKE, progress=context.progress)
    except UserError as error:
        if section.make_environments and not make:
            return None
        raise UserError(error.what, where="publish.gguf", fix=error.fix) from error
