"""Position ids of training rows: skips that stand for a long window (PoSE), documents that count from 0, and proof
that attention really does with them what is meant.

transformers reads position ids that jump, without a mask and a cache, as packed documents, and attention across the
jump becomes exactly 0. For PoSE that would train the opposite of what is wanted, so `require_visible` looks once.

Legend: N rows, T tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retrofit.errors import UserError

Hidden = Callable[[Tensor, Tensor], Tensor]
"""(token ids [1, T], position ids [1, T]) -> hidden states [1, T, C]."""

_LEAK = 1e-3  # of the change where it belongs; experts that see other tokens round differently


def pose_positions(rows: int, tokens: int, length: int, *, chunks: int, short_share: float, seed: int) -> Tensor:
    """Position ids int64 [N, T] of positional skip-wise training (PoSE, arXiv 2309.10400, section 3.2).

    A row is cut into `chunks` chunks at random places; chunk i stands u_i tokens later than it would, with u_0 = 0 and
    u_i drawn evenly from u_(i-1) to length - T, so that all positions stay below `length` and none comes twice. As in
    the paper the text itself is not skipped. `short_share` of the rows, chosen at random, keep 0 .. T-1. The same
    arguments give the same ids.
    """
    assert 2 <= chunks <= tokens <= length
    generator = torch.Generator().manual_seed(seed)
    plain_T = torch.arange(tokens)
    result = plain_T.repeat(rows, 1)
    short = min(round(short_share * rows), rows - 1)
    for row in torch.randperm(rows, generator=generator)[short:].sort().values.tolist():
        cuts = torch.randperm(tokens - 1, generator=generator)[: chunks - 1].sort().values + 1
        skip, skips_T = 0, torch.zeros(tokens, dtype=torch.int64)
        for cut in cuts.tolist():
            skip = int(torch.randint(skip, length - tokens + 1, (), generator=generator))
            skips_T[cut:] = skip
        result[row] += skips_T
    return result


def document_positions(documents_NT: Tensor) -> Tensor:
    """Position ids int64 [N, T] that count from 0 in each document; documents_NT: a number per document."""
    index_NT = torch.arange(documents_NT.shape[1]).expand_as(documents_NT)
    begins_NT = torch.ones_like(documents_NT, dtype=torch.bool)
    begins_NT[:, 1:] = documents_NT[:, 1:] != documents_NT[:, :-1]
    return index_NT - torch.where(begins_NT, index_NT, 0).cummax(1).values


def jumps(positions_T: Tensor) -> list[int]:
    """Indices of tokens whose position does not follow the one before."""
    return (torch.nonzero(positions_T.diff() != 1).flatten() + 1).tolist()


def require_visible(hidden: Hidden, ids_NT: Tensor, positions_NT: Tensor) -> None:
    """The first token after a skip sees the last one before it; nothing to check when no row has a skip.

    Raises UserError when it does not: then every chunk would be trained as a text of its own.
    """
    found = _first_jump(ids_NT, positions_NT)
    if found is not None and not bool(_change(hidden, *found).any()):
        raise UserError(
            "attention does not cross the skips of the positions: the chunks of a row do not see each other",
            where="recover.positions: pose",
            fix="use another kernel (kernel: sdpa or eager); this one reads skipped positions as packed documents",
        )


def require_hidden(hidden: Hidden, ids_NT: Tensor, positions_NT: Tensor) -> None:
    """The tokens of a packed document do not see the document before; nothing to check when no row holds two.

    Raises UserError when they do.
    """
    found = _first_jump(ids_NT, positions_NT)
    if found is None:
        return
    change_T, jump = _change(hidden, *found, whole=True), found[2]
    if float(change_T[jump:].max()) > _LEAK * float(change_T[:jump].max()):
        raise UserError(
            "packed documents see each other",
            where="recover.document_masking",
            fix="use kernel: sdpa or eager, which mask them",
        )


def _first_jump(ids_NT: Tensor, positions_NT: Tensor) -> tuple[Tensor, Tensor, int] | None:
    for ids_T, positions_T in zip(ids_NT, positions_NT, strict=True):
        at = jumps(positions_T)
        if at:
            return ids_T[None], positions_T[None], at[0]
    return None


@torch.no_grad()
def _change(hidden: Hidden, ids_1T: Tensor, positions_1T: Tensor, jump: int, whole: bool = False) -> Tensor:
    """How far the hidden states move when the token before `jump` is another: at `jump`, or of the whole row [T]."""
    other_1T = ids_1T.clone()
    before = int(ids_1T[0, jump - 1])
    other_1T[0, jump - 1] = before - 1 if before else 1
    change_T = (hidden(ids_1T, positions_1T) - hidden(other_1T, positions_1T)).float().abs().amax(-1)[0]
    return change_T if whole else change_T[jump]
