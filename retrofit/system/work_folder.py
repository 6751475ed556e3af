"""The folder beside an output in which a command keeps what its next call resumes from, for that command alone.

A file in it names the command, and may hold a line that a later call needs to know before it begins. What stands there
without one is somebody's own, and is neither used nor removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from retrofit.errors import UserError
from retrofit.system.world import World

_KEY = ".retrofit-"


def require_own(folder: Path, command: str, *, option: str = "--out") -> None:
    """UserError when `folder` holds anything but what `command` kept there. option: what names another one."""
    if not folder.exists() or (folder / f"{_KEY}{command}").is_file():
        return
    other = next((path.name.removeprefix(_KEY) for path in folder.glob(f"{_KEY}*")), None) if folder.is_dir() else None
    if other is not None:
        raise UserError(
            f"an interrupted `retrofit {other}` keeps its work there",
            where=str(folder),
            fix=f"finish it with the same `retrofit {other}`, or give another {option}; remove the folder to give it "
            "up",
        )
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(
            f"`retrofit {command}` keeps unfinished work there, and it holds something else",
            where=str(folder),
            fix=f"give another {option}, or move what is there",
        )


def remembered(folder: Path, command: str) -> str:
    """The line that `kept` was given by the first of the calls which have not finished; empty where there is none."""
    key = folder / f"{_KEY}{command}"
    if key.is_symlink() or not key.is_file():
        return ""
    return key.read_bytes()[:1000].decode("utf-8", "replace")


@contextmanager
def kept(folder: Path, command: str, line: str = "") -> Iterator[Path]:
    """The folder for the unfinished work of `command`; removed when the block ends well, or leaves no file in it.

    line: what `remembered` gives as long as the folder is there. Raises UserError as `require_own` does.
    """
    require_own(folder, command)
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / f"{_KEY}{command}"
    if not key.exists():
        key.write_text(line, encoding="utf-8")
    try:
        yield folder
    except BaseException:
        if all(path == key or (path.is_dir() and not path.is_symlink()) for path in folder.rglob("*")):
            _remove(folder, command)
        raise
    _remove(folder, command)


@contextmanager
def held(folder: Path, command: str) -> Iterator[Path]:
    """A folder of `command` that stays, whatever becomes of the block. Raises UserError as `require_own` does."""
    require_own(folder, command)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{_KEY}{command}").touch()
    yield folder


@contextmanager
def led_by_main(world: World, *contexts: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Rank 0 alone is in these contexts (locks, kept folders), the first one outermost, from before any process enters
    the block until all have left it. Their UserError is raised in every process."""
    with ExitStack() as stack:

        def enter() -> None:
            for context in contexts:
                stack.enter_context(context())

        world.only(enter)
        yield
        world.wait()


def _remove(folder: Path, command: str) -> None:
    """The key goes last: whatever a kill leaves is known as the command's own."""
    key = folder / f"{_KEY}{command}"
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != key:
            path.unlink()
    key.unlink()
    if not folder.is_symlink():
        folder.rmdir()
