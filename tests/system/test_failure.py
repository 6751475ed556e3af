"""One message of several processes."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from retrofit.errors import PeerError
from retrofit.system.failure import first_to_fail, meet, tell_launcher, watched
from retrofit.system.world import ALONE, World


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """The store of a launcher. The handler of SIGTERM is put back afterwards."""
    found = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    before = signal.getsignal(signal.SIGTERM)
    yield found
    signal.signal(signal.SIGTERM, before)


def test_the_first_process_has_the_message(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", None)  # nobody waits
    assert first_to_fail(World(0, 3))
    assert not first_to_fail(World(0, 3))
    assert not first_to_fail(World(2, 3))
    assert first_to_fail(ALONE)


def test_another_rank_than_0_has_it_after_a_while(store: TCPStore) -> None:
    assert first_to_fail(World(1, 3))
    assert not first_to_fail(World(0, 3))


def test_processes_of_a_restart_fail_anew(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_fail(World(0, 2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_fail(World(0, 2))


def test_processes_do_not_wait_for_one_that_has_failed(store: TCPStore) -> None:
    store.add("retrofit/here/0", 1)
    meet(World(0, 2))
    assert first_to_fail(World(0, 3))
    with pytest.raises(PeerError):
        meet(World(1, 4))


def test_without_a_store_every_process_has_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert first_to_fail(World(1, 2))
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "words", ["gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]", "Broken pipe"]
)
def test_a_closed_connection_is_a_process_that_has_ended(words: str) -> None:
    with pytest.raises(PeerError, match="another process of this command has ended"), watched(World(0, 2)):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match=r"Broken pipe|closed"), watched(ALONE):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="a bug"), watched(World(0, 2)):
        raise RuntimeError("a bug")


def test_the_launcher_is_given_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_launcher("nobody asks")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher("no such model")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "no such model"
