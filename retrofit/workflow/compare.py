"""Compare two stored results: which files are meant, and whether they are still those that their run recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrofit.errors import UserError
from retrofit.escape import shell_word
from retrofit.evaluation.compare import Comparison, Scored, compare
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.tasks.answers import FOLDER, TaskAnswers, beside, from_file
from retrofit.workflow.journal import Entry, Journal

MODELS = ("recovered", "extended", "converted", "original")
_CHANGES = {
    "original": (),
    "converted": ("convert", "window", "extend"),
    "extended": ("extend",),
}  # steps that make a model


def compare_stored(
    a: Path, b: Path, *, lengths: Sequence[int] | None = None, bits: bool = False, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compare two stored results: run folders (their last model), or .npz files of token losses.

    lengths, bits: see `evaluation.compare.compare`. Raises UserError for what cannot be compared, and for losses that
    are not of the checkpoint that their run now holds.
    """
    files = stored_losses(a), stored_losses(b)
    one, other = (_scored(path, file) for path, file in zip((a, b), files, strict=True))
    return compare(one, other, f"{files[0]} and {files[1]}", lengths=lengths, bits=bits, resamples=resamples, seed=seed)


def _scored(path: Path, file: Path) -> Scored:
    losses = TokenLosses.load(file)
    label = f"{Path(path).name} ({losses.meta.get('model', 'model')})"
    return Scored(label, losses, stored_answers(path, file))


def stored_answers(path: Path, losses: Path) -> dict[str, TaskAnswers]:
    """The answers to tasks that belong to stored losses: of the same model of a run folder, or beside a .npz.

    Raises UserError for answers that are not those that the run recorded.
    """
    if Path(path).is_file():
        file = beside(losses)
        return from_file(file) if file.is_file() else {}
    journal = Journal(Path(path))
    found: dict[str, TaskAnswers] = {}
    for file in sorted((Path(path) / FOLDER / losses.stem).glob("*.json")):
        answers = from_file(file)
        for name in answers:
            entry = journal.latest(f"evaluate:{losses.stem}:{name}")
            if entry is None or not journal.intact(entry):
                raise UserError(
                    "these answers are not those that the run recorded",
                    where=str(file),
                    fix=_again(Path(path)),
                )
            _require_unchanged(Path(path), losses.stem, journal, entry, file)
        found |= answers
    return found


def stored_losses(path: Path) -> Path:
    """The .npz meant: the file itself, or that of the last model of a run folder.

    Raises: UserError when there is none, or when the run has changed the model since.
    """
    path = Path(path)
    if path.is_file():
        return path
    for model in MODELS:
        found = path / "losses" / f"{model}.npz"
        if found.is_file():
            _require_current(path, model, found)
            return found
    raise UserError(
        "there are no token losses here",
        where=str(path),
        fix="name a run folder that has evaluated, or a file of `retrofit evaluate MODEL --out FILE.npz`",
    )


def _again(run: Path) -> str:
    return f"run the recipe again: retrofit run {shell_word(run / 'recipe.yaml')} --out {shell_word(run)}"


def _require_current(run: Path, model: str, losses: Path) -> None:
    """The losses are those the journal names, and nothing changed the model after they were scored."""
    journal = Journal(run)
    entry = journal.latest(f"evaluate:{model}")
    again = _again(run)
    if entry is None or not journal.intact(entry):
        raise UserError("these token losses are not those that the run recorded", where=str(losses), fix=again)
    _require_unchanged(run, model, journal, entry, losses)


def _require_unchanged(run: Path, model: str, journal: Journal, entry: Entry, file: Path) -> None:
    """Nothing changed the model after this entry of the journal, which made `file`."""
    later = [other.step for other in journal.entries[journal.entries.index(entry) + 1 :]]
    changed = [step for step in _CHANGES.get(model, ("convert", "window", "extend", "recover")) if step in later]
    if changed:
        raise UserError(
            f"this was measured on another revision of the model: `{changed[0]}` was done again after it",
            where=str(file),
            fix=_again(run),
        )
