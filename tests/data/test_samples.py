"""The model's own samples: seeded, cached batch by batch, resumed, the same from any number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retrofit.data import samples
from retrofit.data.identity import identity, require_distinct
from retrofit.data.prompts import choose_prompts, first_lines, read_prompts
from retrofit.data.samples import OwnSamples, Teacher, start_of
from retrofit.data.texts import check_sources, read_texts
from retrofit.errors import UserError
from retrofit.recipe.schema import TextSource
from retrofit.system.world import World
from tests.ranks import on_ranks
from tests.tiny import BOS_ID, save_tiny, tiny_tokenizer

TOKENS, LENGTH = 24 * 10, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("own") / "model", "llama")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four samples of 24 tokens, in a cache of the test's own."""
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    shrink(monkeypatch.setattr)


def shrink(replace: Any) -> None:
    replace(samples, "SAMPLE_TOKENS", LENGTH)
    replace(samples, "sampled_sequences", lambda *_: 4)


def own(**settings: Any) -> TextSource:
    return TextSource.model_validate({"source": "self", **settings})


def written(folder: Path, side: str = "train", **settings: Any) -> OwnSamples:
    found = OwnSamples(Teacher(folder, tokens=TOKENS, held_out=3 * LENGTH), own(**settings), side)  # type: ignore[arg-type]
    found.write()
    return found


def files(found: OwnSamples) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(found.folder.iterdir())}


def test_samples_are_seeded_and_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(folder, tokens=TOKENS)
    read = list(read_texts(own(), split="train", teacher=teacher))
    assert len(read) == 10
    assert len({text.text for text in read}) == 10
    monkeypatch.setattr(samples, "_Sampler", None)  # a second call would fail
    assert list(read_texts(own(), split="train", teacher=teacher)) == read
    other = OwnSamples(Teacher(folder, tokens=TOKENS, seed=1), own(), "train")
    assert other.folder != OwnSamples(teacher, own(), "train").folder
    with pytest.raises(UserError, match="original model"):
        check_sources([own()], teacher=False)


def test_what_is_trained_on_and_what_is_measured_share_no_sample(folder: Path) -> None:
    train, held_out = written(folder), written(folder, "held_out")
    assert train.folder != held_out.folder
    assert len(held_out._kept()) == 3
    assert not {tuple(ids) for ids in train._kept()} & {tuple(ids) for ids in held_out._kept()}
    both = [text.name for text in read_texts(own(), split="all", teacher=train.teacher)]
    assert len(set(both)) == 13


def test_more_samples_go_on_where_fewer_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = OwnSamples(Teacher(folder, tokens=8 * LENGTH), own(prompts=["python-docs"]), "train")
    few.write()
    before = files(few)
    more = written(folder, prompts=["python-docs"])
    assert more.folder == few.folder
    assert files(more) == {**before, "00000008.json": files(more)["00000008.json"]}
    assert len(list(more.documents())) == 10
    assert len(list(few.documents())) == 8


def test_a_killed_run_is_resumed_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(written(folder, temperature=0.8, top_p=0.9))
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "killed"))
    sample = samples._Sampler.sample

    def killed(self: Any, first: int, behind: int) -> list[list[int]]:
        if first == 8:
            raise KeyboardInterrupt
        return sample(self, first, behind)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(samples._Sampler, "sample", killed)
        written(folder, temperature=0.8, top_p=0.9)
    half = OwnSamples(Teacher(folder, tokens=TOKENS), own(temperature=0.8, top_p=0.9), "train")
    assert half.missing() == [(8, 10)]
    assert files(written(folder, temperature=0.8, top_p=0.9)) == whole


def test_what_is_not_as_it_was_written_is_sampled_again(folder: Path) -> None:
    found = written(folder)
    whole = files(found)
    first = json.loads(whole["00000000.json"])
    changed = json.dumps({**first, "ids": [first["ids"][0][::-1], *first["ids"][1:]]})
    for damaged in ("", "[", "{}", "[1]", "[]", "[" * 100_000, '{"sha256": "0", "ids": [[1]]}', changed):
        (found.folder / "00000000.json").write_text(damaged)
        assert not found.complete
        found.write()
        assert files(found) == whole


def sample_together(world: World, folder: Path, cache: Path) -> dict[str, bytes]:
    import os

    os.environ["RETROFIT_CACHE"] = str(cache)
    shrink(setattr)
    found = OwnSamples(Teacher(folder, tokens=TOKENS), own(prompts=["python-docs"]), "train")
    found.write(world)
    world.wait()
    return files(found)


def test_several_processes_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    alone = files(written(folder, prompts=["python-docs"]))
    for found in on_ranks(tmp_path, 2, sample_together, folder, tmp_path / "together"):
        assert found == alone


def test_samples_are_of_one_tokenizer_dtype_and_setting(folder: Path, tmp_path: Path) -> None:
    every = [own(), own(temperature=0.5), own(top_p=0.5), own(prompts=["python-docs"])]
    every += [own(prompts=["python-docs"], prompt_share=0.9), own(prompts=["python-stdlib"])]
    assert len({OwnSamples(Teacher(folder), one, "train").folder for one in every}) == len(every)
    copy = save_tiny(tmp_path / "model", "llama")
    before = OwnSamples(Teacher(copy), own(), "train").folder
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": None}, indent=1))
    assert OwnSamples(Teacher(copy), own(), "train").folder != before
    assert len({json.dumps(identity([one])) for one in every}) == len(every)
    with pytest.raises(UserError, match="both called `self`"):
        require_distinct(every[:2], "recover.text")


def test_samples_begin_with_prompts_by_share(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One two three four\n")
    source = own(prompts=[str(tmp_path / "a.txt")], prompt_share=0.5, tokens=LENGTH * 40)
    found = OwnSamples(Teacher(folder, tokens=TOKENS), source, "train")
    found.write()
    texts = [text for _, text in found.documents()]
    assert len(texts) == 40
    assert 10 <= sum(text.startswith("One two three four") for text in texts) <= 30
    every = source.model_copy(update={"prompt_share": 1.0, "tokens": LENGTH * 4})
    alone = OwnSamples(Teacher(folder), every, "train")
    alone.write()
    assert all(text.startswith("One two three four") for _, text in alone.documents())
    held_out = OwnSamples(Teacher(folder, held_out=LENGTH), every, "held_out")  # nothing of one document is held out
    held_out.write()
    assert not next(held_out.documents())[1].startswith("One two")


def test_prompts_are_first_lines_of_texts_and_paragraphs() -> None:
    text = (
        "A title of a text\n====\nmore of it in here\n\n\nOnce there was a paragraph\nand\n\nshort\n\n" + "word " * 60
    )
    lines = list(first_lines(text))
    assert lines[:2] == ["A title of a text", "Once there was a paragraph"]
    assert lines[2] == " ".join(["word"] * 32)
    assert len(lines) == 3


def test_prompts_come_by_weight_and_begin_alike_whatever_their_number(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} line number {index}" for index in range(5)))
    weighted = [{"source": str(tmp_path / "a.txt"), "weight": 3}, {"source": str(tmp_path / "b.txt")}]
    sources = own(prompts=weighted).prompts
    prompts = read_prompts(sources, "train", tiny_tokenizer())
    many = choose_prompts(prompts, count=400, seed="0")
    assert choose_prompts(prompts, count=7, seed="0") == many[:7]
    assert choose_prompts(prompts, count=7, seed="1") != many[:7]
    assert 260 <= sum(prompt.startswith("a") for prompt in many) <= 340
    assert set(many) == {f"{name} line number {index}" for name in "ab" for index in range(5)}
    assert read_prompts(sources, "held_out", tiny_tokenizer()) == {}
    assert choose_prompts({}, count=7, seed="0") == ()


def test_openings_are_prompts_without_any_text_of_the_users() -> None:
    sources = own(prompts=["openings"]).prompts
    ((_, train),) = read_prompts(sources, "train", tiny_tokenizer()).items()
    ((_, held_out),) = read_prompts(sources, "held_out", tiny_tokenizer()).items()
    assert train
    assert held_out
    assert not {*train} & {*held_out}
    assert check_sources([own(prompts=["openings"])]) == ()
    assert identity([own(prompts=["openings"])]) != identity([own()])


def test_dialogues_give_the_users_first_question_and_the_start_of_an_answer(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "A test."), ("user", "Why?")]
    every = [*turns, ("assistant", "So.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in some]} for some in (every, turns[2:3])]
    rows.append({"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "No."}]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    tokenizer = tiny_tokenizer(chat_template=True)
    ((_, prompts),) = read_prompts(own(prompts=[str(tmp_path / "a.jsonl")]).prompts, "train", tokenizer).items()
    asked = [{"role": role, "content": text} for role, text in turns[:2]]
    assert prompts == [tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)]
    assert start_of(tokenizer, prompts[0])[1:] == tokenizer(prompts[0], add_special_tokens=False)["input_ids"]


def test_text_without_a_prompt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    with pytest.raises(UserError, match="nothing of it can be a prompt"):
        read_prompts(own(prompts=[str(tmp_path / "a.txt")]).prompts, "train", tiny_tokenizer())
    with pytest.raises(UserError, match="no such"):
        check_sources([own(prompts=[str(tmp_path / "none.txt")])])


def test_a_sample_starts_with_one_bos() -> None:
    tokenizer = tiny_tokenizer()
    assert start_of(tokenizer, "") == [BOS_ID]
    plain = start_of(tokenizer, "ab")
    assert plain[0] == BOS_ID
    assert start_of(tokenizer, tokenizer.bos_token + "ab") == plain


def test_samples_stay_inside_a_small_window(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "gpt_bigcode", max_position_embeddings=16)  # learned positions
    assert Teacher(model).length == 16
    assert len(list(read_texts(own(tokens=256), split="train", teacher=Teacher(model)))) <= 16
