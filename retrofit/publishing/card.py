"""The model card: README.md of a published checkpoint, from measured values only.

Names in it are foreign: whatever the template writes is escaped, but for what is `Markdown` already.

Every value comes from `CardInput`; one that is not known is refused by name, never written as a placeholder.
Front matter: https://huggingface.co/docs/hub/model-cards (a converted checkpoint is a `finetune` of its base model).
"""

from __future__ import annotations

import math

import jinja2

from retrofit import format as fmt
from retrofit.data.corpora import BUILT_IN
from retrofit.escape import Markdown, code_block, code_span, markdown, prose, visible
from retrofit.evaluation.cache_change import cache_change
from retrofit.evaluation.metrics.effective import certificate
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.evaluation.tasks import common_knowledge
from retrofit.publishing.card_engines import scored_sentence, trial_table, tried_table
from retrofit.publishing.card_input import CardInput, Recovery, require_known
from retrofit.publishing.card_tables import (
    cache_table,
    certificate_table,
    frequency_table,
    gguf_table,
    kinds_of,
    mark_of,
    name_of,
    quality_table,
    task_table,
)
from retrofit.publishing.identity import unknown_lines
from retrofit.publishing.snippet import NEWER, TRANSFORMERS
from retrofit.recipe.values import OWN_SAMPLES

_METHODS = {
    "first": "the first head of each group was kept",
    "mean": "the heads of each group were averaged",
    "procrustes": "the heads of each group were turned to lie on each other and averaged",
    "real-pca": "the heads of each group were merged along real principal components",
    "calibrated": "the heads of each group were merged along the directions that calibration text uses most",
}
_ROPE = {
    "linear": "linear interpolation",
    "ntk": "a larger RoPE base",
    "yarn": "YaRN",
    "llama3": "Llama 3 scaling",
    "longrope": "LongRoPE factors",
    "none": "configuration alone, the position encoding left as it was",
}
_LOSSES = {"distill": "distilled from the original model", "lm": "trained on plain text"}


def render_card(card: CardInput) -> str:
    """README.md of the checkpoint. Raises UserError that lists every value which is not known."""
    require_known(card)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retrofit.publishing"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=prose,
    )
    environment.filters |= {"thousands": lambda value: f"{value:,}", "code": code_span}
    return environment.get_template("card.md.j2").render(
        card=card,
        heading=_heading(card),
        tolerance=_tolerance(card),
        front_matter=_front_matter(card),
        summary=_summary(card),
        unknown=unknown_lines(card.license, card.base_model),
        snippet=Markdown(card.snippet),
        transformers=NEWER.get(card.architecture, TRANSFORMERS),
        commands=code_block("\n".join(card.commands), "sh"),
        recipe=code_block(card.recipe_yaml, "yaml"),
        tables=[
            (ALL if kind == ALL else name_of(kind), mark_of(card, kind), quality_table(card, kind))
            for kind in kinds_of(card)
        ],
        frequency=frequency_table(card),
        documents=_documents(card),
        tasks=task_table(card),
        whose_tasks=_whose_tasks(card),
        certificate=certificate(card.effective) if card.effective else "",
        tests=certificate_table(card.effective) if card.effective else [],
        kv_table=cache_table(card),
        trials=trial_table(card.engines),
        scored=scored_sentence(card.engines),
        tried=tried_table(card.tried),
        gguf=gguf_table(card),
        limits=_limits(card),
        chart_alt=f"Perplexity by context length: {', '.join(model.label for model in card.models)}",
    )


def _tolerance(card: CardInput) -> str:
    """How near the reloaded losses had to be."""
    if card.tolerance is None:
        return ""
    token, mean = map(fmt.plain, card.tolerance)
    return f", a token's to within {token} and the mean of 1,024 to within {mean} (in nats)"


def _front_matter(card: CardInput) -> Markdown:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name_of(row.kind),
            dataset_name="all held-out documents" if row.kind == ALL else name_of(row.kind),
            metric_type="perplexity",
            metric_name=f"Perplexity at {row.length} tokens",
            metric_value=float(f"{row.ppl:.6g}"),
        )
        for row in card.models[-1].rows
    ]
    results += [
        EvalResult(
            task_type="text-generation",
            dataset_type=name_of(score.task),
            dataset_name=name_of(score.task),
            metric_type=visible(score.metric),
            metric_name=visible(f"{score.metric}, {score.fewshot} examples"),
            metric_value=float(f"{score.value:.6g}"),
        )
        for score in card.models[-1].tasks
        if math.isfinite(score.value)
    ]
    data = ModelCardData(
        language=[visible(language) for language in card.languages] or None,
        license=card.license,
        license_name=card.license_name and visible(card.license_name),
        license_link=card.license_link,
        base_model=card.base_model,
        base_model_relation="finetune" if card.base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[visible(tag) for tag in dict.fromkeys([*_tags(card), *card.tags])],
        model_name=visible(card.title),
        eval_results=results,
    )
    return Markdown(data.to_yaml().strip())


def _tags(card: CardInput) -> list[str]:
    before, after = card.kv_heads
    tags = ["attention-retrofit", "text-generation"]
    if after < before:
        tags.append("multi-query-attention" if after == 1 else "grouped-query-attention")
    if card.windows:
        tags.append("sliding-window-attention")
    if card.claimed_length > card.native_length:
        tags.append("long-context")
    return tags


def _smaller(card: CardInput) -> str:
    """How many times smaller the KV cache is, at the longest context in the table where that decides, and by what."""
    tokens = max(card.kv_cache_bytes)
    change = cache_change(tokens, card.kv_cache_bytes[tokens], card.kv_heads)
    at = f" at {tokens:,} tokens" if change.windowed else ""
    return f"{fmt.plain(change.ratio)} times smaller{at}{f' ({change.parts})' if change.parts else ''}"


def _summary(card: CardInput) -> Markdown:
    """One paragraph: what was done, in the order it was done. `require_known` has seen that a base model is an id."""
    at = f" (revision {code_span(card.revision[:12])})" if card.revision else ""
    base = f"[{card.base_model}](https://huggingface.co/{card.base_model}){at}" if card.base_model else None
    parts = []
    before, after = card.kv_heads
    if card.conversion and after < before:
        heads = "1 KV head" if after == 1 else f"{after} KV heads"
        parts.append(f"Each of its {card.layers} layers has {heads} instead of {before}; {_METHODS[card.conversion]}")
    if card.windows:
        parts.append(f"{card.windows.count} of its {card.layers} layers look back a fixed number of tokens only")
    if parts:
        parts = [f"{'. '.join(parts)}, so the KV cache is {_smaller(card)}."]
    if card.context_method:
        tried = card.encodings_tried
        searched = f", the best of {tried} position encodings measured on this model" if tried else ""
        parts.append(
            f"Its context length went from {card.native_length:,} to {card.claimed_length:,} tokens by "
            f"{_ROPE[card.context_method]}{searched}{'' if _to_the_end(card) else f'; it was {_measured(card)}'}."
        )
    if card.recovery:
        parts.append(_training(card.recovery))
    changed = f"This is {base} after attention surgery." if base else "This checkpoint was made by attention surgery."
    same = f"This is {base or 'a checkpoint'} with its weights and its context length unchanged."
    plain = f"It is a plain {code_span(card.architecture)} checkpoint."
    return Markdown(" ".join([changed if parts else same, *parts, plain]))


def _training(done: Recovery) -> Markdown:
    """What the training was, and whether the weights are its last ones, earlier ones, or those from before it."""
    named = ["the original's own samples" if one == OWN_SAMPLES else markdown(name_of(one)) for one in done.sources]
    how = [f"a learning rate of {done.learning_rate:.2g}"] if done.learning_rate else []
    how += [f"{fmt.count(done.tokens_per_second)} tokens/s on the machine of the run"] if done.tokens_per_second else []
    step, steps = done.kept or (0, 0)
    merged = ", merged into the weights" if step or not steps else ""
    text = (
        f"To win quality back it was {_LOSSES[done.loss]} for {done.tokens:,} tokens of {fmt.enumerated(named)}, "
        f"through LoRA adapters of rank {done.rank}{merged}{', at ' if how else ''}{' and '.join(how)}."
    )
    if done.passages:
        before, after = map(fmt.number, done.passages)
        text += (
            " On held-out passages that come again from out of sight, the loss that was trained on went from "
            f"{before} to {after} nats per token."
        )
    if step == steps:
        return Markdown(text)
    if not step:
        return Markdown(
            f"{text} This lowered the loss on held-out text at no step, so the weights are those from before it."
        )
    return Markdown(f"{text} The weights are those after step {step:,} of {steps:,}, the best on held-out text.")


def _longest(card: CardInput) -> int:
    return max(row.length for row in card.models[-1].rows)


def _to_the_end(card: CardInput) -> bool:
    """Whether the context length was measured to its end."""
    return _longest(card) >= card.claimed_length


def _measured(card: CardInput) -> str:
    return f"measured up to {_longest(card):,} tokens"


def _heading(card: CardInput) -> str:
    """The title, which may name the new context length; where that was not measured to its end, how far it was."""
    grew = card.claimed_length > card.native_length
    return card.title if not grew or _to_the_end(card) else f"{card.title} ({_measured(card)})"


def _whose_tasks(card: CardInput) -> str:
    """Where the questions come from."""
    names = {score.task for score in card.models[-1].tasks}
    own = f"`{common_knowledge.NAME}` (plain questions of attention-retrofit, four answers to choose from)"
    theirs = ["tasks of lm-evaluation-harness"] if names - {common_knowledge.NAME} else []
    text = " and ".join(([own] if common_knowledge.NAME in names else []) + theirs)
    return f"{text[:1].upper()}{text[1:]}"


def _documents(card: CardInput) -> str:
    """How much was measured, per kind of text."""
    rows = card.models[-1].rows
    longest = max(row.length for row in rows)
    own = [row for row in rows if row.length == longest and row.kind != ALL]
    own = own or [row for row in rows if row.length == longest]
    counted = [f"{r.documents} of {name_of(r.kind)} ({r.tokens:,} tokens at the longest context)" for r in own]
    unit = own[0].unit
    return f"Documents: {'; '.join(counted)}. Intervals: percentile bootstrap over each {unit}."


def _limits(card: CardInput) -> list[str]:
    """What a reader must not conclude, from the numbers themselves."""
    first, last = card.models[0], card.models[-1]
    lengths = sorted({row.length for row in last.rows})
    asked = " and ".join(dict.fromkeys(score.task for score in last.tasks))
    limits = [
        "Quality was measured as perplexity on the texts above"
        f"{f' and with the questions of {asked}' if asked else ''} only: no {'other' if asked else 'task'} benchmark, "
        "no other language and no safety evaluation was run.",
    ]
    if len(card.models) > 1:
        pairs = {(r.kind, r.length): r.ppl for r in first.rows}
        worst = max(last.rows, key=lambda row: row.ppl / pairs[row.kind, row.length])
        ratio = worst.ppl / pairs[worst.kind, worst.length]
        if ratio > 1:
            named = worst.kind in BUILT_IN or worst.kind.startswith("hub:")  # a file of somebody's is not in the folder
            on = "all text" if worst.kind == ALL else worst.kind if named else "one of these texts"
            limits.append(
                f"It is weaker than the original where the table says so; at worst its perplexity is {ratio:.2f} "
                f"times the original's ({on}, {worst.length:,} tokens)."
            )
        if alike := fmt.none_unseen(card.seen):
            limits.append(alike)
        knowledge = common_knowledge.sentence(first.tasks, last.tasks, last.task_changes)
        if knowledge:
            limits.append(f"General knowledge: {knowledge}.")
    if lengths[-1] < card.claimed_length:
        limits.append(f"Contexts between {lengths[-1]:,} and {card.claimed_length:,} tokens were not measured.")
    if card.effective and card.effective.length < card.claimed_length:
        limits.append(
            f"It is shown to use {card.effective.length:,} tokens of context, not the {card.claimed_length:,} of "
            "its context length."
        )
    if not card.effective or all(test.needle is None for test in card.effective.tests):
        limits.append("Perplexity at a long context does not show that the model finds a fact far back in its context.")
    if card.older_names:
        names = " and ".join(f"`{name}`" for name in card.older_names)
        limits.append(
            f"Saving it again with transformers 5, as a fine-tune does, drops {names} from `config.json`, which older "
            "releases and other engines look for; `retrofit certify FOLDER --repair` writes them again."
        )
    limits.append("Whatever the base model gets wrong, and the terms of its license, stay.")
    return limits
