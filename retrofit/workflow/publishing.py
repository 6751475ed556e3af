"""The publish step: the gate, then `final/` with its card, proven in a fresh process before it gets its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrofit.checkpoint.copying import copy_file
from retrofit.checkpoint.provenance import digest, sha256, versions, write_provenance
from retrofit.checkpoint.read import Checkpoint
from retrofit.checkpoint.rewrite import rewrite
from retrofit.checkpoint.side_files import copy_side_files
from retrofit.checkpoint.staging import staged
from retrofit.checkpoint.write import parse_size
from retrofit.console import jsonable
from retrofit.data.documents import documents_digest
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.model.families import describe, stock_class
from retrofit.model.license import languages_and_tags
from retrofit.model.load import load_config, load_tokenizer
from retrofit.publishing.card import render_card
from retrofit.publishing.card_input import CardInput, CardModel, Recovery
from retrofit.publishing.gate import GateResult, check, enforce
from retrofit.publishing.reload import Tolerance, reload_and_score, tolerance_of
from retrofit.recipe.load import dump_recipe
from retrofit.recipe.schema import Publish, Recipe
from retrofit.report.charts.figures import card_picture
from retrofit.workflow import reporting
from retrofit.workflow.evaluation import losses_file
from retrofit.workflow.journal import CARD
from retrofit.workflow.plan import FOLDERS
from retrofit.workflow.public import public_recipe, public_texts
from retrofit.workflow.publish_checks import snippet_of, terms_of
from retrofit.workflow.runner import FINAL, Runner, State

CHART = "perplexity.png"


def gate(runner: Runner) -> tuple[GateResult, ...]:
    """What the recipe requires against what was measured; a kernel that was not proven never passes. Raises nothing."""
    entry = runner.entries.get("evaluate")
    if entry is None:
        return tuple(check(runner.prepared.recipe.require, {}))
    measured: Any = entry.result["metrics"]
    proof: Any = entry.result["proof"]
    require = dict(runner.prepared.recipe.require)
    if not proof["passed"]:
        require.setdefault("kernel_max_diff", f"<= {proof['tolerance']}")
    return tuple(check(require, measured))


def publish(runner: Runner, states: Mapping[str, State], results: tuple[GateResult, ...]) -> None:
    """Write `final/`, if the recipe publishes and its requirements are met.

    Raises GateError when they are not, UserError when a fresh process does not reproduce the recorded losses; `final/`
    does not exist then.
    """
    recipe, section = runner.prepared.recipe, runner.prepared.recipe.publish
    final = runner.folder / FINAL
    if not all(result.passed for result in results):
        runner.drop(FINAL)
        enforce(results, where=f"require, in {runner.folder / 'recipe.yaml'}")
    if section is None:
        runner.drop(FINAL)
        return
    label, state = list(states.items())[-1]

    def work(path: Path) -> Mapping[str, Any]:
        with staged(final, overwrite=True) as folder:
            reload = _write_final(runner, label, state, folder, section, results)
        found = {"gate": jsonable(results), "reload": reload}
        with staged(path, overwrite=True) as folder:
            for name, value in found.items():
                (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        return {**found, "card": sha256(final / CARD)}

    config = {**section.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")}
    inputs = {
        "checkpoint": state.identity,
        "evaluate": runner.entries["evaluate"].digests,
        "documents": documents_digest(runner.prepared.documents),
    }
    runner.step("publish", FOLDERS["publish"], config, inputs, work, also=(FINAL,))


def _write_final(
    runner: Runner, label: str, state: State, folder: Path, section: Publish, results: tuple[GateResult, ...]
) -> dict[str, Any]:
    prepared = runner.prepared
    copy_checkpoint(state.path, folder, section.max_shard_size, link=prepared.recipe.link)
    picture = card_picture(reporting.run_data(runner, results))
    if picture is not None:
        (folder / CHART).write_bytes(picture.png)
    losses = TokenLosses.load(losses_file(runner.folder, label))
    allowed = tolerance_of(str(losses.meta.get("dtype")))
    card = _card(runner, state, folder, section, allowed, chart=CHART if picture else None)
    (folder / "README.md").write_text(render_card(card), encoding="utf-8")
    report = reload_and_score(
        folder,
        prepared.documents,
        losses,
        tokens=section.reload_tokens,
        snippet=card.snippet,
        progress=runner.progress,
    )
    reload = {key: value for key, value in asdict(report).items() if key != "seconds"}
    evaluated: Any = runner.entries["evaluate"].result
    record = {
        "name": card.title,
        "source": state.origin.source,
        "recipe": public_recipe(prepared.recipe, prepared.source).model_dump(mode="json"),
        "steps": public_texts(state.origin.steps),
        "metrics": evaluated["metrics"],
        "effective_length": evaluated["models"][label]["long_context"]["effective"],
        "gate": jsonable(results),
        "reload": jsonable(reload),
        "versions": versions(),
        "files": digest(folder, everything=True),
    }
    write_provenance(folder, record)
    return asdict(report)


def copy_checkpoint(source: Path, folder: Path, max_shard_size: str, *, link: bool) -> None:
    """The checkpoint in another folder, larger files cut. link: hard links where the disk allows them."""
    checkpoint = Checkpoint.open(source)
    shutil.copyfile(source / "config.json", folder / "config.json")
    copy_side_files(source, folder)
    limit = parse_size(max_shard_size)
    if (
        any((source / shard).stat().st_size > limit + (1 << 20) for shard in checkpoint.shards)
        and len(checkpoint.names) > 1
    ):
        rewrite(checkpoint, folder, {}, config=checkpoint.config, max_shard_size=max_shard_size)
        return
    for name in checkpoint.files.names:
        copy_file(source / name, folder / name, link=link)


def _card(
    runner: Runner, state: State, folder: Path, section: Publish, allowed: Tolerance, *, chart: str | None
) -> CardInput:
    prepared, recipe = runner.prepared, runner.prepared.recipe
    source = prepared.source
    data = reporting.run_data(runner, ())
    config = load_config(state.path)
    before, after = prepared.spec, describe(config)
    first, extension = data.models[0], data.context or {}
    assert data.native_length and data.claimed_length
    base, terms = section.base_model or source.base_model, terms_of(section, source)
    languages, tags = languages_and_tags(source.folder)
    return CardInput(
        title=title(recipe, base, data.claimed_length),
        base_model=base,
        license=terms.license,
        license_name=terms.name,
        license_link=terms.link,
        architecture=stock_class(config),
        dtype=str(config.dtype).removeprefix("torch."),
        layers=len(prepared.spec.layers),
        kv_heads=(before.layers[0].kv_heads, after.layers[0].kv_heads),
        native_length=data.native_length,
        claimed_length=data.claimed_length,
        models=tuple(CardModel(model.label, model.rows, model.tasks, model.task_changes) for model in data.models),
        kv_bytes_per_token=(before.kv_bytes_per_token(), after.kv_bytes_per_token()),
        kv_cache_bytes={n: (before.kv_cache_bytes(n), after.kv_cache_bytes(n)) for n in first.kv_cache_bytes},
        recipe_yaml=dump_recipe(public_recipe(recipe, source)),
        commands=data.commands,
        versions=versions(),
        snippet=snippet_of(load_tokenizer(folder), config, folder),
        conversion=recipe.convert.method if recipe.convert else None,
        context_method=extension.get("method"),
        encodings_tried=len({trial["label"] for trial in extension.get("search", {}).get("trials", ())}),
        effective=data.models[-1].effective,
        recovery=_recovery(recipe, data.recovery),
        revision=source.revision,
        chart=chart,
        kernel=data.kernel,
        languages=languages,
        tags=tags,
        tolerance=(allowed.token, allowed.mean),
    )


def _recovery(recipe: Recipe, done: Mapping[str, Any] | None) -> Recovery | None:
    if recipe.recover is None or done is None:
        return None
    sources = tuple(source.source for source in recipe.recover.text)
    numbers = {name: done[name] for name in ("loss", "tokens", "rank", "learning_rate", "tokens_per_second")}
    return Recovery(sources=sources, **numbers)


def title(recipe: Recipe, base_model: str | None, claimed: int) -> str:
    """A name that says what was done: SmolLM2-135M-Instruct-kv1-16k."""
    parts = [(base_model or recipe.name).rpartition("/")[2]]
    if recipe.convert:
        parts.append(f"kv{recipe.convert.kv_heads}")
    if recipe.context:
        parts.append(f"{claimed // 1024}k" if claimed >= 1024 else str(claimed))
    return "-".join(parts)
