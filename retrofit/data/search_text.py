"""The text that a search of position encodings reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrofit.data.packing import training_rows
from retrofit.data.samples import Teacher
from retrofit.data.texts import read_texts
from retrofit.errors import UserError
from retrofit.recipe.schema import Search

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress


LONG_SEARCH = 200  # characters per token of the window to look through for a document that is long enough


def searched_text(
    search: Search,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    seed: int,
    teacher: Teacher,
    progress: Progress | None = None,
) -> tuple[Tensor, str]:
    """(`length` tokens that a search of position encodings reads, BOS included; what they are).

    The beginning of the first document that is long enough, else text packed from several, read again where it does
    not suffice. Nothing held out is read.
    """
    import torch

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for source in search.text:
        limit = LONG_SEARCH * length
        for text in read_texts(source, split="train", teacher=teacher, limit_chars=limit, progress=progress):
            if len(text.text) < length:  # most tokens are several characters
                continue
            ids = bos + tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= length:
                return torch.tensor(ids[:length]), text.name
    name, row = "text packed from several documents, none being long enough", max(16, length // 8)
    try:
        packed = training_rows(search.text, tokenizer, length, row, seed, teacher=teacher, repeat=False)
    except UserError:  # too little, as the other reading announces; whatever else it was, that meets it again
        packed = training_rows(search.text, tokenizer, length, row, seed, teacher=teacher, progress=progress)
        name += "; there was too little, so parts of it stand in it more than once"
    return packed.ids_NT.flatten()[:length], name
