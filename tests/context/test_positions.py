"""Position ids of training rows, and that attention does with them what they are for."""

from __future__ import annotations

import pytest
import torch

from retrofit.context.positions import (
    document_positions,
    jumps,
    pose_positions,
    require_hidden,
    require_visible,
)
from retrofit.errors import UserError
from retrofit.kernels import registry
from retrofit.kernels.registry import KernelChoice
from retrofit.recovery.student_teacher import body, hidden_states
from tests.tiny import tiny_model

IDS = (torch.arange(24) * 7 % 250)[None]
POSE = torch.cat([torch.arange(10), torch.arange(200, 214)])[None]
DOCUMENTS = torch.cat([torch.arange(10), torch.arange(14)])[None]


def drawn(**over):
    return pose_positions(
        **{"rows": 400, "tokens": 32, "length": 256, "chunks": 3, "short_share": 0.25, "seed": 1, **over}
    )


def test_chunks_skip_ahead_and_stay_inside_the_length() -> None:
    positions_NT = drawn()
    skips_NT = positions_NT - torch.arange(32)
    assert positions_NT.shape == (400, 32)
    assert positions_NT.dtype == torch.int64
    assert (skips_NT[:, 0] == 0).all()
    assert (skips_NT.diff() >= 0).all()  # u_0 = 0, u_i from u_(i-1)
    assert positions_NT.max() < 256
    assert positions_NT.max() > 250
    assert max(len(jumps(row)) for row in positions_NT) == 2
    short = (skips_NT == 0).all(1)
    assert int(short.sum()) in range(100, 103)  # a skip of zero may be drawn
    longest = skips_NT[~short, -1].double()
    # u_1 is uniform on 0 .. S and u_2 on u_1 .. S: their means are S / 2 and 3 S / 4.
    assert longest.mean() == pytest.approx(0.75 * 224, rel=0.05)
    assert drawn(chunks=2, short_share=0.0)[:, -1].double().mean() - 31 == pytest.approx(112, rel=0.1)
    cuts = torch.tensor([jumps(row)[0] for row in drawn(chunks=2, short_share=0.0) if jumps(row)]).double()
    assert cuts.min() == 1
    assert cuts.max() == 31
    assert cuts.mean() == pytest.approx(16, rel=0.1)


def test_the_same_seed_gives_the_same_ids() -> None:
    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(seed=2))
    plain = torch.arange(32).expand(3, -1)
    assert torch.equal(drawn(rows=3, length=32), plain)  # no room: ordinary positions
    assert not torch.equal(drawn(rows=1, short_share=0.9), plain[:1])  # one row is never a short one


def test_documents_count_from_zero() -> None:
    documents_NT = torch.tensor([[4, 4, 4, 5, 5, 7, 7, 7], [1, 2, 2, 2, 2, 2, 2, 3]])
    wanted = [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 0]]
    assert document_positions(documents_NT).tolist() == wanted
    assert jumps(torch.tensor(wanted[0])) == [3, 5]
    assert jumps(torch.arange(5)) == []


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi", "gpt_bigcode"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "blockwise"])
def test_a_row_with_skips_is_one_text_for_every_kernel(family: str, kernel: str) -> None:
    model = tiny_model(family)
    registry.apply(model, KernelChoice(kernel, kernel, "test"))

    def hidden(ids, positions):
        return hidden_states(model, ids, positions)

    require_visible(hidden, IDS, POSE)
    with torch.no_grad():
        found = hidden(IDS, POSE)
        registry.apply(model, KernelChoice("eager", "eager", "test"))
        window = 32 if family == "gemma3_text" else 24
        order = torch.arange(24)
        sees = (order[None] <= order[:, None]) & (order[:, None] - order[None] < window)
        mask = torch.zeros(1, 1, 24, 24).masked_fill(~sees, torch.finfo(torch.float32).min)
        mask = {"full_attention": mask, "sliding_attention": mask} if family == "gemma3_text" else mask
        wanted = body(model)(input_ids=IDS, position_ids=POSE, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_products_reads_skips_too() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    registry.apply(model, KernelChoice("auto", "products", "test"))
    require_visible(lambda ids, positions: hidden_states(model, ids, positions), IDS, POSE)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_without_a_mask_of_ones_attention_does_not_cross_and_that_is_found(kernel: str) -> None:
    model = tiny_model("llama")
    registry.apply(model, KernelChoice(kernel, kernel, "test"))

    def silent(ids, positions):
        return body(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state

    with pytest.raises(UserError, match="does not cross the skips") as error:
        require_visible(silent, IDS, POSE)
    assert "sdpa" in str(error.value.fix)
    require_visible(silent, IDS, torch.arange(24)[None])  # nothing skips: nothing to see


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_masked_documents_are_each_as_if_alone(kernel: str) -> None:
    model = tiny_model("llama")
    registry.apply(model, KernelChoice(kernel, kernel, "test"))

    def hidden(ids, positions):
        return hidden_states(model, ids, positions, documents=True)

    require_hidden(hidden, IDS, DOCUMENTS)
    with torch.no_grad():
        together = hidden(IDS, DOCUMENTS)
        alone = torch.cat([hidden_states(model, part) for part in (IDS[:, :10], IDS[:, 10:])], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="see each other"):
        require_hidden(lambda ids, positions: hidden_states(model, ids, positions), IDS, DOCUMENTS)
