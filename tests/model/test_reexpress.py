"""Re-expressions: the same logits in stock transformers, with and without a cache, then fewer KV heads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from retrofit.checkpoint.read import Checkpoint
from retrofit.errors import UserError
from retrofit.kernels.registry import KernelChoice, using
from retrofit.kv_heads.convert import CalibrationText, convert
from retrofit.model.families import KNOWN, describe, family_of
from retrofit.model.families.refused import OPTIONAL, REEXPRESSED
from retrofit.model.load import load_config
from retrofit.model.reexpress import granite_swa, reexpression_of
from retrofit.model.reexpress.base import partial_factor
from retrofit.model.source import resolve
from tests.model.reexpressed import (
    CASES,
    GPT,
    NEOX,
    OPT,
    cached_logits,
    cases,
    firsts,
    ids,
    load,
    reexpress,
    rope_of,
    save,
)


@cases
def test_the_logits_are_the_same_with_and_without_a_cache(
    source: str, target: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "source", source, fields)
    report = reexpress(folder, tmp_path / "out", target=target)
    assert (report.source, report.target, report.dtype) == (source, target, "float32")
    before, after = load(folder), load(tmp_path / "out")
    assert type(after).__module__.split(".")[-2] == target
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings
    with torch.no_grad():
        want, got = before(ids()).logits, after(ids()).logits
    assert float((got - want).abs().max()) < 1e-5
    assert float((cached_logits(after, ids(), 30) - want).abs().max()) < 1e-5
    generated = [m.generate(ids(8), max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (before, after)]
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    ("source", "target", "fields"),
    [case for case in CASES if case[1] in granite_swa.TARGETS and case[0] != "mixtral"],
)
def test_granite_swa_computes_the_same_bits(source: str, target: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Multipliers of 1 and sinks at -1e4 round nothing, with and without a cache; `blockwise` agrees with both. (Not
    of Mixtral, which takes the softmax over all experts and divides it by the sum over the chosen ones.)"""
    folder = save(tmp_path / "source", source, fields)
    reexpress(folder, tmp_path / "out", target=target)
    before, after = load(folder), load(tmp_path / "out")
    with torch.no_grad():
        want = before(ids()).logits
        assert torch.equal(after(ids()).logits, want)
        assert torch.equal(cached_logits(after, ids(), 30), cached_logits(before, ids(), 30))
        with using(after, KernelChoice("blockwise", "blockwise", "test")):
            assert float((after(ids()).logits - want).abs().max()) < 1e-5
    windows = [layer.window for layer in describe(after.config).layers]
    assert windows == [layer.window for layer in describe(before.config).layers]


@firsts
def test_nothing_but_rounding_separates_the_two(
    source: str, target: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """In float64 the difference falls with the precision: what is left in float32 is no approximation."""
    folder = save(tmp_path / "source", source, fields)
    doubled = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(doubled, folder / "model.safetensors", metadata={"format": "pt"})
    reexpress(folder, tmp_path / "out", target=target)
    before, after = load(folder, torch.float64), load(tmp_path / "out", torch.float64)
    with torch.no_grad():
        # Softmax, routers and GPT-J's scores stay in float32 in transformers' classes.
        want, got = before(ids()).logits, after(ids()).logits
        assert float((got - want).abs().max()) < 1e-6 * max(1.0, float(want.abs().max()))


def test_a_mixtral_in_bfloat16_moves_by_less_than_bfloat16_moves_it(tmp_path: Path) -> None:
    """Its class multiplies experts by weights in float32, the target's by weights that are rounded."""
    _, target, fields = next(case for case in CASES if case[0] == "mixtral")
    folder = save(tmp_path / "source", "mixtral", fields)
    reexpress(folder, tmp_path / "out", target=target)
    with torch.no_grad():
        exact, before = (load(folder, dtype)(ids()).logits.float() for dtype in (torch.float32, torch.bfloat16))
        after = load(tmp_path / "out", torch.bfloat16)(ids()).logits.float()
    assert float((after - before).square().mean()) < 0.5 * float((before - exact).square().mean())


@firsts
def test_every_norm_and_bias_counts(source: str, target: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """A change of any stored tensor of the first layer reaches the re-expressed checkpoint."""
    folder = save(tmp_path / "source", source, fields)
    reexpress(folder, tmp_path / "plain", target=target)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    for i, name in enumerate(sorted(name for name in stored if ".0." in name)):
        save_file({**stored, name: stored[name] * 1.5}, folder / "model.safetensors", metadata={"format": "pt"})
        reexpress(folder, tmp_path / str(i), target=target)
        other = load_file(tmp_path / str(i) / "model.safetensors")
        assert any(not torch.equal(plain[one], other[one]) for one in plain), name


@firsts
def test_the_result_converts_to_every_possible_number_of_heads(
    source: str, target: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "source", source, fields)
    reexpress(folder, tmp_path / "out", target=target)
    config = load_config(tmp_path / "out")
    possible = [c.kv_heads for c in family_of(config).conversions(describe(config)) if c.possible]
    assert possible == ([1, 4] if target == "gpt_bigcode" else [1, 2, 4])
    text = CalibrationText(torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(2)), tuple("ab" * 4))
    with torch.no_grad():
        want = load(folder)(ids()).logits
    for kv_heads in possible:
        converted = tmp_path / f"kv{kv_heads}"
        converted.mkdir()
        convert(tmp_path / "out", converted, kv_heads=kv_heads, text=text)
        model = load(converted)
        assert describe(model.config).layers[0].kv_heads == kv_heads
        generated = model.generate(ids(8), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        with torch.no_grad():
            whole, got = model(generated[:, :-1]).logits[:, 7:].argmax(-1), model(ids()).logits
        assert torch.equal(generated[:, 8:], whole), "decoding with a cache agrees with one pass"
        close = torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
        assert close == (kv_heads == 4)


def test_shards_and_narrow_dtypes(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", *_case("gpt_neox"), dtype="bfloat16", shard="40KB")
    assert len(Checkpoint.open(folder).shards) > 1
    report = reexpress(folder, tmp_path / "out", max_shard_size="60KB")
    written = Checkpoint.open(tmp_path / "out")
    assert len(written.shards) > 1
    assert {written.dtype(name) for name in written.names} == {torch.bfloat16}
    assert any("rounded to bfloat16" in note for note in report.notes)
    reexpress(folder, tmp_path / "wide", dtype="float32")
    want = load(folder)(ids()).logits
    narrow, wide = (float((load(tmp_path / name)(ids()).logits - want).abs().max()) for name in ("out", "wide"))
    assert wide < 1e-5 * float(want.abs().max()) < narrow < 0.1 * float(want.abs().max())


@pytest.mark.parametrize(
    ("source", "rename", "extra"),
    [
        ("gpt_neox", {"lm_head.": "embed_out."}, {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,)}),
        ("gpt2", {"transformer.": ""}, {"h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.masked_bias": ()}),
        ("opt", {"model.decoder.": "decoder."}, {}),
        ("gptj", {}, {"transformer.h.0.attn.bias": (1, 1, 8, 8)}),
    ],
)
def test_names_and_buffers_of_older_checkpoints(
    source: str, rename: dict[str, str], extra: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    folder = save(tmp_path / "source", *_case(source))
    reexpress(folder, tmp_path / "new")
    stored = load_file(folder / "model.safetensors")
    for old, new in rename.items():
        stored = {(new + name[len(old) :] if name.startswith(old) else name): t for name, t in stored.items()}
    stored |= {name: torch.ones(shape) for name, shape in extra.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    reexpress(folder, tmp_path / "old")
    weights = "model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (tmp_path / "old" / weights).read_bytes()


def test_the_tokenizer_stays_the_same_class(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", *_case("gpt_neox"))
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["tokenizer_class"]
    path.write_text(json.dumps(fields))
    reexpress(folder, tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(before) is type(after)
    assert before("a few words\n").input_ids == after("a few words\n").input_ids


def test_every_listed_architecture_has_a_rule_that_leads_to_a_known_family() -> None:
    optional = {(source, target) for source, targets in OPTIONAL.items() for target in targets}
    assert {case[:2] for case in CASES} == {*REEXPRESSED.items(), *optional, ("gpt_neox", "starcoder2")}
    assert {*granite_swa.REASONS} == {*KNOWN} - {*granite_swa.TARGETS}
    for source, target, fields in CASES:
        found = reexpression_of(AutoConfig.for_model(source, **fields), target)
        assert found is not None
        assert describe(found.config()).layers[0].kv_heads == fields.get("num_key_value_heads", 4)


def test_conversion_names_the_re_expression() -> None:
    for source, target in REEXPRESSED.items():
        with pytest.raises(UserError) as caught:
            describe(SimpleNamespace(model_type=source))
        assert f"re-express it as {target} first: retrofit convert MODEL --reexpress-only" in caught.value.fix


@pytest.mark.parametrize(
    ("source", "fields", "where"),
    [
        ("gpt_neox", {**NEOX, "use_parallel_residual": False, "rope_parameters": rope_of(0.25)}, "rotary_pct"),
        ("opt", {**OPT, "do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {**OPT, "word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("opt", {**OPT, "_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("gpt2", {**GPT, "add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_variants_that_no_target_holds_are_refused(source: str, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as caught:
        reexpression_of(AutoConfig.for_model(source, **fields))
    assert where in str(caught.value.where)


def test_matrices_decide_the_dtype_of_a_mixed_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", *_case("gpt_neox"))
    stored = load_file(folder / "model.safetensors")
    mixed = {name: t.bfloat16() if t.ndim == 2 else t for name, t in stored.items()}
    assert sum(t.dtype == torch.float32 for t in mixed.values()) > len(mixed) / 2
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    assert reexpress(folder, tmp_path / "out").dtype == "bfloat16"


def test_other_refusals_write_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    windows = {**NEOX, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    with pytest.raises(UserError, match="sliding windows"):
        reexpression_of(AutoConfig.for_model("qwen2", **windows), "llama")
    assert reexpression_of(AutoConfig.for_model("qwen2", **NEOX)) is None
    qwen = save(tmp_path / "qwen", "qwen2", {**NEOX, "num_key_value_heads": 4})
    with pytest.raises(UserError, match="nothing to be re-expressed") as caught:
        reexpress(qwen, out)
    assert "llama or granite_swa" in caught.value.fix
    for bias in ("attention_bias", "mlp_bias"):
        with pytest.raises(UserError, match="ministral has no biases") as caught:
            reexpression_of(AutoConfig.for_model("llama", **{bias: True}), "ministral")
        assert bias in str(caught.value.where)
    with pytest.raises(UserError, match="cannot be re-expressed as `phi`"):
        reexpress(qwen, out, target="phi")
    for family, target, reason in (
        ("qwen3", "granite_swa", "norm on queries and keys"),
        ("gemma2", "granite_swa", "soft-capped"),
        ("mixtral", "granite_swa", "it becomes granitemoe_swa"),
        ("qwen2_moe", "granitemoe_swa", "do not add up to one"),
        ("llama", "granitemoe_swa", "are no experts"),
    ):
        with pytest.raises(UserError, match=f"`{family}` cannot be re-expressed as `{target}`: .*{reason}"):
            reexpression_of(AutoConfig.for_model(family), target)
    folder = save(tmp_path / "source", *_case("gpt2"))
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "v_head.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"`v_head\.weight` has no place"):
        reexpress(folder, out)
    del stored["transformer.h.1.ln_2.bias"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"first `transformer\.h\.1\.ln_2\.bias`"):
        reexpress(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen", "source"]


def test_a_source_is_re_expressed_once_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    folder = save(tmp_path / "source", *_case("gptj"))
    light = resolve(folder, weights=False)
    assert load_config(light.folder).model_type == "phi"
    assert not list(light.folder.glob("*.safetensors"))
    source = resolve(folder)
    assert source.folder.parent == tmp_path / "cache"
    assert "gptj was re-expressed as phi" in source.notes[0]
    written = (source.folder / "model.safetensors").stat().st_mtime_ns
    again = resolve(folder)
    assert again.folder == source.folder
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == written
    assert resolve(folder, reexpress=False).folder == folder
    want = load(folder)(ids()).logits
    assert torch.allclose(load(source.folder)(ids()).logits, want, atol=1e-5 * float(want.abs().max()))


def test_a_cached_re_expression_belongs_to_all_files_that_it_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    folder = save(tmp_path / "source", *_case("gptj"))
    first = resolve(folder).folder
    written = (first / "model.safetensors").read_bytes()
    (first / "model.safetensors").write_bytes(written[:-4] + b"1234")
    assert resolve(folder).folder == first
    assert (first / "model.safetensors").read_bytes() == written
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    again = resolve(folder, weights=False).folder
    assert json.loads((again / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_the_rotated_share_gives_back_every_number_of_features() -> None:
    for head_dim in (48, 64, 80, 96, 128, 256):
        for rotary in range(2, head_dim + 1, 2):
            assert int(head_dim * partial_factor(rotary, head_dim)) == rotary


def _case(source: str) -> tuple[str, dict[str, Any]]:
    return next((name, fields) for name, _, fields in CASES if name == source)
