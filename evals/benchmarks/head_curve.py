"""The price list against what conversion really costs, on a small model that is trained here with 8 KV heads.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.head_curve

Trains a llama (8 query heads, 8 KV heads) on built-in text, prints its price list, converts it to 4, 2 and 1 KV heads
and measures the loss of each checkpoint on held-out text of both kinds. Writes results/head_curve.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from evals.benchmarks.recovery import machine
from retrofit.console import to_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
KINDS = ("python-docs", "python-stdlib")
HEADS = (4, 2, 1)
CASES: dict[str, dict[str, str]] = {
    "merge and repair": {"method": "calibrated", "repair": "o_proj"},
    "merge alone": {"method": "calibrated", "repair": "none"},
    "mean pooling": {"method": "mean"},
}
VOCABULARY = 2048
SCORED = 16_384  # held-out tokens of each kind
LENGTH = 512  # tokens of a sequence, and of the window
ROWS = 4  # sequences of a training step
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
}


def train(folder: Path, steps: int) -> dict[str, Any]:
    """A llama and its tokenizer in `folder`, trained from nothing: {steps, tokens, seconds, train_loss}."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    from retrofit.data.packing import training_rows
    from retrofit.recipe.schema import TextSource

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        **SHAPE,
    )
    model = LlamaForCausalLM(config).train()
    sources = [TextSource(source=kind) for kind in KINDS]
    text_NT = training_rows(sources, tokenizer, steps * ROWS * LENGTH, LENGTH, seed=0).ids_NT
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizer = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    momenta = [torch.zeros_like(p) for p in matrices]
    began, recent = time.perf_counter(), 0.0
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * (1 - 0.95 * step / steps)
        batch_BT = text_NT[step * ROWS : (step + 1) * ROWS]
        logits_BTV = model(batch_BT).logits[:, :-1]
        loss = cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * rate
        optimizer.step()
        with torch.no_grad():
            for parameter, momentum in zip(matrices, momenta, strict=True):
                momentum.mul_(0.95).add_(parameter.grad)
                turned = orthogonal(parameter.grad + 0.95 * momentum)
                parameter.sub_(turned * 0.02 * rate * max(1.0, turned.shape[0] / turned.shape[1]) ** 0.5)
        model.zero_grad()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: loss {recent:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = time.perf_counter() - began
    return {"steps": steps, "tokens": steps * ROWS * LENGTH, "seconds": seconds, "train_loss": recent}


def orthogonal(update: Any) -> Any:
    """Near the closest matrix with equal singular values, by a quintic iteration (Muon, Jordan et al. 2024): a model
    this small learns twice as much from the same text as with AdamW alone."""
    wide = update.shape[0] <= update.shape[1]
    x = update if wide else update.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.T


def make_tokenizer() -> Any:
    """Byte-level BPE with `VOCABULARY` tokens, trained on the training side of the built-in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from retrofit.data.corpora import built_in_texts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((t.text for kind in KINDS for t in built_in_texts(kind, "train")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def held_out(tokenizer: Any) -> dict[str, Any]:
    """Sequences [N, LENGTH] of each kind that neither training nor calibration saw."""
    from retrofit.data.packing import training_rows
    from retrofit.recipe.schema import TextSource

    return {
        kind: training_rows([TextSource(source=kind)], tokenizer, SCORED, LENGTH, seed=1, split="held_out").ids_NT
        for kind in KINDS
    }


def losses(folder: Path, text: dict[str, Any]) -> dict[str, float]:
    """Mean loss of a checkpoint on each kind of text, nats per token, by the stock class."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for kind, ids_NT in text.items():
        total = 0.0
        for ids_T in ids_NT:
            with torch.no_grad():
                logits_TV = model(ids_T[None]).logits[0, :-1]
            total += float(cross_entropy(logits_TV, ids_T[1:]))
        found[kind] = total / len(ids_NT)
    return found


def curve(model: Path, work: Path) -> dict[str, Any]:
    """Predicted and measured loss at every number of KV heads: {original, cases: {case: {heads: {...}}}}."""
    import retrofit
    from retrofit.model.load import load_tokenizer
    from retrofit.recipe.options import recipe_of
    from retrofit.workflow.command import write

    text = held_out(load_tokenizer(model))
    original = losses(model, text)
    cases: dict[str, dict[str, Any]] = {}
    for case, options in CASES.items():
        listed: Any = None
        section = {**options, "calibration": {"sequence_length": LENGTH}}
        if options["method"] == "calibrated":
            listed = retrofit.prices(model, recipe=recipe_of("convert", {"kv_heads": 1}, {"convert": section}))
        cases[case] = {"curve": listed and vars(listed.curve), "probes": listed and listed.calibrated, "heads": {}}
        for heads in HEADS:
            out = work / f"{case}-{heads}".replace(" ", "-")
            recipe = recipe_of("convert", {"kv_heads": heads, "model": model}, {"convert": section})
            write(recipe, out)
            found = losses(out, text)
            price = listed and next(price for price in listed.prices if price.kv_heads == heads)
            cases[case]["heads"][heads] = {
                "cost": price and price.cost,
                "how": price and price.how,
                "predicted": price and price.increase,
                "layers": price and price.dearest(len(price.layers)),
                **{kind: found[kind] - original[kind] for kind in KINDS},
            }
            print(case, heads, cases[case]["heads"][heads], flush=True)
    return {"original": original, "scored_tokens": SCORED, "cases": cases}


def main() -> None:
    """Train, price, convert, measure; write the table and the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=330, help=f"training steps of {ROWS * LENGTH:,} tokens")
    parser.add_argument("--model", type=Path, help="keep the trained model here, and use it if it is there already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = options.model or Path(work) / "model"
        facts = model / "training.json"
        if not facts.exists():
            trained = train(model, options.steps)
            facts.write_text(json.dumps(trained) + "\n", encoding="utf-8")
        record = {
            "command": "OMP_NUM_THREADS=1 python -m evals.benchmarks.head_curve",
            "machine": machine(),
            "model": SHAPE,
            "training": json.loads(facts.read_text(encoding="utf-8")),
            **curve(model, Path(work)),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    text = to_json(record)
    (options.out / "head_curve.json").write_text(text + "\n", encoding="utf-8")
    record = json.loads(text)
    (options.out / "head_curve.svg").write_text(chart(record), encoding="utf-8")
    (options.out / "head_curve.md").write_text(table(record), encoding="utf-8")
    print(table(record))


def mean(row: dict[str, Any]) -> float:
    """Measured increase, both kinds of text alike."""
    return sum(row[kind] for kind in KINDS) / len(KINDS)


def chart(record: dict[str, Any]) -> str:
    """Predicted and measured increase of the loss against KV heads."""
    from retrofit.report.charts.drawing import Line
    from retrofit.report.charts.plots import loss_by_kv_heads

    lines = []
    for case, found in record["cases"].items():
        rows = found["heads"]
        heads = [int(count) for count in rows]
        lines.append(Line(f"{case}, measured", heads, [mean(row) for row in rows.values()]))
        if found["curve"]:
            lines.append(Line(f"{case}, listed", heads, [row["predicted"] for row in rows.values()]))
    return loss_by_kv_heads("head-curve", lines, alone=True).svg


def table(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    where, trained, shape = record["machine"], record["training"], record["model"]
    kinds = " and ".join(f"{loss:.3f} on {kind}" for kind, loss in record["original"].items())
    lines = [
        "# The price list against what conversion costs",
        "",
        f"`{record['command']}`, one thread of {where['cpu']}, torch {where['torch']}, "
        f"transformers {where['transformers']}.",
        "",
        f"A llama with {shape['num_hidden_layers']} layers, {shape['num_attention_heads']} query and "
        f"{shape['num_key_value_heads']} KV heads of dim {shape['head_dim']}, trained on {trained['tokens']:,} tokens "
        f"of built-in text in {trained['seconds'] / 60:.1f} minutes; its loss is {kinds} (nats per token, "
        f"{record['scored_tokens']:,} held-out tokens of each; a uniform guess: {math.log(VOCABULARY):.2f}).",
        "",
        "Increase of the loss, nats per token. The list converts and scores two numbers of KV heads itself, on a "
        "quarter of the text of a real conversion and on text from its own side of the split, and predicts the third; "
        "measured is what `retrofit convert` writes, on text held out from training and calibration.",
        "",
        "| conversion | KV heads | list | | measured, both | python-docs | python-stdlib |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for case, found in record["cases"].items():
        for heads, row in found["heads"].items():
            listed = "" if row["predicted"] is None else f"{row['predicted']:+.3f}"
            lines.append(
                f"| {case} | {heads} | {listed} | {row['how'] or ''} | {mean(row):+.3f} "
                f"| {row['python-docs']:+.3f} | {row['python-stdlib']:+.3f} |"
            )
    for case, found in record["cases"].items():
        if found["curve"]:
            lines += ["", f"{case}: the list's curve is loss = {math.exp(found['curve']['log_scale']):.3g} "
                          f"cost^{found['curve']['exponent']:.2f}."]  # fmt: skip
    lines += ["", "![Loss against KV heads, listed and measured](head_curve.svg)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
