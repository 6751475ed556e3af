"""What several processes have to have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.system import agreement
from retrofit.system.world import ALONE, World
from tests.ranks import on_ranks
from tests.tiny import save_tiny


def see(world: World, folder: Path) -> list[str]:
    messages = []
    agreement.require_same(world, {"the recipe": "one"}, fix="none")
    for seen in ({"the recipe": f"of {world.rank}"}, {"the recipe": "one", **({} if world.main else {"more": "x"})}):
        with pytest.raises(UserError) as caught:
            agreement.require_same(world, seen, fix="use one")
        messages.append(str(caught.value))
    agreement.require_same_versions(world)
    agreement._require_shared(world, folder / "new" / "out")
    with pytest.raises(UserError) as caught:
        agreement._require_shared(world, folder / f"own-{world.rank}" / "out")
    return [*messages, str(caught.value), str(sorted(path.name for path in folder.glob(".*")))]


def test_what_differs_is_named_with_its_rank_in_every_process(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"own-{rank}").mkdir()
    first, second = on_ranks(tmp_path, 2, see, tmp_path)
    assert first[:2] == second[:2]
    assert first[2].splitlines()[0] == second[2].splitlines()[0]
    assert first[0].startswith("the recipe is not the same in all 2 processes: of 1 for rank 1, of 0 for rank 0\n")
    assert "fix:   use one" in first[0]
    assert first[1].startswith("more is not the same in all 2 processes: x for rank 1, none for rank 0")
    assert first[2].startswith("the processes do not share the folder that is written: rank 1 sees another one")
    assert first[3] == "[]", "the probe is removed"


def test_one_process_agrees_with_itself(tmp_path: Path) -> None:
    agreement.require_same(ALONE, {"a": "b"}, fix="none")
    agreement.require_same_versions(ALONE)
    agreement.require_shared(ALONE, tmp_path / "out")


def test_a_folder_is_known_by_its_configuration_and_weights(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    before = agreement.folder_digest(model)
    assert agreement.folder_digest(model) == before
    (model / "README.md").write_text("a card")
    assert agreement.folder_digest(model) == before
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert agreement.folder_digest(model) != before
    with pytest.raises(UserError, match="not there for every process"):
        agreement.folder_digest(tmp_path / "none")
