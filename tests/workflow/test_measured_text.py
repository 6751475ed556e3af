"""The text of a run: what is told of it, and that another text under the same name is another text everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.checkpoint.provenance import write_provenance
from retrofit.data import corpora
from retrofit.data.identity import content_digest, identity
from retrofit.data.measured import recorded_text
from retrofit.errors import UserError
from retrofit.kv_heads.calibrate.moments import MomentsSource
from retrofit.kv_heads.sweep import pilot
from retrofit.recipe.load import load_recipe
from retrofit.recipe.schema import TextSource
from retrofit.workflow import sweep
from retrofit.workflow.opening import open_context
from tests.workflow.conftest import retrofit, sentences


@pytest.fixture
def corpus(tmp_path: Path, texts: Path) -> Path:
    """A folder to measure: new text, and a copy of a file that is trained on."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(2):
        (folder / f"new{index}.txt").write_text(sentences(1000 + index, 300))
    shutil.copy(texts / "train" / "04.txt", folder / "04.txt")
    return folder


def test_what_is_left_out_stands_in_the_notes_of_a_run(recipe: Callable[..., Path], corpus: Path) -> None:
    (corpus / ".hidden.txt").write_text("hidden")
    (corpus / "new1.txt").write_text(sentences(1001, 200) + " </s>")
    section = {"lengths": [64], "text": [str(corpus)], "documents": 3, "cost_lengths": []}
    ready = open_context(load_recipe(recipe(evaluate=section, require={}, context=None)))
    assert [document.name for document in ready.documents] == ["new0.txt", "new1.txt"]
    for words in ("04.txt (100% in `train`)", "1 hidden", "spells special tokens"):
        assert any(words in note for note in ready.notes), (words, ready.notes)
    assert not any(str(corpus.parent) in note for note in ready.notes), "no local path"


def recorded(folder: Path, *names: object) -> Path:
    """A folder whose record says that a conversion was calibrated on these texts."""
    text = [{"source": str(name), "field": "text", "split": "train", "weight": 1.0} for name in names]
    step = {"step": "convert", "config": {"calibration": {"text": text}}, "result": {}}
    write_provenance(folder, {"source": {}, "steps": [step], "versions": {}})
    return folder


def test_text_that_an_earlier_command_read_is_known_by_its_content(model: Path, texts: Path, tmp_path: Path) -> None:
    out = recorded(Path(shutil.copytree(model, tmp_path / "converted")), texts / "train")
    assert [source.source for source in recorded_text(out)] == [str(texts / "train")]
    shutil.copy(texts / "train" / "00.txt", tmp_path / "unlike.txt")
    done = retrofit("evaluate", out, "--text", tmp_path / "unlike.txt", "--lengths", 64)
    assert done.exit_code == 2
    assert "unlike.txt (100% in `train`)" in done.output


def test_another_text_under_the_same_name_is_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    sources = [TextSource(source=str(file)), TextSource(source="python-docs")]
    found = []
    for text in ("one text", "two text"):  # of the same size
        file.write_text(text)
        found.append((identity(sources), content_digest(sources)))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]
    monkeypatch.setattr(corpora, "_corpus", lambda source: ({"topic": "changed"}, frozenset()))
    assert content_digest(sources) != found[1][1], "a distribution changed what it carries"


def kept_moments(folder: Path, text: TextSource, content: str | None) -> None:
    folder.mkdir(exist_ok=True)
    MomentsSource({"w": "1"}, "original", content).write(folder)
    made = pilot.Calibrated(1.0, (), "none", 1, 1, ("a",), {"text": [text.model_dump(exclude_defaults=True)]})
    (folder / pilot.FILE).write_text(json.dumps(made.__dict__))


def test_moments_are_of_the_text_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "digest", lambda folder: {"w": "1"})
    folder, file = tmp_path / "moments", tmp_path / "a.txt"
    file.write_text("one text")
    text = TextSource(source=str(file))
    asked = [text.model_dump(exclude_defaults=True)]
    kept_moments(folder, text, content_digest([text]))

    def state() -> tuple[bool, tuple[str, ...]]:
        return sweep._still_of(folder, tmp_path, [text], asked)

    assert state() == (True, ())
    file.write_text("two text")
    fresh, notes = state()
    assert not fresh
    assert "has changed" in notes[0]
    (folder / pilot.FILE).unlink()  # moments that a conversion kept are never made anew
    fresh, notes = state()
    assert fresh
    assert "of other text" in notes[0]
    file.unlink()
    fresh, notes = state()
    assert fresh
    assert "cannot be compared" in notes[0]


def test_a_recorded_text_that_is_gone_or_broken_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "broken.txt").write_bytes(b"\xff\0")
    assert recorded_text(recorded(tmp_path, tmp_path / "gone.txt", tmp_path / "broken.txt", "self")) == ()


def test_a_calibration_of_one_text_twice_is_refused_at_the_start(
    recipe: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(texts / "train", tmp_path / "same")
    calibration = {"text": [str(texts / "train"), str(tmp_path / "same")], "tokens": 512, "sequence_length": 64}
    file = recipe(convert={"kv_heads": 1, "calibration": calibration}, require={})
    with pytest.raises(UserError, match="all of it stands in other text as well"):
        open_context(load_recipe(file), dry=True)
