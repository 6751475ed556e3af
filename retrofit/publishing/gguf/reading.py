"""Read a GGUF file with llama.cpp, in its own environment and process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.fresh import FreshError, run_fresh
from retrofit.publishing.engines.environments import Environment

PROGRAM = Path(__file__).with_name("programs") / "read.py"
START_SECONDS = 300.0
SLOW_BYTES = 1e9  # weights times tokens a second, on a machine that this is tried on
ROOM = 4 << 30  # bytes of data besides the weights: logits of 256 tokens, keys and values


@dataclass(frozen=True)
class Passage:
    """Tokens, and the first position after which the loss of the next token is wanted."""

    ids: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True, eq=False)
class Scored:
    """Of the tokens after position `first` of a passage: losses: [T - 1 - first] in nats; greedy: int, the most
    probable token in the place of each."""

    losses: np.ndarray
    greedy: np.ndarray


@dataclass(frozen=True)
class GgufReading:
    """What llama.cpp made of a file.

    metadata: keys of the header with their values as text, without arrays. vocabulary: the text of every token. texts:
    ids of each text that was asked about. scored: every passage.
    """

    version: str
    metadata: Mapping[str, str]
    parameters: int
    vocabulary: tuple[str, ...]
    texts: tuple[tuple[int, ...], ...]
    scored: tuple[Scored, ...]


def read(
    path: Path,
    passages: Sequence[Passage],
    texts: Sequence[str],
    *,
    environment: Environment,
    threads: int,
) -> GgufReading:
    """Load `path` in llama.cpp, split `texts` and score `passages`.

    threads: of the process. Raises UserError with llama.cpp's words where it cannot load the file.
    """
    job = {
        "file": str(path.absolute()),
        "texts": list(texts),
        "passages": [{"ids": list(one.ids), "first": one.first} for one in passages],
        "threads": threads,
    }
    nbytes, tokens = path.stat().st_size, sum(len(one.ids) for one in passages)
    try:
        done = run_fresh(
            PROGRAM,
            job,
            seconds=START_SECONDS + nbytes * tokens / SLOW_BYTES,
            memory=ROOM + 3 * nbytes,
            cwd=path.absolute().parent,
            python=environment.python,
        )
        error = done.get("error")
    except FreshError as failed:
        error = f"\n  {failed}"
    if error:
        raise UserError(
            f"llama.cpp cannot read this file: {error}",
            where=shown(path.name),
            fix="nothing was kept; the lines above are llama.cpp's own",
        )
    return GgufReading(
        version=str(done["version"]),
        metadata=done["metadata"],
        parameters=int(done["parameters"]),
        vocabulary=tuple(done["vocabulary"]),
        texts=tuple(tuple(ids) for ids in done["texts"]),
        scored=tuple(
            Scored(np.asarray(losses, np.float64), np.asarray(greedy, np.int64))
            for losses, greedy in zip(done["losses"], done["greedy"], strict=True)
        ),
    )
