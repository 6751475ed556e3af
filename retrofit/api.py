"""The public functions: one for each command, with the same words. Everything is checked before any long work.

Options are those of the recipe language, and are validated by it: `convert(..., kv_heads=2)` is a recipe whose one step
is `convert: {kv_heads: 2}`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit import bundled
from retrofit.checkpoint.full import writing
from retrofit.checkpoint.staging import put_file
from retrofit.errors import UserError
from retrofit.escape import shell_word, shown
from retrofit.files import local_path, output_path
from retrofit.recipe.load import dump_recipe, load_recipe
from retrofit.recipe.schema import Convert, Recipe
from retrofit.surroundings import require_usable
from retrofit.workflow.estimate.flops import ASSUMED, Throughput
from retrofit.workflow.plan import Plan, make_plan

if TYPE_CHECKING:
    from retrofit.console import Progress
    from retrofit.model.inspect import Inspection, Undescribed
    from retrofit.publishing.hub import Published
    from retrofit.system.doctor import Health
    from retrofit.workflow.compare import Comparison
    from retrofit.workflow.run import RunResult
    from retrofit.workflow.single import Evaluation, Written
    from retrofit.workflow.sweep import PriceList

__all__ = [
    "RecipeEntry",
    "compare",
    "convert",
    "copy_recipe",
    "doctor",
    "evaluate",
    "extend",
    "inspect",
    "plan",
    "prices",
    "publish",
    "recipes",
    "recover",
    "run",
    "schema",
    "show_recipe",
]


def run(
    recipe: str | Path | Recipe,
    *,
    model: str | None = None,
    revision: str | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    from_step: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RunResult | Plan:
    """Run a recipe (a bundled name, a .yaml file, or a `Recipe`) in the folder `out` (default `runs/<name>`).

    The same call goes on after an interruption. from_step: do this step and all after it again. dry_run: check
    everything that is on this machine and return the plan. Raises UserError for bad input, GateError when a requirement
    of the recipe is not met.
    """
    from retrofit.workflow import run as runs
    from retrofit.workflow.prepare import prepare, require_run_folder

    loaded = _recipe(recipe, overrides, model)
    folder = output_path(out if out is not None else Path("runs") / loaded.name, where="--out")
    with _entered(folder):
        runs.check_from_step(from_step, loaded)
        require_run_folder(folder)
        prepared = prepare(
            loaded,
            revision=revision,
            out=folder,
            dry=dry_run,
            throughput=_measured(loaded),
            progress=progress,
        )
        if dry_run:
            for note in prepared.notes if progress else ():
                progress.note(note)  # type: ignore[union-attr]
            return prepared.plan
        return runs.run(prepared, folder, from_step=from_step, progress=progress)


def plan(
    recipe: str | Path | Recipe,
    *,
    model: str | None = None,
    revision: str | None = None,
    overrides: Sequence[str] = (),
    measure: bool = True,
) -> Plan:
    """What each step of a recipe would do, its memory, disk and time. Reads the model's configuration, no weights.
    Raises UserError when a step is not possible on this model.

    measure: time a small matrix product for the estimate; otherwise a throughput is assumed, and the plan says so.
    """
    from retrofit.model.families import describe
    from retrofit.model.load import load_config
    from retrofit.model.source import resolve
    from retrofit.workflow.prepare import facts_of, require_model, sizes, tasks_of
    from retrofit.workflow.recipe_checks import check_headers, check_surgery

    loaded = _recipe(recipe, overrides, model)
    with _entered():
        source = resolve(require_model(loaded), revision=revision or loaded.revision, weights=False)
        config = load_config(source.folder)
        spec = describe(config)
        check_surgery(loaded, config, spec, source.folder)
        check_headers(loaded, config, spec, source.folder)
        facts = facts_of(source, config, spec)
        asked = sizes(tasks_of(loaded))
        return make_plan(loaded, facts, _measured(loaded) if measure else ASSUMED, asked)


def prices(
    model: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    budget: str | None = None,
    calibrate: Sequence[str] = (),
    tokens: int | None = None,
    moments: str | Path | None = None,
    revision: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    measure: bool = True,
    progress: Progress | None = None,
) -> PriceList:
    """The price list of `model` (`retrofit plan --kv-heads`): for every possible number of KV heads, its KV cache and
    what it costs in quality, before any recovery.

    recipe: take model, calibration text, repair, seed and dtype from it. budget: bytes at a length (`2GiB@32k`), which
    picks the most KV heads that fit. tokens: of the calibration text. moments: a folder that keeps what was measured;
    the same call then needs no pass over text. measure: time a small matrix product for the estimate. A call that was
    killed is gone on from by the same call.
    Raises UserError for bad input, before any long work.
    """
    from retrofit.kv_heads.sweep.budget import parse_budget
    from retrofit.workflow import single
    from retrofit.workflow.sweep import prices as price

    limit = None if budget is None else parse_budget(budget)
    folder = None if moments is None else output_path(moments, where="--moments")
    text = {"text": list(calibrate)} if calibrate else {}
    pinned = "" if revision is None else f" --revision {shell_word(revision)}"
    if recipe is None:
        section = {"kv_heads": 1, "calibration": text}
        loaded = single.recipe("convert", section, model=None if model is None else str(model), device=device)
        options = "".join(f" --calibrate {shell_word(source)}" for source in calibrate)
        name = shell_word(str(model)) + pinned
        command = f"retrofit convert {name} --kv-heads {{kv_heads}}{options} --out out/kv{{kv_heads}}"
    else:
        loaded = _recipe(recipe, overrides, None if model is None else str(model))
        if device != "auto":
            loaded = Recipe.model_validate({**loaded.model_dump(), "device": device})
        if text:
            asked = loaded.convert or Convert(kv_heads=1)
            calibration = {**asked.calibration.model_dump(), **text}
            convert = {**asked.model_dump(), "calibration": calibration}
            loaded = Recipe.model_validate({**loaded.model_dump(), "convert": convert})
        named = ("" if model is None else f" --model {shell_word(str(model))}") + pinned
        values = [*overrides, *([f"convert.calibration.text={json.dumps(list(calibrate))}"] if calibrate else [])]
        options = "".join(f" --set {shell_word(value)}" for value in values)
        name = loaded.name if isinstance(recipe, Recipe) else shell_word(str(recipe))
        command = f"retrofit run {name}{named}{options} --set convert.kv_heads={{kv_heads}}"
    with _entered(folder):
        return price(
            loaded,
            command=command,
            budget=limit,
            tokens=tokens,
            moments=folder,
            revision=revision,
            **({"throughput": lambda: _measured(loaded)} if measure else {}),
            progress=progress,
        )


def inspect(model: str | Path, *, revision: str | None = None) -> Inspection | Undescribed:
    """What a model's attention is, what its KV cache costs, and which conversions are possible. Loads no weights.

    A folder of an architecture that transformers knows and this program does not still gets the RoPE linter's verdict.
    """
    from retrofit.context.rope import lint_folder, readings
    from retrofit.model.families import is_known
    from retrofit.model.inspect import Undescribed
    from retrofit.model.inspect import inspect as inspect_source
    from retrofit.model.load import load_config
    from retrofit.model.source import resolve

    with _entered():
        try:
            source = resolve(model, revision=revision, weights=False)
        except UserError as error:
            folder = local_path(model, where="model")
            if not (folder / "config.json").is_file():
                raise
            config = load_config(folder)  # with the defaults of its class, which engines read too
            if is_known(config):
                raise
            return Undescribed(str(model), str(error), tuple(lint_folder(folder, config)), readings(config))
        config = load_config(source.folder)
        return inspect_source(source, findings=lint_folder(source.folder, config), readings=readings(config))


def convert(
    model: str | Path,
    *,
    out: str | Path,
    kv_heads: int | None = None,
    method: str | None = None,
    repair: str | None = None,
    calibrate: Sequence[str] = (),
    tokens: int | None = None,
    moments: str | Path | None = None,
    reexpress_only: bool = False,
    target: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write `model` with `kv_heads` KV heads per layer to the new folder `out`; the same call goes on after a stop.

    overwrite: `out` and `moments` may hold what an earlier call wrote, which is replaced.
    method, repair, tokens: as a recipe has them by default ("calibrated", "o_proj", 49,152); what the method does not
    read is refused. moments: a new folder for what calibration measured in every layer.
    reexpress_only: write the same function as an architecture that can share KV heads (`target`, where there is a
    choice), and leave the heads as they are.
    """
    from retrofit.workflow import single

    if reexpress_only == (kv_heads is not None) or (target is not None and not reexpress_only):
        raise UserError(
            "a conversion needs a number of KV heads, or to be a re-expression only (with or without a target)",
            where="convert",
            fix="add either --kv-heads G or --reexpress-only",
        )
    folder = output_path(out, where="--out")
    text = {"--repair": repair, "--calibrate": calibrate or None, "--tokens": tokens}
    if reexpress_only:
        _refuse_unread({"--method": method, **text, "--moments": moments}, "a re-expression")
        with _entered(folder):
            return single.reexpress(
                str(model),
                folder,
                target=target,
                dtype=dtype,
                revision=revision,
                overwrite=overwrite,
                progress=progress,
            )
    if method in ("mean", "first"):
        _refuse_unread(text, f"the method `{method}`")
    calibration = _given(tokens=tokens, text=list(calibrate) or None)
    section = {"kv_heads": kv_heads, **_given(method=method, repair=repair), "calibration": calibration}
    recipe = single.recipe("convert", section, model=str(model), dtype=dtype, device=device, seed=seed)
    with _entered(folder):
        return single.convert(
            recipe,
            folder,
            moments=None if moments is None else output_path(moments, where="--moments"),
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )


def extend(
    model: str | Path,
    *,
    out: str | Path,
    length: int | None = None,
    factor: float | None = None,
    method: str = "yarn",
    attention_factor: float | None = None,
    text: Sequence[str] = (),
    tokens: int | None = None,
    link: bool = False,
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write `model` with a window of `length` tokens, or `factor` times its own, to the new folder `out`.

    overwrite: `out` may hold a checkpoint that an earlier call wrote, which is replaced.
    attention_factor: what cos and sin are multiplied with in effect, instead of the method's own. text, tokens: what
    the method `search` reads, and how much of it. link: unchanged weights become hard links to the model's files,
    where the disk allows them: a program that writes into one of the two then changes both.
    """
    from retrofit.workflow import single

    section: dict[str, Any] = {"length": length, "factor": factor, "method": method}
    if attention_factor is not None:
        section["attention_factor"] = attention_factor
    if text or tokens is not None:
        section["search"] = {**({"text": list(text)} if text else {}), "tokens": tokens}
    recipe = single.recipe("context", section, model=str(model), device=device, seed=seed, link=link)
    folder = output_path(out, where="--out")
    with _entered(folder):
        return single.extend(recipe, folder, revision=revision, overwrite=overwrite, progress=progress)


def recover(
    model: str | Path,
    *,
    teacher: str | Path,
    tokens: int,
    out: str | Path,
    text: Sequence[str] = (),
    loss: str = "distill",
    sequence_length: int = 1024,
    batch_size: int = 1,
    learning_rate: float | None = None,
    rank: int = 64,
    norms: bool = False,
    positions: str = "full",
    short_share: float | None = None,
    document_masking: bool = False,
    gradient_checkpointing: bool = False,
    kernel: str = "auto",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Train `model` to follow `teacher` (the model before the surgery) and write the merged checkpoint to `out`.

    overwrite: `out` may hold a checkpoint that an earlier call wrote, which is replaced.
    """
    from retrofit.workflow import single

    if short_share is not None and positions != "pose":
        raise UserError(
            "short rows are a share of rows that skip positions, and none do",
            where="--short-share",
            fix="add --positions pose, or leave --short-share out",
        )
    section = {
        "loss": loss,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "positions": positions,
        "document_masking": document_masking,
        "gradient_checkpointing": gradient_checkpointing,
        "adapter": {"rank": rank, "alpha": 2 * rank, "norms": norms},
        **({} if short_share is None else {"short_share": short_share}),
        **({"text": list(text)} if text else {}),
    }
    recipe = single.recipe("recover", section, model=str(model), kernel=kernel, device=device, seed=seed)
    folder = output_path(out, where="--out")
    with _entered(folder):
        return single.recover(recipe, str(teacher), folder, overwrite=overwrite, progress=progress)


def evaluate(
    model: str | Path,
    *,
    text: Sequence[str] = (),
    lengths: Sequence[int] | None = None,
    suite: str | Path | None = None,
    documents: int | None = None,
    needle: Sequence[int] | None = None,
    depths: int | None = None,
    together: bool = False,
    ruler: Sequence[int] | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    context_gain: bool = False,
    long_ppl: bool = False,
    definitions: Sequence[str] = (),
    document_tokens: int | None = None,
    beyond: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    kernel: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `model` at several context lengths, its KV cache, its decoding speed, and the use of its context.

    suite: what to measure, from a file; the other arguments win over it. needle, ruler: lengths of these tests;
    depths (5), together: of the needle test, the needles of all depths in one text.
    tasks: of lm-evaluation-harness (names, or YAML files, or names of files in task_folder), `limit` questions of each
    after `fewshot` examples.
    definitions: perplexities as others define them, over `document_tokens` tokens of each document. beyond: lengths may
    lie beyond the model's positions. out: where to keep the token losses (.npz), and beside them the answers to tasks;
    the same call goes on after a stop, and measures nothing again when it has ended. overwrite: they may be there.
    """
    from retrofit.workflow import single

    section = single.evaluate_section(
        suite,
        text=text,
        lengths=lengths,
        documents=documents,
        dtype=dtype,
        needle={"lengths": list(needle or ()), "depths": depths, "together": together},
        tasks={
            "names": list(tasks),
            "folder": None if task_folder is None else str(task_folder),
            "fewshot": fewshot,
            "limit": limit,
        },
        ruler={"lengths": list(ruler)} if ruler else None,
        context_gain=context_gain,
        long_ppl=long_ppl,
        definitions=list(definitions),
        document_tokens=document_tokens,
    )
    recipe = single.recipe("evaluate", section, model=str(model), kernel=kernel, device=device)
    file = None if out is None else output_path(out, where="--out")
    with _entered(file):
        return single.evaluate(recipe, file, revision=revision, beyond=beyond, overwrite=overwrite, progress=progress)


def publish(
    folder: str | Path,
    *,
    repo: str,
    private: bool = True,
    license: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Published:
    """Push a finished checkpoint folder to the hub repository `repo`; token, name and license are checked first."""
    from retrofit.publishing.hub import publish as push

    finished = local_path(folder, where="FOLDER")
    with _entered(finished):
        return push(finished, repo, private=private, token=token, license=license, progress=progress)


def compare(a: str | Path, b: str | Path, *, lengths: Sequence[int] | None = None, bits: bool = False) -> Comparison:
    """Two stored results (run folders or .npz) side by side; no model is loaded.

    bits: compare bits per byte on the same bytes instead, which two models with different tokenizers allow.
    """
    from retrofit.workflow.compare import compare as compare_stored

    with _entered():
        return compare_stored(local_path(a, where="A"), local_path(b, where="B"), lengths=lengths, bits=bits)


def doctor() -> Health:
    """What this machine can run, and what to install for the rest."""
    from retrofit.system.doctor import doctor as examine

    return examine()


@dataclass(frozen=True)
class RecipeEntry:
    """A bundled recipe."""

    name: str
    description: str
    path: Path


def recipes() -> tuple[RecipeEntry, ...]:
    """The bundled recipes."""
    paths = [bundled.find("recipes", name) for name in bundled.names("recipes")]
    return tuple(RecipeEntry(path.stem, load_recipe(path).description, path) for path in paths)


def show_recipe(name: str | Path, *, overrides: Sequence[str] = ()) -> str:
    """A recipe as YAML with every default written out."""
    return dump_recipe(load_recipe(name, overrides))


def copy_recipe(name: str | Path, to: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Copy a recipe as it is written, comments included; returns the new file.

    overwrite: the file may exist. Raises UserError where it does otherwise.
    """
    source = bundled.find("recipes", name)
    target = output_path(to if to is not None else f"{source.stem}.yaml", where="FILE")
    if target.is_dir():
        target = target / source.name
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        raise UserError("the file exists already", where=shown(target), fix="give another name, or add --overwrite")
    if not target.parent.is_dir():
        raise UserError("there is no folder to copy into", where=shown(target.parent), fix="make it, or choose another")
    with writing(target):
        put_file(target, source.read_bytes(), overwrite=overwrite)
    return target


def schema() -> dict[str, Any]:
    """The recipe language as JSON Schema."""
    return Recipe.model_json_schema()


def is_recipe(name: str) -> bool:
    """Whether a word names a recipe (a .yaml file, or a bundled one) rather than a model."""
    return Path(name).suffix in (".yaml", ".yml") or (name in bundled.names("recipes") and not Path(name).is_dir())


def _recipe(recipe: str | Path | Recipe, overrides: Sequence[str], model: str | None) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides, model)
    if overrides:
        raise UserError("overrides apply to a recipe file", where="overrides", fix="change the Recipe itself")
    return recipe.model_copy(update={"model": model}) if model else recipe


def _measured(recipe: Recipe) -> Throughput:
    from retrofit.model.load import resolve_device
    from retrofit.workflow.estimate.throughput import measure

    return measure(resolve_device(recipe.device))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse_unread(options: Mapping[str, Any], reader: str) -> None:
    """UserError when one of the options is given, none of which `reader` reads."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{reader} does not read {', '.join(given)}", where="convert", fix="leave it out")


@contextmanager
def _entered(*places: Path | None) -> Iterator[None]:
    """What every command works in: one process, messages for failures of the machine (places: where it writes), and
    no progress bars and warnings of other libraries in our output."""
    from retrofit.model.gguf import cache_dir
    from retrofit.model.load import quiet

    require_usable()
    with writing(*places, cache_dir()), quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        yield
