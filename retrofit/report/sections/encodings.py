"""How the position encoding was chosen: the trials of `context.search`, as the journal keeps them."""

from __future__ import annotations

from collections.abc import Iterator

from retrofit import format as fmt
from retrofit.context.search.outcome import SearchResult
from retrofit.report.charts import plots
from retrofit.report.data import RunData
from retrofit.report.parts import Figure, Table

FAR = 2.0  # times the largest tail loss of the last round


def search_of(run: RunData) -> SearchResult | None:
    """What the search found; None when nothing was searched."""
    return run.context.search if run.context else None


def described(run: RunData) -> str:
    """What the search found and out of how many encodings; empty without one."""
    got = search_of(run)
    if got is None:
        return ""
    tried = len({trial.label for trial in got.trials})
    won, reference = got.winner, got.reference
    by = f"; its objective is {fmt.number(won.objective)}, that of `{reference.label}` "
    return (
        f"`{won.label}`, the best of {tried} position encodings measured on this model "
        f"(a budget of {fmt.count(got.read)} tokens)"
        f"{by + fmt.number(reference.objective) if won != reference else ''}"
    )


def figures(run: RunData) -> Iterator[Figure]:
    """The section `search`."""
    got = search_of(run)
    if got is None:
        return
    last = got.winner.rung
    ranked = sorted((t for t in got.trials if t.rung == last), key=lambda trial: trial.objective)
    marked = {got.reference.label: "reference", got.winner.label: "chosen"}
    rows = [
        (
            f"{trial.label}{_mark(marked.get(trial.label))}",
            *map(fmt.number, (trial.native, trial.excess, trial.tail, trial.needle, trial.objective)),
        )
        for trial in ranked
    ]
    tried = len({trial.label for trial in got.trials})
    earlier = [trial for trial in got.trials if trial.rung < last]
    # Encodings that fail altogether would press all others into one line.
    limit = max(FAR * trial.tail for trial in ranked)
    drawn = [trial for trial in earlier if trial.tail <= limit]
    beyond = (
        f" {len(earlier) - len(drawn)} of them lost more than this chart shows." if len(drawn) < len(earlier) else ""
    )
    caption = (
        f"{tried} encodings in {last} rounds, the best going on to longer readings. Large marks: the last round, with "
        "the one chosen and the reference; left and down is better. Small dots: earlier rounds, which saw less text, "
        f"so that their height is not quite comparable.{beyond} Before the extension the model's loss at its own "
        f"window was {fmt.number(got.native)}; the objective is the tail loss and what the search adds for lost "
        "answers and for the excess."
    )
    title = "What each position encoding costs and gives"
    picture = plots.encodings_tried(
        "encodings",
        [(trial.excess, trial.tail) for trial in drawn],
        [(trial.excess, trial.tail, trial.label, marked.get(trial.label, "")) for trial in ranked],
        title=title,
    )
    headers = ("encoding", "loss, original length", "excess there", "loss, last tokens", "loss, answers", "objective")
    yield Figure("search", title, caption, Table(headers, tuple(rows)), picture)


def _mark(role: str | None) -> str:
    return f" ({role})" if role else ""
