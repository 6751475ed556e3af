"""The original model's own samples as text: from BOS or from prompts, cached on disk batch by batch.

Sampling needs no corpus that resembles the training data of the model. A folder of samples is named by what they depend
on (weights, tokenizer, seed, side, settings, prompts), not by how many there are: it is a beginning of one endless
text, which a run that is resumed, or that asks for more, goes on with. The training and the held-out side have random
numbers of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.staging import require_writable
from retrofit.data.prompts import Prompts, choose_prompts, read_prompts
from retrofit.model.folder import ModelFolder, opened
from retrofit.model.load import product_dtype
from retrofit.recipe.schema import TextSource
from retrofit.recipe.values import PromptSource
from retrofit.system.device import sampled_sequences
from retrofit.system.world import ALONE, World

if TYPE_CHECKING:
    from typing import Literal

    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress

    Side = Literal["train", "held_out"]

VERSION = 2  # raise it when the same key would give other text
SAMPLE_TOKENS = 512
_VOCABULARY = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")


@dataclass(frozen=True)
class Teacher:
    """The original model, for the source `self`: its checkpoint folder, and how many tokens to sample from it.

    tokens: to train on, where the source does not say; held_out: to measure with.
    """

    source: str | Path | ModelFolder
    tokens: int = 20_480
    held_out: int = 4_096
    seed: int = 0
    device: str = "cpu"

    @cached_property
    def model(self) -> ModelFolder:
        """The folder, opened."""
        return opened(self.source)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.model.path

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of its weights, and of the files of its tokenizer, by name."""
        from retrofit.checkpoint.provenance import digest, sha256

        words = {file.name: sha256(file) for file in self.folder.glob("*") if file.name.startswith(_VOCABULARY)}
        return {**digest(self.folder), **words}

    @cached_property
    def prompts(self) -> dict[tuple[tuple[PromptSource, ...], str], Prompts]:
        """Those that have been read, by what names them and side."""
        return {}

    @property
    def length(self) -> int:
        """Tokens of one sample: SAMPLE_TOKENS, or the window of a model that has fewer positions."""
        return min(SAMPLE_TOKENS, self.model.spec.max_position_embeddings)

    @property
    def dtype(self) -> str:
        """What it samples in: bfloat16 where the device has products of it, as in training."""
        return "bfloat16" if product_dtype(self.device) else self.model.working_dtype("auto", self.device)


@dataclass(frozen=True)
class OwnSamples:
    """One side of what the original model writes for a source `self`."""

    teacher: Teacher
    source: TextSource
    side: Side

    @property
    def count(self) -> int:
        """Samples that are wanted."""
        teacher = self.teacher
        tokens = (self.source.tokens or teacher.tokens) if self.side == "train" else teacher.held_out
        return -(-tokens // teacher.length)

    @cached_property
    def batch(self) -> int:
        """Samples that are written together."""
        teacher = self.teacher
        value = 2 if teacher.dtype in ("bfloat16", "float16") else 4
        return sampled_sequences(teacher.device, teacher.model.spec, teacher.length, value)

    @cached_property
    def folder(self) -> Path:
        """Where they are cached."""
        teacher, source = self.teacher, self.source
        settings: list[Any] = [teacher.seed, self.side, teacher.length, teacher.dtype, self.batch]
        settings += [source.temperature, source.top_p, source.prompt_share if source.prompts else 0]
        prompts = [[prompt.weight, list(found)] for prompt, found in self.prompts.items()]
        key = json.dumps([VERSION, teacher.digests, settings, prompts], sort_keys=True)
        return samples_folder() / hashlib.sha256(key.encode()).hexdigest()[:32]

    @property
    def prompts(self) -> Prompts:
        """What samples begin with, by source."""
        known, key = self.teacher.prompts, (self.source.prompts, self.side)
        if key not in known:
            known[key] = read_prompts(self.source.prompts, self.side, self.teacher.model.tokenizer)
        return known[key]

    @property
    def complete(self) -> bool:
        """Whether all that are wanted have been written."""
        return not self.missing()

    def missing(self) -> list[tuple[int, int]]:
        """(first, behind the last) of the batches that are still to be written, in order."""
        have = len(self._kept())
        return [(start, min(start + self.batch, self.count)) for start in range(have, self.count, self.batch)]

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each sample; all have been written. Special tokens are spelled."""
        tokenizer = self.teacher.model.tokenizer
        for number, ids in enumerate(self._kept()[: self.count], 1):
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            yield f"{self.side.replace('_', '-')} sample {number}", text

    def write(self, world: World = ALONE, progress: Progress | None = None) -> None:
        """Sample what is missing; every process of `world` its share of the batches, all of which call this.

        Rank 0 writes a batch when it is finished, so that a run that was killed loses one for each process.
        """
        with ExitStack() as stack:

            def plan() -> tuple[list[tuple[int, int]], tuple[str, ...]]:
                if self.complete:
                    return [], ()
                require_writable(self.folder.parent)  # before the minutes that sampling takes
                stack.enter_context(folder_lock(self.folder, wait=True, progress=progress))
                missing = self.missing()  # another process may have written them meanwhile
                seed = f"{self.teacher.seed} {self.side}"
                return missing, choose_prompts(self.prompts, count=self.count, seed=seed) if missing else ()

            missing, prompts = world.only(plan)
            if not missing:
                return
            sampler = _Sampler(self, prompts, progress if world.main else None, missing, world.size)
            for first in range(0, len(missing), world.size):
                turn = missing[first : first + world.size]
                mine = sampler.sample(*turn[world.rank]) if world.rank < len(turn) else []
                for batch, ids in zip(turn, world.gather(mine), strict=False):
                    if world.main:
                        self._keep(batch[0], ids)
            if progress is not None and world.main:
                progress.finish()

    def _keep(self, first: int, ids: list[list[int]]) -> None:
        path = self.folder / f"{first:08}.json"
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"sha256": _digest(ids), "ids": ids}), encoding="utf-8")
            partial.replace(path)

    def _kept(self) -> list[list[int]]:
        """The samples from the first one on that are there as they were written."""
        found: list[list[int]] = []
        while (path := self.folder / f"{len(found):08}.json").is_file():
            batch = _read(path)
            if not batch:
                break
            found += batch
        return found


def samples_folder() -> Path:
    """Where the samples of all models are cached."""
    from retrofit.model.cache import cache_dir

    return cache_dir() / "samples"


class _Sampler:
    """The model of one process, loaded when its first batch is sampled."""

    def __init__(
        self,
        samples: OwnSamples,
        prompts: Sequence[str],
        progress: Progress | None,
        missing: Sequence[tuple[int, int]],
        processes: int,
    ) -> None:
        self.samples, self.prompts, self.progress, self.processes = samples, prompts, progress, processes
        if progress is not None:
            total = (missing[-1][1] - missing[0][0]) * samples.teacher.length
            progress.start("sampling the original model", total, "tokens")

    @cached_property
    def model(self) -> Any:
        teacher = self.samples.teacher
        return teacher.model.load(dtype=teacher.dtype, device=teacher.device)

    def sample(self, first: int, behind: int) -> list[list[int]]:
        """Token ids of the samples [first, behind)."""
        import torch

        from retrofit.data.sampling import random_numbers, sample_batch

        samples, length = self.samples, self.samples.teacher.length
        seed, side, source = samples.teacher.seed, samples.side, samples.source
        starts, numbers = [], []
        for index in range(first, behind):
            choice, *uniform = random_numbers(f"{seed} {side} {index}", 1 + length).split([1, length])
            prompted = bool(self.prompts) and float(choice) < source.prompt_share
            starts.append(start_of(samples.teacher.model.tokenizer, self.prompts[index] if prompted else ""))
            numbers += uniform
        ids_BT = sample_batch(
            self.model,
            samples.teacher.model.spec,
            starts,
            torch.stack(numbers),
            temperature=source.temperature,
            top_p=source.top_p,
            stepped=self._stepped,
            note=None if self.progress is None else self.progress.note,
        )
        return ids_BT.tolist()

    def _stepped(self, rows: int) -> None:
        if self.progress is not None:
            self.progress.advance(rows * self.processes)


def start_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids that a sample begins with: BOS (EOS without one, else the first token), then the prompt."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = 0 if first is None else first
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] if prompt else []
    return ids if ids[:1] == [start] else [start, *ids]


def _read(path: Path) -> list[list[int]]:
    """A batch; empty where it is not what was written."""
    try:
        kept = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return []
    ids = kept.get("ids") if isinstance(kept, dict) else None
    if not isinstance(ids, list) or kept.get("sha256") != _digest(ids):
        return []
    return ids


def _digest(ids: object) -> str:
    return hashlib.sha256(json.dumps(ids).encode("ascii")).hexdigest()
