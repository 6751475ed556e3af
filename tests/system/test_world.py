"""The processes of one command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from retrofit.errors import GateError, UserError
from retrofit.system.world import ALONE, Others, World, from_environment, led, started
from tests.ranks import on_ranks


def test_without_a_launcher_there_is_one_process() -> None:
    assert from_environment({}) == ALONE
    assert started(ALONE, "cpu") is ALONE
    assert ALONE.main


def test_one_process_keeps_everything() -> None:
    assert ALONE.mine("abc") == ["a", "b", "c"]
    assert ALONE.gather(5) == [5]
    assert ALONE.merged([1, 2]) == [1, 2]
    assert ALONE.share("x") == "x"
    assert ALONE.sum_(torch.ones(2)).tolist() == [1, 1]
    ALONE.wait()


def test_a_launcher_is_read_from_the_environment() -> None:
    assert from_environment({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}) == World(3, 4, 1)
    assert from_environment({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2"}).node_size == 2


@pytest.mark.parametrize(
    "broken", [{"RANK": "4"}, {"RANK": "-1"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}, {"LOCAL_WORLD_SIZE": "0"}]
)
def test_a_broken_environment_is_refused(broken: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"rank|numbers"):
        from_environment({"WORLD_SIZE": "4", **broken})


def exchange(world: World) -> dict[str, object]:
    own = world.mine(list(range(5)))
    world.wait()
    return {
        "mine": own,
        "gathered": world.gather(world.rank * 10),
        "merged": world.merged([item * 2 for item in own]),
        "shared": world.share(f"from {world.rank}"),
        "sum": world.sum_(torch.full((2,), world.rank + 1.0, dtype=torch.float64)).tolist(),
    }


def test_processes_deal_out_work_and_exchange_results(tmp_path: Path) -> None:
    results = on_ranks(tmp_path, 3, exchange)
    assert [found["mine"] for found in results] == [[0, 3], [1, 4], [2]]
    for found in results:
        assert found["gathered"] == [0, 10, 20]
        assert found["merged"] == [0, 2, 4, 6, 8]
        assert found["shared"] == "from 0"
        assert found["sum"] == [6.0, 6.0]


def fail(world: World) -> None:
    raise ValueError(f"rank {world.rank}")


def test_a_rank_that_fails_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ValueError: rank [01]"):
        on_ranks(tmp_path, 2, fail)


def lead(world: World) -> tuple[list[object], object]:
    parts: list[object] = []

    def work(others: Others) -> str:
        assert world.size == 1 or "RANK" not in os.environ, "rank 0 is alone while others wait"
        with others.join("first"):
            assert world.size == 1 or os.environ["RANK"] == "0"
            parts.append(world.gather(world.rank))
        with others.join("second"):
            parts.append(world.gather(world.rank * 2))
        return "result"

    def part(name: str) -> None:
        parts.append((name, world.gather(world.rank if name == "first" else world.rank * 2)))

    return parts, led(world, work, part)


def test_rank_0_calls_the_others_to_parts_of_its_work_and_shares_its_result(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, lead)
    assert first == ([[0, 1], [0, 2]], "result")
    assert second == ([("first", [0, 1]), ("second", [0, 2])], "result")
    assert lead(ALONE) == ([[0], [0]], "result")


def refuse() -> None:
    raise GateError("no such thing", where="recipe", fix="another one")


def refused(world: World) -> list[object]:
    with pytest.raises(UserError) as caught:
        world.only(refuse)
    return [type(caught.value), str(caught.value)]


def test_an_error_of_rank_0_is_raised_in_every_process(tmp_path: Path) -> None:
    for found in on_ranks(tmp_path, 2, refused):
        assert found[0] is GateError
        assert found[1] == "no such thing\n  where: recipe\n  fix:   another one"


def test_there_is_a_gpu_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 or more processes were started on this node, and it has 1 GPUs") as caught:
        started(World(1, 2, 1), "cuda")
    assert caught.value.fix == "start one for each GPU: --nproc-per-node=1"
    assert World(1, 2, 1).device("cuda") == "cuda:1"
    assert World(1, 2, 1).device("cpu") == "cpu"
    assert ALONE.device("cuda") == "cuda"
