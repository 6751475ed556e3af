"""Texts against the tokenizer: every step finds as much as it asks for, before the first step begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrofit.checkpoint.staging import require_writable
from retrofit.data.calibration import fewest_sequences, require_calibration_text
from retrofit.data.corpora import BUILT_IN
from retrofit.data.packing import training_rows
from retrofit.data.samples import Teacher, sample_length, sample_path
from retrofit.data.texts import OWN_SAMPLES, require_known
from retrofit.errors import UserError
from retrofit.evaluation.long_context import require_room
from retrofit.kv_heads.calibrate.layerwise import require_left_out
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Calibration, Convert, Evaluate, Recipe, Recover
from retrofit.workflow.recipe_checks import own_samples_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGER = 3
"""Samples can become so many times longer when they are read again, at most: a byte that is no text becomes three."""


def check_reading(
    recipe: Recipe, spec: AttentionSpec, tokenizer: PreTrainedTokenizerBase, teacher: Teacher, *, weights: bool
) -> None:
    """Calibration, recovery and the synthetic tests have text and room. The model itself is asked for nothing.

    weights: they are on this machine. Raises UserError otherwise.
    """
    if recipe.convert and recipe.convert.calibrates and recipe.convert.kv_heads != spec.layers[0].kv_heads and weights:
        _check_calibration(recipe.convert, spec, tokenizer, recipe.seed, teacher)
    if recipe.recover:
        _check_recovery(recipe.recover, tokenizer, recipe.seed, teacher)
    if recipe.evaluate:
        _check_evaluation(recipe.evaluate, tokenizer, recipe.seed, teacher)
    if weights and own_samples_in(recipe) and not (path := sample_path(teacher)).exists():
        require_writable(path.parent)


def _check_calibration(
    convert: Convert, spec: AttentionSpec, tokenizer: PreTrainedTokenizerBase, seed: int, teacher: Teacher
) -> None:
    from retrofit.kv_heads.merge.baselines import METHODS

    calibration: Calibration = convert.calibration
    require_left_out(
        fewest_sequences(calibration, teacher), spec, METHODS[convert.method], repairs=convert.repair != "none"
    )
    require_calibration_text(calibration, tokenizer, seed=seed, teacher=teacher)


def _check_recovery(recover: Recover, tokenizer: PreTrainedTokenizerBase, seed: int, teacher: Teacher) -> None:
    """Every source gives tokens that the model knows; text that does not suffice is read again."""
    for source in recover.text:
        if source.source not in (OWN_SAMPLES, *BUILT_IN):
            rows = training_rows([source], tokenizer, recover.sequence_length, recover.sequence_length, seed)
            require_known(rows.ids_NT, teacher.folder)


def _check_evaluation(evaluate: Evaluate, tokenizer: PreTrainedTokenizerBase, seed: int, teacher: Teacher) -> None:
    require_room(evaluate, tokenizer, seed)
    longest, sample = max(evaluate.lengths), sample_length(teacher.folder)
    if any(source.source == OWN_SAMPLES for source in evaluate.text) and longest > _LONGER * sample:
        raise UserError(
            f"the model's own samples are {sample} tokens long, and {longest} are measured",
            where="text source `self`",
            fix=f"shorten evaluate.lengths to {sample}, or name another text",
        )
