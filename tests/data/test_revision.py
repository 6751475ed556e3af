"""A hub dataset is known by its commit, and read at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from retrofit.data import revision, sources
from retrofit.data.identity import content_digest, identity
from retrofit.data.texts import read_texts
from retrofit.recipe.schema import TextSource

SOURCE = TextSource(source="hub:owner/name:config")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """A commit is asked for once in a process: here once in a test."""
    revision.commit_of.cache_clear()
    yield
    revision.commit_of.cache_clear()


def online(monkeypatch: pytest.MonkeyPatch, sha: str | Exception) -> list[str]:
    """The hub says that every dataset is at `sha`. Returns the names asked for."""
    asked: list[str] = []

    def dataset_info(self: HfApi, name: str, **_: object) -> object:
        asked.append(name)
        if isinstance(sha, Exception):
            raise sha
        return SimpleNamespace(sha=sha)

    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    return asked


def cached(monkeypatch: pytest.MonkeyPatch, folder: Path, sha: str) -> None:
    refs = folder / "datasets--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(sha)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def test_a_dataset_at_another_commit_is_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = online(monkeypatch, "a" * 40)
    first, digest = identity([SOURCE]), content_digest([SOURCE])
    assert first[0]["content"] == {"dataset": SOURCE.source, "commit": "a" * 40}
    assert asked == ["owner/name"]
    revision.commit_of.cache_clear()
    online(monkeypatch, "b" * 40)
    assert identity([SOURCE]) != first
    assert content_digest([SOURCE]) != digest


def test_it_is_read_at_that_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch, "a" * 40)
    asked = []

    def load_dataset(*names: str, **how: object) -> list[dict[str, str]]:
        asked.append((names, how))
        return [{"text": "row"}]

    monkeypatch.setattr(sources, "_hub_loader", lambda source: load_dataset)
    list(read_texts(SOURCE, split="all"))
    assert asked == [(("owner/name", "config"), {"split": "train", "streaming": True, "revision": "a" * 40})]


@pytest.mark.parametrize("error", [HTTPError("timed out"), OSError("no route")])
def test_without_an_answer_it_is_the_commit_in_the_cache(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    online(monkeypatch, error)
    cached(monkeypatch, tmp_path, "c" * 40 + "\n")
    assert revision.commit_of("owner/name") == "c" * 40
    assert revision.commit_of("owner/other") is None


def test_offline_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = online(monkeypatch, "a" * 40)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert revision.commit_of("owner/name") is None
    cached(monkeypatch, tmp_path, "c" * 40)
    revision.commit_of.cache_clear()
    assert revision.commit_of("owner/name") == "c" * 40
    assert asked == []
