"""A price list that is stopped, or has no room: it resumes with the same numbers, and room is asked for before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import retrofit
from retrofit.console import Silent
from retrofit.errors import UserError
from retrofit.kv_heads.disk import StreamFolder
from retrofit.kv_heads.room import held
from retrofit.kv_heads.sweep import pilot
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Convert
from retrofit.workflow import sweep_cache
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with 8 KV heads."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return save_tiny(tmp_path_factory.mktemp("eight") / "model", "llama", **shape)


class Mortal(Silent):
    """A Progress that stops what it watches at its `lives`-th sign of life."""

    def __init__(self, lives: int) -> None:
        super().__init__()
        self.lives = lives

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._live()

    def advance(self, n: int, **fields: float | str) -> None:
        self._live()

    def note(self, text: str) -> None:
        super().note(text)
        self._live()

    def _live(self) -> None:
        self.lives -= 1
        if self.lives == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("with_moments", [True, False])
def test_a_killed_list_goes_on_at_its_layer_and_ends_with_the_same_numbers(
    with_moments: bool,
    eight: Path,
    texts: Path,
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    calibration = {"tokens": 768, "sequence_length": 64, "text": [str(texts / "train")]}
    less = {"context": None, "recover": None, "evaluate": None, "publish": None, "require": {}}
    file = recipe(model=str(eight), convert={"kv_heads": 1, "calibration": calibration}, **less)
    layers, finished = [], StreamFolder.finished
    monkeypatch.setattr(
        StreamFolder, "finished", lambda self, layer: (layers.append((self.folder.name, layer)), finished(self, layer))
    )

    def listed(folder: Path, progress: Silent | None = None) -> object:
        kept = {"moments": folder} if with_moments else {}
        return retrofit.prices(recipe=file, measure=False, progress=progress, **kept)

    whole = listed(tmp_path / "calm")
    once, said = list(layers), []
    assert len(once) == 10, "the original, and two probes converted and scored, of two layers each"
    layers.clear()
    place = tmp_path / "hunted.work" if with_moments else tmp_path / "cache"
    lives = 3
    while True:
        watch = Mortal(lives)
        try:
            found = listed(tmp_path / "hunted", watch)
            break
        except KeyboardInterrupt:
            lives += 1
            said += watch.notes
    assert found == whole
    assert lives > 10
    assert layers == once, "no layer is read twice"
    assert any("moments of the original: resumes after 1 of 2 layers" in note for note in said), said
    assert not list(place.glob("**/*.safetensors"))
    assert not list(tmp_path.glob("**/*.work"))
    if with_moments:
        calm, hunted = tmp_path / "calm", tmp_path / "hunted"
        assert {path.name: path.read_bytes() for path in calm.iterdir()} == {
            path.name: path.read_bytes() for path in hunted.iterdir()
        }
        layers.clear()
        assert listed(hunted) == whole
        assert not layers


def test_moments_that_were_copied_in_part_are_not_taken_for_all(
    eight: Path, texts: Path, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = {"tokens": 768, "sequence_length": 64, "text": [str(texts / "train")]}
    less = {"context": None, "recover": None, "evaluate": None, "publish": None, "require": {}}
    file = recipe(model=str(eight), convert={"kv_heads": 1, "calibration": calibration}, **less)
    folder, copy, copied = tmp_path / "moments", pilot.copy_file, []

    def stopped(source: Path, target: Path, *, link: bool) -> None:
        copied.append(source)
        if len(copied) == 2:
            raise KeyboardInterrupt
        copy(source, target, link=link)

    monkeypatch.setattr(pilot, "copy_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        retrofit.prices(recipe=file, measure=False, moments=folder)
    assert [path.name for path in folder.glob("layer-*")] == ["layer-000.safetensors"]
    monkeypatch.setattr(pilot, "layerwise_pass", lambda *_, **__: pytest.fail("what was measured is kept"))
    found = retrofit.prices(recipe=file, measure=False, moments=folder)
    assert len(list(folder.glob("layer-*"))) == 2
    assert not (tmp_path / "moments.work").exists()
    assert retrofit.prices(recipe=file, measure=False, moments=folder) == found


def test_the_room_of_a_list_is_asked_for_before_the_model_is_read(
    eight: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofit.kv_heads import disk

    monkeypatch.setattr(sweep_cache, "calibration_text", lambda *_, **__: pytest.fail("text was read"))
    section = Convert(kv_heads=1, calibration={"tokens": 4096, "sequence_length": 512, "text": [str(texts / "train")]})
    needed = sweep_cache.room(ModelFolder(eight), section, (1, 2, 4, 8))
    monkeypatch.setattr(disk, "free_space", lambda _: needed - 1)
    asked = {"tokens": 4096, "calibrate": [str(texts / "train")], "measure": False, "moments": tmp_path / "moments"}
    with pytest.raises(UserError, match="no room for the residual streams"):
        retrofit.prices(eight, **asked)
    assert not list(tmp_path.iterdir())


def test_what_lies_on_disk_is_what_was_asked_for(
    eight: Path, texts: Path, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = {"tokens": 3072, "sequence_length": 64, "text": [str(texts / "train")]}
    less = {"context": None, "recover": None, "evaluate": None, "publish": None, "require": {}}
    section = {"kv_heads": 1, "calibration": calibration}
    file, most, finished = recipe(model=str(eight), convert=section, **less), [0], StreamFolder.finished
    monkeypatch.setattr(
        StreamFolder, "finished", lambda self, layer: (most.append(held(tmp_path / "m.work")), finished(self, layer))
    )
    retrofit.prices(recipe=file, measure=False, moments=tmp_path / "m")
    assert max(most) < sweep_cache.room(ModelFolder(eight), Convert(**section), (1, 2, 4, 8)) + 20_000, (
        "but for headers"
    )
