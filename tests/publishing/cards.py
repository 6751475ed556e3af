"""A filled-in CardInput for the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from retrofit.evaluation.metrics.perplexity import Row
from retrofit.publishing.card_input import CardInput, CardModel, Recovery
from retrofit.publishing.snippet import load_snippet


def row(kind: str, length: int, ppl: float) -> Row:
    return Row(
        kind=kind,
        length=length,
        tokens=2 * (length - 1),
        documents=2,
        ppl=ppl,
        low=ppl * 0.9,
        high=ppl * 1.1,
        tail=16,
        tail_ppl=ppl,
        tail_low=ppl,
        tail_high=ppl,
        bpb=1.0,
        unit="block of 512 tokens",
    )


def rows(scale: float) -> tuple[Row, ...]:
    kinds = ("all", "python-docs", "/home/someone/private/notes.txt")
    return tuple(row(kind, n, scale * (10 + i)) for i, kind in enumerate(kinds) for n in (1024, 16384))


def card_input(**over: Any) -> CardInput:
    base = CardInput(
        title="Tiny-mqa-16k",
        base_model="acme/Tiny",
        license="apache-2.0",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        layers=30,
        kv_heads=(3, 1),
        native_length=8192,
        claimed_length=16384,
        models=(
            CardModel("original", rows(1.0)),
            CardModel("converted", rows(400.0)),
            CardModel("recovered", rows(1.4)),
        ),
        kv_cache_bytes={8192: (188743680, 62914560), 16384: (377487360, 125829120)},
        recipe_yaml="name: quickstart\nconvert:\n  kv_heads: 1\n",
        commands=("retrofit run quickstart --out runs/quickstart",),
        versions={"python": "3.11.7", "transformers": "5.23.0"},
        snippet=load_snippet(chat=False),
        conversion="calibrated",
        context_method="yarn",
        recovery=Recovery("distill", 300_000, 16, ("python-docs", "python-stdlib"), 1e-3, 498.2),
        revision="0123456789abcdef0123456789abcdef01234567",
        chart="assets/perplexity.svg",
        kernel="blockwise",
        tolerance=(1.0, 2e-2),
    )
    return replace(base, **over)
