"""`--definition lm-eval` beside lm-evaluation-harness itself: its windows, its log-likelihoods, its own tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from retrofit.data.documents import make_documents
from retrofit.evaluation.metrics.protocols import prepared, value
from retrofit.evaluation.scoring.score import score
from retrofit.evaluation.scoring.windows import rolling
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`; `make test-eval` installs it)")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

TEXTS = (
    "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3,
    "Grüße, 世界: it is a far, far better thing that I do, than I have ever done.",
)


def theirs(folder: Path, length: int, texts: tuple[str, ...] = TEXTS, **over: object) -> tuple[HFLM, list[float]]:
    """(the harness on a folder that it loads itself, its rolling log-likelihoods)."""
    harness = HFLM(pretrained=str(folder), dtype="float32", max_length=length, batch_size=1, device="cpu", **over)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return harness, harness.loglikelihood_rolling(requests, disable_tqdm=True)


def ours(folder: Path, length: int, texts: tuple[str, ...] = TEXTS) -> list:
    from retrofit.model.load import load_model, load_tokenizer

    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    bos, found = tokenizer.bos_token_id is not None, []
    for i, text in enumerate(texts):
        docs = make_documents([(str(i), "k", text)], tokenizer, length=None, count=1)
        docs, windows = prepared("lm-eval", docs, length, bos=bos, prefix_id=tokenizer.eos_token_id)
        found.append(value("lm-eval", score(model, docs, windows=windows, chunk=16), length, windows))
    return found


def require_same(own: list, other: list[float], texts: tuple[str, ...] = TEXTS) -> None:
    for mine, their, text in zip(own, other, texts, strict=True):
        assert mine.log_likelihood == pytest.approx(their, rel=1e-6, abs=1e-3)
        assert mine.bits_per_byte == pytest.approx(-their / len(text.encode()) / math.log(2), abs=1e-5)
        assert mine.ppl == pytest.approx(math.exp(-their / mine.tokens), rel=1e-5)


@pytest.mark.parametrize("length", [2, 7, 16, 64])
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 8, 15, 16, 17, 32, 33, 63, 64, 65, 200])
def test_its_windows_are_ours(tokens: int, length: int) -> None:
    """What is read and what is predicted, window by window."""
    ids = list(range(1, tokens + 1))
    wanted = []
    for pair in get_rolling_token_windows(ids, 0, length, 1):
        context, predicted = make_disjoint_window(pair)
        wanted.append(([*context, *predicted][:-1], predicted))
    document = [0, *ids]
    found = [
        (document[span.begin : span.stop - 1], document[span.first : span.stop])
        for span in rolling(length).spans(len(document))
    ]
    assert found == wanted


@pytest.mark.parametrize("length", [32, 64, 512])
def test_log_likelihoods_of_a_saved_model(length: int, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    require_same(ours(folder, length), theirs(folder, length)[1])


def test_without_a_bos_the_eos_stands_in_front(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    harness, other = theirs(tmp_path, 32)
    assert harness.prefix_token_id == tokenizer.eos_token_id
    require_same(ours(tmp_path, 32), other)


def test_a_tokenizer_that_adds_a_bos_by_itself(tmp_path: Path) -> None:
    """`add_bos_token=False` gives the one BOS of the definition; otherwise the harness predicts a second one."""
    folder = save_tiny(tmp_path / "tiny", add_bos=True)
    require_same(ours(folder, 32), theirs(folder, 32, add_bos_token=False)[1])
    twice = ours(folder, 32, tuple("<s>" + text for text in TEXTS))
    for mine, their in zip(twice, theirs(folder, 32)[1], strict=True):
        assert mine.log_likelihood == pytest.approx(their, rel=1e-6, abs=1e-3)


def test_what_we_write_is_a_stock_model_to_it_and_its_tasks_run(tmp_path: Path) -> None:
    """A converted folder with a longer window, through a task of its own; byte perplexity is 2^(our bits per byte)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import retrofit

    retrofit.convert(save_tiny(tmp_path / "tiny"), kv_heads=1, method="mean", out=tmp_path / "mqa")
    retrofit.extend(tmp_path / "mqa", length=1024, method="yarn", out=tmp_path / "long")
    text = TEXTS[0] * 4
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "task.yaml").write_text(
        f"task: own_text\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'text.jsonl'}}}}}\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    harness = HFLM(pretrained=str(tmp_path / "long"), dtype="float32", batch_size=1, device="cpu")
    assert harness.max_length == 1024
    assert harness.config.num_key_value_heads == 1
    found = simple_evaluate(
        harness, tasks=["own_text"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    (own,) = ours(tmp_path / "long", 1024, (text,))
    assert found["results"]["own_text"]["bits_per_byte,none"] == pytest.approx(own.bits_per_byte, abs=1e-5)
    assert found["results"]["own_text"]["byte_perplexity,none"] == pytest.approx(2**own.bits_per_byte, rel=1e-5)


@pytest.mark.slow
def test_the_embedded_model_in_float32() -> None:
    from retrofit.data.corpora import built_in_texts
    from retrofit.model.source import resolve

    torch.set_num_threads(1)
    (held_out,) = built_in_texts("python-docs", "held_out")
    folder, texts = resolve("embedded").folder, (held_out.text[:6000],)
    require_same(ours(folder, 512, texts), theirs(folder, 512, texts)[1], texts)
