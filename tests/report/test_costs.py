"""What the page says of speed and memory: beside what the machine could do, and only where rounds tell models apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from retrofit.evaluation.result import ModelEvaluation
from retrofit.evaluation.running import BatchCost
from retrofit.report.charts.figures import figures
from retrofit.report.render import html, markdown
from retrofit.report.sections import costs, summary
from tests.report.made_up import model, run
from tests.report.reading import visible


def test_what_running_costs_stands_beside_what_the_machine_could_do() -> None:
    (found,) = (one for one in figures(run()) if one.title == "Speed and memory by context length")
    assert len(found.table.rows) == 4
    assert found.picture is not None
    assert found.table.rows[0] == (
        "512", "original", "11.2 MiB (spec: 11.2 MiB)", "0.731 (0.717 to 0.753)", "700", "1,450",
        "20.1 (19.5 to 20.5)", "33.8", "90.0 MiB",
    )  # fmt: skip
    assert found.picture.themed.count(">bound<") == 2
    assert "8.85 GiB/s" in found.caption
    bare = replace(run().models[0].cost.lengths[0], decode_tokens=0, decode_per_s=None, decode_rounds=())  # type: ignore[union-attr]
    only = replace(run().models[0], cost=replace(run().models[0].cost, lengths=(bare,)))  # type: ignore[type-var]
    (found,) = (one for one in figures(run(models=(only,))) if one.title == "Speed and memory by context length")
    assert found.picture is None
    assert found.table.rows[0][6] == "–"


def test_sequences_decoded_together_stand_beside_one_another() -> None:
    def with_batches(label: str, *graphs: float) -> ModelEvaluation:
        one = model(label, 3 if label == "original" else 1)
        assert one.cost is not None
        batches = tuple(
            BatchCost(count, count << 20, 9000.0, (15.0, 16.0, 15.5), (speed, speed + 1, speed + 2))
            for count, speed in zip((1, 32), graphs, strict=True)
        )
        skipped = BatchCost(64, 64 << 20, 9000.0, (), (), "not measured: it needs <b>")
        at = replace(one.cost.lengths[1], batches=(*batches, skipped))
        return replace(one, cost=replace(one.cost, lengths=(one.cost.lengths[0], at)))

    assert costs.decoding_together(run()) == ""
    assert costs.together(run()).rows == ()
    data = run(models=(with_batches("original", 200.0, 3000.0), with_batches("recovered", 201.0, 6000.0)))
    assert costs.decoding_together(data) == (
        "Decoding as a CUDA graph after 2,048 tokens, tokens/s: 1 at once 201 → 202 (no difference that the rounds "
        "tell), 32 at once 3,001 → 6,001 (2×)."
    )
    (found,) = (one for one in figures(data) if one.title == "Sequences decoded together")
    assert found.table.rows[2] == (
        "2,048", "32", "original", "32.0 MiB", "15.5 (15.0 to 16.0)", "3,001 (3,000 to 3,002)", "9,000", "–",
    )  # fmt: skip
    assert found.table.rows[4][4:6] == ("–", "–")
    assert "it needs &lt;b&gt;" in html(data)


def with_rounds(label: str, *rounds: tuple[float, ...]) -> ModelEvaluation:
    """A model of the run whose decoding was timed as given, at each length."""
    one = model(label, 3 if label == "original" else 1)
    assert one.cost is not None
    lengths = tuple(
        replace(at, decode_rounds=found, decode_per_s=float(np.median(found)))
        for at, found in zip(one.cost.lengths, rounds, strict=True)
    )
    return replace(one, cost=replace(one.cost, lengths=lengths))


def test_speeds_that_the_rounds_do_not_tell_apart_give_no_factor() -> None:
    steady, beside = (20.0, 20.1, 19.9, 20.2), (3.4, 20.0, 19.0, 3.5)
    data = run(
        models=(with_rounds("original", steady, beside), with_rounds("recovered", (25.0, 24.9, 25.1, 25.2), steady))
    )
    assert "Decoding speed" not in [number.label for number in summary.key_numbers(data)]
    said = costs.decoding(data)
    assert "Decoding after 512 tokens: 1.25× the original's speed, 1.23× to 1.27× over the rounds" in said
    assert (
        "Decoding after 2,048 tokens: no difference could be measured here (3.40 to 20.0 → 19.9 to 20.2 tokens/s: the "
        "rounds do not tell the models apart)." in said
    )
    assert "no difference could be measured here" in markdown(data)
    assert "no difference could be measured here" in visible(html(data))
