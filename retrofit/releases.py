"""The public functions that make a folder ready for others: certified, exported to other formats, published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.console import Progress
from retrofit.entry import begun, display
from retrofit.errors import UserError
from retrofit.files import local_path, output_path
from retrofit.recipe.engines import Engine
from retrofit.recipe.options import recipe_of
from retrofit.recipe.schema import Device, GgufType, Kernel
from retrofit.views.notebook import as_tables
from retrofit.workflow.published import published_folder

if TYPE_CHECKING:
    from retrofit.publishing.hub import Published
    from retrofit.workflow.certify import Certified
    from retrofit.workflow.export import Exported
    from retrofit.workflow.repair import Repaired


@as_tables
def certify(
    folder: str | Path,
    *,
    original: str | Path | None = None,
    text: Sequence[str] | None = None,
    lengths: Sequence[int | str] | int | str | None = None,
    documents: int | None = None,
    engines: Sequence[Engine] | None = None,
    engine_tokens: int | str | None = None,
    gguf: Sequence[GgufType] | GgufType | None = None,
    make_environments: bool | None = None,
    kernel: Kernel | None = None,
    device: Device | None = None,
    overwrite: bool = False,
    repair: bool = False,
    progress: Progress | bool = True,
) -> Certified | Repaired:
    """Measure a folder that `convert`, `extend` or `recover` wrote, load it again in a fresh process, and write its
    card and record, so that it can be published. Its weights stay as they are.

    original: the model before the surgery, measured as well. lengths: by default the window before and after. engines:
    other engines that score documents as well, each installed here, or in an environment that `make_environments`
    makes; engine_tokens: of a document. gguf: files for llama.cpp to write into the folder as well; see `export`.
    overwrite: a README.md that was not written here is replaced. repair: instead of all that, write the names again
    that saving with transformers 5 dropped from config.json, of any checkpoint folder.
    """
    if repair:
        others = {
            "--original": original,
            "--text": text,
            "--lengths": lengths,
            "--documents": documents,
            "--engine": engines,
            "--engine-tokens": engine_tokens,
            "--gguf": gguf,
            "--make-environment": make_environments,
            "--kernel": kernel,
            "--device": device,
            "--overwrite": overwrite or None,
        }
        return _repaired(folder, others, display(progress))
    measured = {"lengths": ["native", "target"], "cost_lengths": []}
    recipe, shown = recipe_of("certify", {**locals()}, {"evaluate": measured, "publish": {}}), display(progress)
    place = local_path(folder, where="FOLDER")
    with begun(f"certify {place}", shown, model=original, writes=(place,)):
        from retrofit.workflow.certify import certify as prove

        before = None if original is None else str(original)
        return prove(recipe, place, original=before, overwrite=overwrite, progress=shown)


def _repaired(folder: str | Path, others: Mapping[str, Any], progress: Progress | None) -> Repaired:
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise UserError(f"a repair does not read {', '.join(given)}", where="--repair", fix="leave one of them out")
    place = local_path(folder, where="FOLDER")
    with begun(f"certify {place}", progress, writes=(place,)):
        from retrofit.workflow.repair import repair

        return repair(place)


@as_tables
def export(
    folder: str | Path,
    *,
    gguf: Sequence[GgufType] | GgufType | None = None,
    out: str | Path | None = None,
    make_environments: bool | None = None,
    text: Sequence[str] | None = None,
    lengths: Sequence[int | str] | int | str | None = None,
    documents: int | None = None,
    reload_tokens: int | str | None = None,
    device: Device | None = None,
    overwrite: bool = False,
    progress: Progress | bool = True,
) -> Exported:
    """Write a checkpoint folder as GGUF files of these types (f16, q8_0, q4_k_m, ...) into a new folder, by llama.cpp's
    own converter and quantiser, and compare each in llama.cpp with the folder.

    out: by default `<folder>-gguf`. make_environments: llama.cpp's programs get environments in the cache, where they
    are not installed. text, lengths, documents, reload_tokens: what they are compared on, so many tokens of each
    document. overwrite: `out` may hold an earlier export, which is replaced.
    """
    given = {**locals()}
    if not gguf:
        raise UserError("no type of GGUF file is named", where="--gguf", fix="add for example --gguf q8_0,q4_k_m")
    recipe, shown = recipe_of("export", given, {"evaluate": {"cost_lengths": []}, "publish": {}}), display(progress)
    place = local_path(folder, where="FOLDER")
    into = place.absolute().with_name(f"{place.absolute().name}-gguf") if out is None else out
    target = output_path(into, where="--out")
    with begun(f"export {place} -> {target}", shown, writes=(target,)):  # what stands there is named there
        from retrofit.workflow.export import export as write

        return write(recipe, place, target, overwrite=overwrite, progress=shown)


@as_tables
def publish(
    folder: str | Path,
    *,
    repo: str,
    private: bool = True,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    progress: Progress | bool = True,
) -> Published:
    """Push what a run published, or another finished checkpoint folder, to the hub repository `repo`; token, name and
    license are checked first.

    folder: of a run, or its `final` folder. license, license_name, license_link, base_model: for a card that has none.
    """
    keys = {"license": license, "license_name": license_name, "license_link": license_link, "base_model": base_model}
    recipe_of("publish", keys)
    stated = {key: value for key, value in keys.items() if value is not None}
    place, shown = published_folder(local_path(folder, where="FOLDER")), display(progress)
    with begun(f"publish {place} as {repo}", shown, writes=(place,)):
        from retrofit.publishing.hub import publish as push

        return push(place, repo, private=private, token=token, stated=stated, progress=shown)
