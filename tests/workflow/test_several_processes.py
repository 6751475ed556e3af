"""Several processes at one run: the same files and numbers as one, and one message where one of them fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

import retrofit
from retrofit.checkpoint.provenance import sha256
from retrofit.errors import PeerError, UserError
from retrofit.model.families import describe
from retrofit.system.world import World
from retrofit.workflow import opening_in_world
from retrofit.workflow.context import ModelContext
from tests.ranks import on_ranks
from tests.tiny import tiny_config
from tests.workflow.conftest import sections

Recipe = Callable[..., Path]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
FAILING = Path(__file__).with_name("failing_rank.py")


@pytest.fixture
def short(recipe: Recipe, model: Path, texts: Path) -> Path:
    """A recipe without publishing, which loads the folder in a fresh process."""
    evaluate = {**sections(model, texts)["evaluate"], "lengths": [64, 128], "cost_lengths": []}
    evaluate["common_knowledge"] = 8
    recover = {**sections(model, texts)["recover"], "batch_size": 4}  # every process needs a row of each step
    return recipe(publish=None, context=None, evaluate=evaluate, recover=recover)


def run(world: World, recipe: Path, out: Path) -> Any:
    return retrofit.run(recipe, out=out, progress=False)


def losses(result: Any) -> dict[str, list[float]]:
    return {label: [row.ppl for row in model.rows] for label, model in result.models.items()}


def written(out: Path, *steps: str) -> dict[str, str]:
    return {str(file.relative_to(out)): sha256(file) for step in steps for file in sorted((out / step).iterdir())}


def test_two_processes_write_and_measure_what_one_does_and_any_number_resumes(short: Path, tmp_path: Path) -> None:
    alone = retrofit.run(short, out=tmp_path / "one", progress=False)
    first, second = on_ranks(tmp_path, 2, run, short, tmp_path / "two")
    assert first == second, "every process returns what rank 0 has"
    assert written(tmp_path / "two", "1-convert") == written(tmp_path / "one", "1-convert")
    assert losses(first)["original"] == pytest.approx(losses(alone)["original"], rel=1e-5)
    assert losses(first)["converted"] == pytest.approx(losses(alone)["converted"], rel=1e-5)
    assert losses(first)["recovered"] == pytest.approx(losses(alone)["recovered"], rel=1e-2)
    assert first.models["converted"].tasks == alone.models["converted"].tasks
    assert first.models["converted"].tasks[0].questions == 8
    again = retrofit.run(short, out=tmp_path / "two", progress=False)
    assert set(again.reused) >= {"convert", "recover", "evaluate"}
    for found in on_ranks(tmp_path, 2, run, short, tmp_path / "one"):
        assert set(found.reused) >= {"convert", "recover", "evaluate"}


def other_recipe(world: World, recipe: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        run(world, recipe if world.main else recipe.with_name("other.yaml"), out)
    return str(caught.value)


def other_text(world: World, recipe: Path, out: Path) -> str:
    from retrofit.data import identity

    if not world.main:
        identity.identity = lambda sources: ["another one"]  # type: ignore[assignment]
    with pytest.raises(UserError) as caught:
        run(world, recipe, out)
    return str(caught.value)


def test_processes_that_see_other_things_are_refused(short: Path, texts: Path, tmp_path: Path) -> None:
    short.with_name("other.yaml").write_text(short.read_text().replace("kv_heads: 1", "kv_heads: 2"))
    for message in on_ranks(tmp_path, 2, other_recipe, short, tmp_path / "out"):
        assert "the recipe is not the same in all 2 processes" in message
        assert "where: rank 1 on" in message
        assert "fix:   give every process the same recipe file" in message
    for message in on_ranks(tmp_path, 2, other_text, short, tmp_path / "out"):
        assert f"the text `{texts / 'train'}` is not the same" in message
    assert not (tmp_path / "out").exists()


def refused(world: World, recipe: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        run(world, recipe, out)
    return str(caught.value)


def test_what_rank_0_refuses_every_process_raises(short: Path, recipe: Recipe, tmp_path: Path) -> None:
    impossible = recipe(recover=None, convert={"kv_heads": 3, "method": "mean"})
    first, second = on_ranks(tmp_path, 2, refused, impossible, tmp_path / "out")
    assert "cannot be converted to 3 KV heads" in first
    assert first == second


def leave(folder: Path) -> NoReturn:
    raise ValueError


def left_alone(world: World, recipe: Path, out: Path) -> str:
    if not world.main:
        opening_in_world.folder_digest = leave
    with pytest.raises(PeerError if world.main else ValueError) as caught:
        run(world, recipe, out)
    return str(caught.value)


def test_a_process_whose_peer_has_gone_does_not_wait_for_it(short: Path, tmp_path: Path) -> None:
    message, _ = on_ranks(tmp_path, 2, left_alone, short, tmp_path / "out")
    assert message.startswith("another process of this command has ended")
    assert not (tmp_path / "out").exists()


def test_one_sequence_over_several_processes_needs_a_launcher(model: Path, texts: Path, recipe: Recipe) -> None:
    text, section = texts / "held.txt", {"text": [str(texts / "held.txt")], "lengths": [64], "sequence_parallel": 2}
    with pytest.raises(UserError) as caught:
        retrofit.evaluate(model, text=[str(text)], lengths=64, sequence_parallel=2)
    assert "`torchrun --nproc-per-node=2 -m retrofit evaluate ... --sequence-parallel 2`" in str(caught.value)
    with pytest.raises(UserError, match=r"torchrun --nproc-per-node=2 -m retrofit run"):
        retrofit.run(recipe(evaluate=section, require={}), out=texts / "never")
    assert not (texts / "never").exists()


def evaluate(world: World, model: Path, text: Path, kernel: str) -> Any:
    try:
        return retrofit.evaluate(
            model, text=[str(text)], lengths=64, sequence_parallel=world.size, kernel=kernel, progress=False
        )
    except UserError as error:
        return str(error)


def test_processes_read_a_text_together_with_the_losses_of_one(model: Path, texts: Path, tmp_path: Path) -> None:
    text = texts / "held.txt"
    alone = retrofit.evaluate(model, text=[str(text)], lengths=64, progress=False)
    for found in on_ranks(tmp_path, 2, evaluate, model, text, "auto"):
        assert [row.ppl for row in found.rows] == pytest.approx([row.ppl for row in alone.rows], rel=1e-5)
    for message in on_ranks(tmp_path, 2, evaluate, model, text, "sdpa"):
        assert "kernel `sdpa` cannot share one sequence over several ranks" in message
        assert "where: --sequence-parallel, kernel" in message


def test_texts_with_fewer_tokens_than_chunks_are_refused_before_they_are_read() -> None:
    opened = SimpleNamespace(recipe=SimpleNamespace(kernel="auto"), spec=describe(tiny_config("llama")), device="cpu")
    ModelContext.require_splittable(opened, "evaluate.sequence_parallel", 8, 16)
    with pytest.raises(UserError, match="15 tokens cannot be cut into 16 chunks for 8 ranks") as caught:
        ModelContext.require_splittable(opened, "evaluate.sequence_parallel", 8, 15)
    assert caught.value.where == "evaluate.sequence_parallel"


def launch(*command: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    line = (*TORCHRUN, f"--nproc-per-node={processes}", *map(str, command))
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)


def test_torchrun_prints_one_result(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launch("-m", "retrofit", "convert", model, "--kv-heads", 1, "--method", "mean", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(out)
    assert done.stderr.count("loading PyTorch") == 1
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_commands_of_one_process_are_done_once(model: Path, tmp_path: Path) -> None:
    done = launch("-m", "retrofit", "inspect", model, "--json")
    assert isinstance(json.loads(done.stdout), dict), "printed once"
    assert done.stderr.count(f"inspect {model}") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank", "message"),
    [
        ("text", 1, "is not the same in all 2 processes"),
        ("memory", 1, "not enough memory"),
        ("bug", 1, "ValueError: a bug"),
        ("bug", 0, "ValueError: a bug"),
        ("early", 1, "this recipe is wrong"),
        ("killed", 1, "another process of this command has ended"),
        ("killed", 0, "another process of this command has ended"),
    ],
)
def test_one_failing_rank_ends_all_with_one_message(
    how: str, rank: int, message: str, short: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = launch(FAILING, how, rank, "run", short, "--out", out)
    assert done.returncode != 0
    ours, _, _ = done.stderr.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    assert ours.count(message) == 1, done.stderr
    assert how == "bug" or "in <module>" not in ours.partition("torch/distributed/run.py")[0]
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_rank_was_killed_resumes(processes: int, short: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = launch(FAILING, "killed-later", 1, "run", short, "--out", out)
    assert "another process of this command has ended" in killed.stderr or "stopped (SIGTERM)" in killed.stderr
    whole = retrofit.run(short, out=tmp_path / "whole", progress=False)
    done = launch("-m", "retrofit", "run", short, "--out", out, "--json", processes=processes)
    assert done.returncode == 0, done.stderr
    assert "convert: done before, kept" in done.stderr
    assert "evaluate:original: done before, kept" in done.stderr
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.folder.iterdir()}
    assert written(out, "1-convert") == written(whole.folder, "1-convert")
