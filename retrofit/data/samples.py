"""The original model's own samples as text: temperature 1 from BOS, cached on disk.

Sampling needs no corpus that resembles the training data of the model. A sample file is keyed by what it depends on
(weights, tokenizer, tokens, seed), so that a second run, or a resumed one, reads the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retrofit.checkpoint.full import writing
from retrofit.checkpoint.lock import folder_lock
from retrofit.checkpoint.staging import require_writable
from retrofit.model.folder import ModelFolder, opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrofit.console import Progress

BATCH = 40
SAMPLE_TOKENS = 512
_VOCABULARY = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")


@dataclass(frozen=True)
class Teacher:
    """The original model, for the source `self`: its checkpoint folder, and how many tokens to sample from it."""

    source: str | Path | ModelFolder
    tokens: int = 20_480
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


def own_samples(teacher: Teacher, progress: Progress | None = None) -> Callable[[], Iterator[tuple[str, str]]]:
    """Documents (name, text) that the model wrote itself; sampled on first use, then read from the cache."""
    path = sample_path(teacher)
    documents = _kept(path)
    if documents is None:
        require_writable(path.parent)  # before the minutes that sampling takes
        with folder_lock(path, wait=True, progress=progress), writing(path):
            documents = _kept(path)  # another process may have written them meanwhile
            if documents is None:
                documents = _sample_texts(teacher, progress)
                partial = path.with_name(f".{path.name}.partial")
                kept = {"sha256": _digest(documents), "texts": documents}
                partial.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
                partial.replace(path)
    return lambda: ((f"sample {index}", text) for index, text in enumerate(documents, 1))


def _kept(path: Path) -> list[str] | None:
    """The samples of an earlier run; None where there are none, or where they are not what was written."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    texts = kept.get("texts") if isinstance(kept, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    return texts if kept.get("sha256") == _digest(texts) else None


def _digest(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode("ascii")).hexdigest()


def sample_path(teacher: Teacher) -> Path:
    """Where the samples of this model, token count and seed are cached."""
    from retrofit.checkpoint.provenance import digest, sha256
    from retrofit.model.cache import cache_dir

    length = sample_length(teacher.model)
    words = {file.name: sha256(file) for file in teacher.folder.glob("*") if file.name.startswith(_VOCABULARY)}
    key = json.dumps([digest(teacher.folder), words, teacher.tokens, teacher.seed, BATCH, length], sort_keys=True)
    return cache_dir() / "samples" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def sample_length(model: ModelFolder) -> int:
    """Tokens of one sample: SAMPLE_TOKENS, or the window of a model that has fewer positions."""
    return min(SAMPLE_TOKENS, model.spec.max_position_embeddings)


def _sample_texts(teacher: Teacher, progress: Progress | None) -> list[str]:
    folder = teacher.model
    model = folder.load(dtype=folder.working_dtype("auto", teacher.device), device=teacher.device)
    tokenizer = folder.tokenizer
    if progress is not None:
        progress.start("sampling the original model", teacher.tokens, "tokens")
    samples: list[str] = []
    length, done = sample_length(teacher.model), 0
    while done < teacher.tokens:
        batch_BT = sample(model, tokenizer, BATCH, length, seed=teacher.seed + len(samples))
        samples += tokenizer.batch_decode(batch_BT, skip_special_tokens=True)
        done += batch_BT.numel()
        if progress is not None:
            progress.advance(batch_BT.numel())
    if progress is not None:
        progress.finish()
    return samples


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, tokens: int, *, seed: int
) -> torch.Tensor:
    """Token ids [batch, tokens] at temperature 1 from BOS (EOS without one), the start left out.

    A sample that ends goes on after its EOS with whatever the model writes next. Draws come from a generator of
    their own.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    generator = torch.Generator(device=model.device).manual_seed(seed)
    ids_B1 = torch.full((batch, 1), 0 if start is None else start, device=model.device)
    drawn: list[torch.Tensor] = []
    cache = None
    for _ in range(tokens):
        out = model(input_ids=ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        ids_B1 = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        drawn.append(ids_B1)
    return torch.cat(drawn, dim=1).cpu()
