"""The public functions that make a folder ready for others, and publish it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.console import Progress
from retrofit.entry import begun, display
from retrofit.files import local_path
from retrofit.recipe.engines import Engine
from retrofit.recipe.options import recipe_of
from retrofit.recipe.schema import Device, Kernel
from retrofit.views.notebook import as_tables
from retrofit.workflow.published import published_folder

if TYPE_CHECKING:
    from retrofit.publishing.hub import Published
    from retrofit.workflow.certify import Certified


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
    make_environments: bool | None = None,
    kernel: Kernel | None = None,
    device: Device | None = None,
    overwrite: bool = False,
    progress: Progress | bool = True,
) -> Certified:
    """Measure a folder that `convert`, `extend` or `recover` wrote, load it again in a fresh process, and write its
    card and record, so that it can be published. Its weights stay as they are.

    original: the model before the surgery, measured as well. lengths: by default the window before and after. engines:
    other engines that score documents as well, each installed here, or in an environment that `make_environments`
    makes; engine_tokens: of a document.
    overwrite: a README.md that was not written here is replaced.
    """
    measured = {"lengths": ["native", "target"], "cost_lengths": []}
    recipe, shown = recipe_of("certify", {**locals()}, {"evaluate": measured, "publish": {}}), display(progress)
    place = local_path(folder, where="FOLDER")
    with begun(f"certify {place}", shown, model=original, writes=(place,)):
        from retrofit.workflow.certify import certify as prove

        before = None if original is None else str(original)
        return prove(recipe, place, original=before, overwrite=overwrite, progress=shown)


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
