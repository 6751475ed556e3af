"""One step of TRL's trainer with peft's LoRA on a folder of ours, merged and saved: what somebody's fine-tune gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed (extra `downstream`; `make test-downstream` installs it)")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after a step of supervised fine-tuning, merged and saved as the two libraries document it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    place = tmp_path_factory.mktemp("tuned")
    rows = [{"text": f"Number {i} follows number {i - 1}."} for i in range(4)]
    settings = SFTConfig(
        output_dir=str(place / "work"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SFTTrainer(
        model=str(folder),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(place / "merged")
    trainer.processing_class.save_pretrained(place / "merged")
    return place / "merged"


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(1000)[None] % 256
    with torch.no_grad():
        return model(ids).logits


def test_a_fine_tune_trains_merges_and_loads(folder: Path, tuned: Path) -> None:
    """The step changed the weights, and little else: the position encoding is the same."""
    before, after = logits(folder), logits(tuned)
    assert not torch.equal(before, after)
    assert (before - after).abs().mean() < 0.2 * before.abs().mean()


def test_its_window_and_base_are_those_of_the_folder(folder: Path, tuned: Path) -> None:
    from transformers import AutoConfig

    ours, theirs = (AutoConfig.from_pretrained(place) for place in (folder, tuned))
    assert theirs.rope_parameters == ours.rope_parameters
    assert theirs.max_position_embeddings == ours.max_position_embeddings
