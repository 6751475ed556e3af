"""What another process than rank 0 needs to see before it takes part in a step."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.workflow import joining


def test_a_checkpoint_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    timer = threading.Timer(0.3, lambda: (tmp_path / "config.json").write_text("{}"))
    timer.start()
    joining.await_folder(tmp_path)
    assert time.monotonic() - began > 0.25
    timer.join()
    monkeypatch.setattr(joining, "_SEEN_WITHIN", 0.1)
    with pytest.raises(UserError, match="not seen by every process"):
        joining.await_folder(tmp_path / "none")
