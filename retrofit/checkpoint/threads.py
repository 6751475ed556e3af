"""Several threads for work on weights: PyTorch, hashing and reading files all let go of Python's lock meanwhile.

PyTorch is used where it is imported already, and not imported for this: a folder is hashed without it.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 16


def thread_count(most: int = MOST_THREADS) -> int:
    """As many as PyTorch computes with, at most `most`: OMP_NUM_THREADS and a busy machine count."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return max(1, min(most, torch.get_num_threads()))
    named = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(most, int(named) if named.isdigit() else os.cpu_count() or 1))


def each_alone(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in order, by several threads that compute with one thread of PyTorch each.

    The error of the first item that has one is raised. For work whose result no number of threads can change.
    """
    items = list(items)
    torch, threads = sys.modules.get("torch"), min(thread_count(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    if torch is None:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, items))
    usual = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(usual)  # what a thread sets for itself is also the number for threads to come


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result]:
    """`work` of every item, in order, at most `threads` of them begun before they are asked for."""
    if threads <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[Result]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) >= threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
