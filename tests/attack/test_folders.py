"""Broken model folders through every command that reads one: refused in a message, or converted into what stock
transformers computes with the folder as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrofit.checkpoint.provenance import sha256
from retrofit.errors import UserError
from tests.attack.breaking import broken
from tests.attack.limits import within
from tests.tiny import save_tiny

FAMILIES = ("llama", "llama", "qwen3", "gemma3_text", "phi3", "mixtral", "gpt_bigcode")
SECONDS = 60
IDS = torch.arange(1, 33)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whole folder of each family."""
    folder = tmp_path_factory.mktemp("whole")
    return {family: save_tiny(folder / family, family, chat_template=True) for family in dict.fromkeys(FAMILIES)}


def logits(folder: Path) -> torch.Tensor:
    """What stock transformers computes, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return torch.nan_to_num(model(IDS).logits)  # values as large as a float is may overflow, on both sides


def attempt(models: dict[str, Path], tmp_path: Path, seed: int) -> str:
    """Break a folder, try every command on it; returns `refused` or `right`."""
    import retrofit

    folder, out = tmp_path / f"broken{seed}", tmp_path / f"same{seed}"
    done = broken(models[FAMILIES[seed % len(FAMILIES)]], folder, seed)
    before = {path.name: sha256(path) for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    outcome = "right"
    commands = {
        "inspect": lambda: retrofit.inspect(folder),
        "extend": lambda: retrofit.extend(folder, out=tmp_path / f"long{seed}", factor=2, method="ntk"),
        "convert": lambda: retrofit.convert(folder, out=out, kv_heads=2, method="mean"),
        "identity": lambda: retrofit.convert(folder, out=tmp_path / f"id{seed}", kv_heads=4, method="mean"),
    }
    for name, command in commands.items():
        try:
            with within(SECONDS):
                command()
        except UserError as error:
            assert error.what, f"{name}: {done}"
            outcome = "refused"
        except (Exception, SystemExit) as error:
            raise AssertionError(f"seed {seed}, {done}: {name} raised {type(error).__name__}: {error}") from error
    after = {path.name: sha256(path) for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    assert after == before, f"seed {seed}, {done}: the source was changed"
    if (tmp_path / f"id{seed}" / "config.json").is_file():
        same = torch.equal(logits(tmp_path / f"id{seed}"), logits(folder))
        assert same, f"seed {seed}, {done}: another model than transformers loads from there"
    return outcome


@pytest.mark.parametrize("block", range(2))
def test_a_few_broken_folders(block: int, models: dict[str, Path], tmp_path: Path) -> None:
    for seed in range(6 * block, 6 * block + 6):
        attempt(models, tmp_path, seed)


@pytest.mark.attack
@pytest.mark.parametrize("block", range(30))
def test_broken_folders(block: int, models: dict[str, Path], tmp_path: Path) -> None:
    for seed in range(100 + 10 * block, 110 + 10 * block):
        attempt(models, tmp_path, seed)
