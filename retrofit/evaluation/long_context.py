"""Is the context used? The passes of an evaluation beyond the plain one, and what is computed from them.

`measure` needs the model and leaves arrays and answers; `conclude` needs those only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.extensions import first_original
from retrofit.data.documents import Document
from retrofit.evaluation.metrics.context_use import LongContext
from retrofit.evaluation.metrics.effective import effective_length
from retrofit.evaluation.metrics.longppl import (
    SHORT_CONTEXT,
    ContextGain,
    LongPPL,
    context_gains,
    half_windows,
    long_ppl,
    native_windows,
    short_windows,
)
from retrofit.evaluation.metrics.perplexity import ALL
from retrofit.evaluation.metrics.protocols import STRIDE, ProtocolResult, prepared, value
from retrofit.evaluation.scoring.losses import TokenLosses
from retrofit.evaluation.scoring.windows import Windows
from retrofit.model.folder import ModelFolder
from retrofit.recipe.schema import Definition, Evaluate
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.evaluation.continuations import Continuation
    from retrofit.evaluation.tasks.needle import NeedleResult
    from retrofit.evaluation.tasks.ruler import RulerResult
    from retrofit.kernels.registry import KernelChoice

NATIVE, HALF, SHORT = "native", "half", "short"
LEAST_HALVED = 64  # a native length below it has no halves worth comparing

STAND_FOR_ALL = 3  # samples and depths of a grid whose texts are made to see that questions have room


@dataclass(frozen=True, eq=False)
class Measured:
    """What the model was needed for. passes: token losses under another context (`native`, `half` of it, `short`).
    continuations: what it writes after a few prompts."""

    passes: Mapping[str, TokenLosses]
    defined: tuple[ProtocolResult, ...] = ()
    needle: NeedleResult | None = None
    ruler: RulerResult | None = None
    continuations: tuple[Continuation, ...] = ()


def native_length(model: ModelFolder) -> int:
    """Tokens that the original was made for: the original length an extended checkpoint records, or its window."""
    spec, recorded = model.spec, first_original(model.path)
    if recorded is not None:
        return recorded
    # With llama3 the length inside belongs to the encoding, which Llama 3.1 was trained with; a larger theta, and
    # llama3 on a model that was extended by it, have theirs at the top.
    ropes = [layer.rope for layer in spec.layers if layer.rope and layer.rope.rope_type != "llama3"]
    lengths = [rope.parameters.get("original_max_position_embeddings") for rope in ropes]
    lengths.append(getattr(model.config, "original_max_position_embeddings", None))
    return min((length for length in lengths if isinstance(length, int)), default=spec.max_position_embeddings)


def passes_of(section: Evaluate, native: int) -> tuple[str, ...]:
    """The passes that `measure` makes over the documents."""
    longest = max(section.lengths)
    gain = section.context_gain and longest > native
    keys = section.long_ppl and longest > SHORT_CONTEXT
    half = gain and native >= LEAST_HALVED
    return (*([NATIVE] if gain else []), *([HALF] if half else []), *([SHORT] if keys else []))


def _windows(section: Evaluate, native: int) -> dict[str, Windows]:
    return {
        NATIVE: native_windows(native, section.lengths, section.tail),
        HALF: half_windows(native, section.tail),
        SHORT: short_windows(),
    }


def further_reading(section: Evaluate, native: int) -> tuple[tuple[int, int], ...]:
    """(tokens, context) of everything read of one document of each source, beyond the plain pass; for a plan."""
    longest = max(section.lengths)
    windows = _windows(section, native)
    # The first window of a pass over everything is known.
    found = [
        (windows[name].cost(longest) - (windows[name].length if name == SHORT else 0), windows[name].length)
        for name in passes_of(section, native)
    ]
    total = max(longest, section.document_tokens or 0)
    for name in section.definitions:
        for length in section.lengths:
            if name == "longlora":
                found.append((length * max(0, (total - length) // STRIDE[name] - 1), length))
            elif name != "yarn-truncated":
                step = length if name == "lm-eval" else STRIDE.get(name, section.stride)
                found.append((total * max(1, length // step), length))
    return tuple(found)


def reading_settings(section: Evaluate, native: int, *, varies: bool, seed: int) -> dict[str, object]:
    """What decides what is read besides whole documents, for the key of kept work; empty when nothing is.

    section: as it is asked of the model. varies: the position encoding changes with the length, so that each is a pass
    of its own.
    """
    passes = passes_of(section, native)
    found: dict[str, object] = {"lengths": section.lengths} if varies or section.definitions else {}
    if passes:
        found |= {"passes": passes, "native": native}
    if NATIVE in passes:
        found |= {"ends": [n for n in section.lengths if n > native], "tail": section.tail}
    if section.definitions:
        found |= {"definitions": section.definitions, "stride": section.stride}
    if section.needle or section.ruler:
        found |= {**section.model_dump(mode="json", include={"needle", "ruler"}), "seed": seed}
    return found


def definitions_of(
    section: Evaluate, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Definition, int, list[Document], Windows | None]]:
    """(definition, length, documents to score, windows) of every published perplexity that `section` asks for.

    Raises: UserError where no document is long enough for one of them.
    """
    bos, prefix = tokenizer.bos_token_id is not None, tokenizer.eos_token_id
    return [
        (name, length, *prepared(name, documents, length, bos=bos, prefix_id=prefix, stride=section.stride))
        for name in section.definitions
        for length in section.lengths
    ]


def questions_read(section: Evaluate) -> tuple[tuple[int, int], ...]:
    """(tokens, context) of what the synthetic tests read."""
    found: list[tuple[int, int]] = []
    if section.needle:  # the first depth reads all of it, the others what follows the needle
        share = 1.0 if section.needle.multi_key else 1 + (section.needle.depths - 1) / 2 + 0.5
        found += [(int(n * share * section.needle.samples), n) for n in section.needle.lengths]
    if section.ruler:
        found += [(n * len(section.ruler.tasks) * section.ruler.samples, n) for n in section.ruler.lengths]
    return tuple(found)


def require_room(section: Evaluate, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """UserError where a question of the synthetic tests has no room in a length they are asked at.

    A few samples and depths stand for all: the others differ in words and numbers of the same kind, and to make every
    text of a large grid takes minutes without any progress.
    """
    if not section.needle and not section.ruler:
        return
    from retrofit.evaluation.tasks.needle import depths, haystacks
    from retrofit.evaluation.tasks.ruler_problems import problems_of

    if asked := section.needle:
        samples = min(asked.samples, STAND_FOR_ALL)
        at = depths(asked.depths) if asked.multi_key else depths(asked.depths)[:STAND_FOR_ALL]
        how = {"test": asked.test, "samples": samples, "multi_key": asked.multi_key, "seed": seed}
        haystacks(tokenizer, haystack(asked.test), lengths=asked.lengths, depths=at, **how)  # type: ignore[arg-type]
    if tests := section.ruler:
        samples = min(tests.samples, STAND_FOR_ALL)
        problems_of(tokenizer, haystack(), tasks=tests.tasks, lengths=tests.lengths, samples=samples, seed=seed)


def haystack(test: str = "needle") -> str:
    """The text in which a test hides what it asks for."""
    from retrofit.data.corpora import docs_texts
    from retrofit.evaluation.tasks.haystack import NOISE

    return NOISE if test == "passkey" else "\n\n".join(docs_texts().values())


def longest_prompt(section: Evaluate) -> int:
    """Most tokens that anything reads at once."""
    return max(*section.lengths, *(n for part in (section.needle, section.ruler) if part for n in part.lengths), 0)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    losses: TokenLosses,
    section: Evaluate,
    native: int,
    *,
    kernel: KernelChoice | None = None,
    seed: int = 0,
    partial: Path | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Measured:
    """Everything that `section` asks for beyond `losses`, the plain pass over the first tokens of the documents.

    partial: a folder in which every pass and test keeps what is finished, for the next call with the same question.
    world: the processes that make this call; documents, needles and problems are dealt out to them.
    """
    from retrofit.evaluation.scoring.score import score

    def rescore(name: str, documents: Sequence[Document], **how: object) -> TokenLosses:
        options = {"chunk": section.chunk, "kernel": kernel, "meta": facts, "world": world, "progress": progress}
        folder = partial / name if partial else None
        return score(model, documents, partial=folder, **options, **how)  # type: ignore[arg-type]

    facts = dict(_facts(losses))
    documents, losses = [document for document in documents if document.scored is None], losses.prose()
    cut = [document.cut(max(section.lengths)) for document in documents]
    windows = _windows(section, native)
    passes = {name: rescore(name, cut, windows=windows[name], known=losses) for name in passes_of(section, native)}
    defined = []
    for name, length, texts, moving in definitions_of(section, documents, tokenizer):
        if name == "yarn-truncated":
            found = replace(
                losses, losses=losses.at(length), token_bytes=losses.bytes_at(length), token_ids=losses.ids_at(length)
            )
        else:
            found = rescore(f"{name}@{length}", texts, windows=moving)
        defined.append(value(name, found, length, moving))
    asked = _asked(model, tokenizer, section, kernel, seed, facts, partial, world, progress)
    return Measured(passes, tuple(defined), *asked)


def _asked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: Evaluate,
    kernel: KernelChoice | None,
    seed: int,
    facts: Mapping[str, object],
    partial: Path | None,
    world: World,
    progress: Progress | None,
) -> tuple[NeedleResult | None, RulerResult | None]:
    if not section.needle and not section.ruler:
        return None, None
    from retrofit.evaluation.tasks.needle import depths, needle
    from retrofit.evaluation.tasks.ruler import ruler

    asked, tasks = section.needle, section.ruler
    found = (
        needle(
            model,
            tokenizer,
            haystack(asked.test),
            test=asked.test,
            lengths=asked.lengths,
            depths=depths(asked.depths),
            samples=asked.samples,
            multi_key=asked.multi_key,
            seed=seed,
            chunk=section.chunk,
            kernel=kernel,
            meta=facts,
            partial=partial / "needle" if partial else None,
            world=world,
            progress=progress,
        )
        if asked
        else None
    )
    answers = (
        ruler(
            model,
            tokenizer,
            haystack(),
            tasks=tasks.tasks,
            lengths=tasks.lengths,
            samples=tasks.samples,
            seed=seed,
            chunk=section.chunk,
            kernel=kernel,
            meta=facts,
            partial=partial / "ruler" if partial else None,
            world=world,
            progress=progress,
        )
        if tasks
        else None
    )
    return found, answers


def conclude(
    losses: TokenLosses,
    passes: Mapping[str, TokenLosses],
    section: Evaluate,
    native: int,
    *,
    needle: Mapping[int, float] | None = None,
    original: tuple[TokenLosses, Mapping[str, TokenLosses]] | None = None,
    seed: int = 0,
) -> LongContext:
    """What stored arrays say of one model. passes: those of `Measured`. needle: its scores by length. original: plain
    losses and passes of the model before it was extended, where the pass with the native context was made."""
    resamples, losses = section.resamples, losses.prose()
    original = None if original is None else (original[0].prose(), original[1])
    gains: tuple[ContextGain, ...] = ()
    within: list[ContextGain] = []
    if HALF in passes:
        how: dict[str, Any] = {"size": section.tail, "resamples": resamples, "seed": seed}
        gains = tuple(context_gains(losses, passes[HALF], native // 2, (native,), **how))
        plain, others = original or (losses, passes)
        within = [row for row in context_gains(plain, others[HALF], native // 2, (native,), **how) if row.kind == ALL]
    keyed: tuple[LongPPL, ...] = ()
    if NATIVE in passes:
        gains += tuple(
            context_gains(
                losses, passes[NATIVE], native, section.lengths, size=section.tail, resamples=resamples, seed=seed
            )
        )
    if SHORT in passes:
        keyed = tuple(long_ppl(losses, passes[SHORT], section.lengths, resamples=resamples, seed=seed))
    effective = None
    if section.context_gain or section.needle:
        effective = effective_length(
            losses,
            section.lengths,
            native,
            size=section.tail,
            original=None if original is None else (original[0], original[1][NATIVE]),
            gains=[row for row in gains if row.kind == ALL],
            needle=needle,
            within=next(iter(within), None),
            resamples=resamples,
            seed=seed,
        )
    notes: tuple[str, ...] = ()
    frequencies = losses.meta.get("frequencies")
    if isinstance(frequencies, Mapping):
        notes = (f"{frequencies['rope_type']} positions change with the length: each length was read by itself",)
    return LongContext(native, gains, keyed, effective=effective, notes=notes)


def _facts(losses: TokenLosses) -> Mapping[str, object]:
    """What the caller recorded about the model, for the other passes."""
    recorded = ("model", "tokenizer_sha256", "checkpoint", "kv_cache_dtype")
    return {key: losses.meta[key] for key in recorded if key in losses.meta}
