"""How work is dealt out."""

from __future__ import annotations

from retrofit.system.dealing import dealt


def test_the_dearest_item_goes_first_to_whoever_has_least() -> None:
    assert dealt({"a": 1, "b": 5, "c": 4, "d": 2}, 2) == [["a", "b"], ["c", "d"]]


def test_one_process_gets_everything_in_order() -> None:
    assert dealt({"a": 1, "b": 5, "c": 4}, 1) == [["a", "b", "c"]]


def test_processes_beyond_the_items_get_none() -> None:
    assert dealt({"a": 1}, 3) == [["a"], [], []]


def test_equal_items_are_dealt_in_turn() -> None:
    assert dealt(dict.fromkeys(range(5), 1.0), 2) == [[0, 2, 4], [1, 3]]
