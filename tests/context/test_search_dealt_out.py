"""A search by several processes: what one finds, and what it keeps is resumed by any number of them."""

from __future__ import annotations

from pathlib import Path

from retrofit.context.search.halving import search
from retrofit.context.search.outcome import SearchResult
from retrofit.system.world import ALONE, World
from tests.context.test_search import SECTION, text
from tests.ranks import on_ranks
from tests.tiny import tiny_model, tiny_tokenizer


def searched(world: World, partial: Path) -> tuple[SearchResult, int]:
    """What is found, and the passes over a whole text that this process made."""
    model, passes = tiny_model("llama", max_position_embeddings=512), []
    model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    return search(model, tiny_tokenizer(), text(), section=SECTION, partial=partial, world=world), len(passes)


def test_a_search_finds_what_one_process_finds(tmp_path: Path) -> None:
    alone, passes = searched(ALONE, tmp_path / "one")
    results = on_ranks(tmp_path, 3, searched, tmp_path / "many")
    assert all(found == alone for found, _ in results)
    assert sum(count for _, count in results) == passes
    assert max(count for _, count in results) < passes / 2
    kept = {path.name for path in (tmp_path / "many").glob("*.npy")}
    assert kept == {path.name for path in (tmp_path / "one").glob("*.npy")}
    for name in sorted(kept)[::2]:
        (tmp_path / "many" / name).unlink()
    again, more = searched(ALONE, tmp_path / "many")
    assert again == alone
    assert 0 < more < passes
