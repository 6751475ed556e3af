"""Parts of a check that fail, die, hang and succeed; importing them takes no time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from evals.gpu.parts import Row, Setting


def broken(setting: Setting) -> Iterator[Row]:
    yield Row("before", 1.0)
    raise RuntimeError("no luck")


def dead(setting: Setting) -> Iterator[Row]:
    os._exit(9)
    yield Row("never", 1.0)


def endless(setting: Setting) -> Iterator[Row]:
    yield Row("before", 1.0)
    time.sleep(600)


def wrong(setting: Setting) -> Iterator[Row]:
    yield Row("error", 9.0, "nats", predicted=2.0, passed=False, note="a | b")


def right(setting: Setting) -> Iterator[Row]:
    yield Row("rate", 12345.0, "tokens/s", passed=True)
