"""What people install: the wheel alone, a checkout without installing, and nothing but `retrofit` in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import retrofit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that nothing is left in it, without fetching anything."""
    place = tmp_path_factory.mktemp("build")
    checkout = place / "checkout"
    keep = ("retrofit", "recipes", "evals", "tests", "constraints")
    checkout.mkdir()
    for name in keep:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, checkout / path.name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place / "dist", checkout]
    done = subprocess.run([str(part) for part in build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (place / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "retrofit",
        f"attention_retrofit-{retrofit.__version__}.dist-info",
    }
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    suites = {path.name for path in (ROOT / "evals" / "suites").glob("*.yaml")}
    assert {Path(name).name for name in names if name.startswith("retrofit/_bundled/recipes/")} >= recipes
    assert {Path(name).name for name in names if name.startswith("retrofit/_bundled/suites/")} == suites
    pins = {path.name for path in (ROOT / "constraints" / "engines").glob("*.txt")}
    assert {Path(name).name for name in names if name.startswith("retrofit/_bundled/engines/")} == pins
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "retrofit").rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "retrofit").rglob("*.j2")}
    assert sources | templates <= set(names)


def test_the_description_on_a_package_index_is_the_readme_without_links_that_lead_nowhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"attention_retrofit-{retrofit.__version__}.dist-info/METADATA").decode()
    assert "## Three uses" in metadata
    assert "](docs/" not in metadata


def test_the_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Dependencies come from this environment by a path file, but not this checkout."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([str(part) for part in install], check=True, capture_output=True)
    # A plain path: the path files of the parent, which lead to the checkout, are not read there.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = _output(python, "-c", "import retrofit; print(retrofit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    command = environment / "bin" / "retrofit"
    assert "Usage:" in _output(command, "--help", cwd=tmp_path)
    assert "quickstart" in _output(command, "recipes", "list", cwd=tmp_path)
    assert "kv_heads: 1" in _output(python, "-m", "retrofit", "recipes", "show", "quickstart", cwd=tmp_path)
    suite = "from retrofit.recipe.load import load_suite; print(load_suite('quick').lengths)"
    assert "512" in _output(python, "-c", suite, cwd=tmp_path)


def test_a_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    """`python cli.py` with the dependencies on the path, but not this project."""
    dependencies = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); sys.path.insert(0, '')"
    run = "import runpy; sys.argv = ['cli.py', 'recipes', 'list']; runpy.run_path('cli.py', run_name='__main__')"
    # -I and -S: no site-packages and so no editable install; then the dependencies alone.
    assert "quickstart" in _output(Path(sys.executable), "-I", "-S", "-c", f"{dependencies}; {run}", cwd=ROOT)
    assert "Usage:" in _output(Path(sys.executable), "cli.py", "--help", cwd=ROOT)


def test_the_editable_install_runs_this_checkout() -> None:
    command = Path(sysconfig.get_path("scripts")) / "retrofit"
    if not command.exists():
        pytest.skip("not installed here")
    assert "quickstart" in _output(command, "recipes", "list", cwd=ROOT.parent)
    assert Path(retrofit.__file__).parent == ROOT / "retrofit"


def _output(program: Path, *arguments: str, cwd: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(program), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
