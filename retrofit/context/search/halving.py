"""The position encoding of a longer window, chosen by measurement: successive halving over `candidates`.

Every trial is one pass over one text: the loss of its beginning (what the window costs at short lengths), of its last
tokens (what it gives at the new length), and of the answers to questions about facts put into it. In the first rung
the middle of the text is left out while the tokens keep their positions, so that a pass of a few thousand tokens sees
the distances of the whole window (the idea of PoSE, arXiv 2309.10400, section 3.2, used to measure). It does not see
how far attention spreads over as many tokens, which is what an attention factor is for; so in the second rung all of
the text is there, but the middle is read with attention to nearby tokens only, in a third of the time. The last rung
reads it whole. A third of the budget goes to each; the best of one go on to the next, and YaRN's defaults with them.

Successive halving: Jamieson and Talwalkar 2016 (arXiv 1502.07943).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrofit.context.frequencies import yarn_attention_factor
from retrofit.context.search.candidates import Candidate, candidates, rungs
from retrofit.context.search.encoded import encoded
from retrofit.context.search.outcome import SearchResult, Trial
from retrofit.context.search.text import RungText, rung_text
from retrofit.errors import UserError
from retrofit.evaluation.scoring.reader import Reader
from retrofit.evaluation.scoring.score import reading
from retrofit.recipe.schema import Search
from retrofit.system.dealing import collected, own_share
from retrofit.system.resume import Kept
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.kernels.registry import KernelChoice

ORIGINAL = "original"


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_T: Tensor,
    *,
    section: Search,
    name: str = "",
    seed: int = 0,
    held: float = 1.0,
    kernel: KernelChoice | None = None,
    identity: Mapping[str, str] | None = None,
    partial: Path | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> SearchResult:
    """The best encoding of a window of T tokens for `model`, whose own is put back afterwards.

    ids_T: a text as long as the window, BOS included; name: what it is, for the record. held: what earlier extensions
    multiplied the queries with. partial: a folder where finished trials are kept, for the next call with the same
    question; identity: digests of the checkpoint, part of that question. The weights of the objective are not: they
    say what is made of the losses. world: the processes that make this call, each with the model; the trials of a rung
    are dealt out to them, and all find the same.

    Raises: UserError for a model without rotary positions, too small a budget, or losses that are not finite.
    """
    length = len(ids_T)
    plan = rungs(length, section.tokens_for(length))
    config = model.config
    pool = candidates(config, length=length, count=plan[0][1], portable=section.portable, seed=seed, held=held)
    native = int(config.get_text_config().max_position_embeddings)
    sha = hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()
    trials: list[Trial] = []
    baselines: list[float] = []
    tokens_read = 0
    survivors = list(pool)
    with reading(model, kernel, progress) as used:
        question = {"config": config.to_dict(), "checkpoint": identity, "text": sha, "seed": seed, "held": held}
        kept = Kept(partial, {**question, "dtype": str(model.dtype), "kernel": used}, world)
        for rung, (size, count) in enumerate(plan, start=1):
            survivors = _advance_to(survivors, trials, min(count, len(pool)), yarn_attention_factor(length / native))
            text = rung_text(tokenizer, ids_T, rung, plan, native, seed)
            at = _Rung(model, tokenizer, text, rung, native, section, kept, world)
            baselines.append(world.only(at.original))
            tokens_read += len(at.beginning.ids_T) + len(survivors) * text.tokens_read
            trials += at.trials(survivors, baselines[-1], f"search {rung} of {len(plan)}", size, progress)
    if progress:
        progress.finish()
    last = {trial.label: trial for trial in trials if trial.rung == len(plan)}
    winner = min(last.values(), key=lambda trial: trial.objective)
    chosen = next(candidate for candidate in survivors if candidate.label == winner.label)
    read = sum(trial.tokens for trial in trials)
    return SearchResult(
        method=chosen.method,
        settings=chosen.settings,
        trials=tuple(trials),
        winner=winner,
        reference=last[pool[0].label],
        native=baselines[-1],
        read=read,
        tokens_read=tokens_read,
        text=name,
        baselines=tuple(baselines),
    )


def _advance_to(survivors: Sequence[Candidate], trials: Sequence[Trial], count: int, own: float) -> list[Candidate]:
    """The `count` best of the rung before; the first candidate, the reference, is always among them.

    What an attention factor is worth does not show in passes over so few tokens as the first rung's. After it go on:
    yarn's encoding with gentler factors; then of small, middling, large and published factors the best of each in turn.
    own: yarn's factor.
    """
    if not trials:
        return list(survivors)
    objective = {trial.label: trial.objective for trial in trials if trial.rung == trials[-1].rung}
    ranked = sorted(survivors[1:], key=lambda candidate: objective[candidate.label])
    if trials[-1].rung == 1:
        kinds: dict[int, int] = {}

        def turn(candidate: Candidate) -> int:
            """The how manyth of its kind it is."""
            factor = candidate.settings.attention_factor
            kind = 0 if factor is None else 1 + int((factor - 1) // max((own - 1) / 2, 1e-9))
            kinds[kind] = kinds.get(kind, 0) + 1
            return kinds[kind]

        ranked = sorted(ranked, key=lambda candidate: 0 if candidate.gentler else turn(candidate))
    return [survivors[0], *ranked[: count - 1]]


@dataclass
class _Rung:
    """One rung: every trial of it reads the same text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: RungText
    number: int
    native: int
    section: Search
    kept: Kept
    world: World = ALONE

    @property
    def beginning(self) -> RungText:
        """What of the text the unextended model reads: up to its window."""
        text = self.text
        stop = min(text.cut or len(text.ids_T), self.native)
        return RungText(text.ids_T[:stop], stop, 1, text.text_T[: stop - 1], ())

    def original(self) -> float:
        """Native loss of the model as it is, on the beginning of the text."""
        found = self.kept.get(self._name(ORIGINAL))
        return float((self._finished(ORIGINAL, self._read(self.beginning)) if found is None else found)[0])

    def trials(
        self, candidates: Sequence[Candidate], baseline: float, task: str, tokens: int, progress: Progress | None
    ) -> list[Trial]:
        """One pass with the encoding of each candidate. task, tokens: the name of the progress, which is that
        of this process, and what each pass counts as."""
        found = self.kept.arrays(self._name(candidate.label) for candidate in candidates)
        left = {i: 1.0 for i, candidate in enumerate(candidates) if self._name(candidate.label) not in found}
        own = own_share(left, self.world)
        if progress:
            progress.start(task, (len(found) + len(own)) * tokens, "tokens")
            progress.advance(len(found) * tokens)
        read: dict[str, np.ndarray] = {}
        for candidate in (candidates[i] for i in own):
            with encoded(self.model, candidate.config, candidate.query_scale):
                losses = self._finished(candidate.label, self._read(self.text))
            read[self._name(candidate.label)] = losses
            if progress:
                objective = self._trial(candidate, losses, baseline).objective
                progress.advance(tokens, encoding=candidate.label, objective=objective)
        found |= collected(read, self.world)
        return [self._trial(candidate, found[self._name(candidate.label)], baseline) for candidate in candidates]

    def _trial(self, candidate: Candidate, losses: np.ndarray, baseline: float) -> Trial:
        """losses: (native, tail, needle)."""
        section, text = self.section, self.text
        native, tail, needle = (float(value) for value in losses)
        excess = native - baseline
        return Trial(
            rung=self.number,
            label=candidate.label,
            method=candidate.method,
            settings={name: value for name, value in candidate.settings.model_dump().items() if value is not None},
            tokens=text.cost,
            native=native,
            excess=excess,
            tail=tail,
            needle=needle,
            objective=tail + section.needle_weight * needle + section.native_weight * max(0.0, excess),
        )

    def _name(self, label: str) -> str:
        """What the losses of an encoding are kept under."""
        return hashlib.sha256(f"{self.number} {label}".encode()).hexdigest()[:16]

    def _finished(self, label: str, losses: np.ndarray) -> np.ndarray:
        """The losses, which are kept. Raises UserError for some that are not finite."""
        if not np.isfinite(losses).all():
            raise UserError(
                "the loss is not a finite number",
                where=f"the encoding {label}",
                fix="check the weights for NaN or infinity (retrofit inspect), or run in float32",
            )
        self.kept.put(self._name(label), losses)
        return losses

    def _read(self, text: RungText) -> np.ndarray:
        """(native, tail, needle loss) of one pass; the last is 0 without questions."""
        ids_T = text.ids_T.to(self.model.device)
        following_T = torch.cat([ids_T[1:], ids_T[:1]])  # after the last token anything will do
        room = max((len(question) + len(answer) for question, answer in text.questions), default=0)
        reader = Reader(self.model, len(ids_T) + room)

        def read(begin: int, stop: int) -> list[Tensor]:
            return [found for _, found in reader.predicted(ids_T[begin:stop], following_T[begin:stop])]

        losses = read(0, text.cut)
        if text.near:
            with reader.nearby(text.near):
                losses += read(text.cut, text.resume)
        if text.skip:
            reader.skip(text.skip)
        losses_T = torch.cat([*losses, *read(text.resume, len(ids_T))])[:-1]
        first = min(self.native, text.cut or self.native)
        beginning = losses_T[:first][text.text_T[:first]]
        end = losses_T[-text.tail :][text.text_T[-text.tail :]]
        answers = [_answer_loss(reader, *question) for question in text.questions]
        return np.array([float(beginning.mean()), float(end.mean()), float(np.mean(answers)) if answers else 0.0])


def _answer_loss(reader: Reader, question_T: Tensor, answer_T: Tensor) -> float:
    """Nats per token of the answer; the reader is back where it was."""
    before = reader.mark()
    reader.read(question_T.to(reader.model.device))
    loss = float(reader.losses(answer_T.to(reader.model.device)).mean())
    reader.rewind(before)
    return loss
