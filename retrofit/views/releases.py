"""Results of the commands that make a folder ready for others, as tables and lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrofit.format import nbytes
from retrofit.tables import Part, Table
from retrofit.views.results import by_length, nats

if TYPE_CHECKING:
    from retrofit.publishing.gguf.writing import GgufReport
    from retrofit.workflow.certify import Certified
    from retrofit.workflow.export import Exported
    from retrofit.workflow.repair import Repaired


def certified(result: Certified) -> Iterator[Part]:
    """`retrofit certify`."""
    yield from by_length(result.models)
    if result.engines:
        yield Table(
            f"Other engines, against transformers {result.engines[0].reference} (nats; with its "
            f"{result.engines[0].control_name}: {result.engines[0].control:.2g})",
            ["engine", "version", "largest", "mean", "same next token", "note"],
            [
                (
                    one.engine,
                    one.version,
                    *map(nats, (one.largest, one.mean)),
                    f"{one.greedy:.1%}",
                    "; ".join(one.notes),
                )
                for one in result.engines
            ],
        )
    yield f"\ncard: {result.card}"
    yield f"checkpoint: {result.folder}; loaded again in a fresh process: {result.reload.in_words}"


def repaired(result: Repaired) -> Iterator[Part]:
    """`retrofit certify --repair`."""
    for name, keys in result.written.items():
        yield f"{name}: written again: {', '.join(keys) or 'under the names that all readers know'}"
    if not result.written:
        yield "nothing to repair: every name that readers look for is there"
    for finding in result.findings:
        yield f"{finding.severity} {finding.where}: {finding.what}"


def exported(result: Exported) -> Iterator[Part]:
    """`retrofit export`."""
    yield from gguf_files(result.report)
    yield f"\nfiles: {result.folder}"
    yield from result.notes


def gguf_files(report: GgufReport) -> Iterator[Part]:
    """GGUF files beside the folder that they were made from."""
    yield Table(
        f"GGUF files in llama.cpp, {report.tokens:,} tokens; the folder itself has perplexity {report.ppl:.4g}",
        ["file", "size", "perplexity", "/ the folder's", "difference of a token's loss, mean", "same next token"],
        [
            (
                file.name,
                nbytes(file.nbytes),
                f"{file.ppl:.4g}",
                f"{file.ratio:.4f}",
                f"{file.distance.token:.2g}",
                f"{file.distance.greedy:.1%}",
            )
            for file in report.files
        ],
    )


def published(result: Any) -> Iterator[Part]:
    """`retrofit publish`."""
    yield f"published: {result.url}"
