"""A made-up run with everything in it, in the proportions of a real one."""

from __future__ import annotations

import math

from retrofit.context.extension import ExtendReport
from retrofit.context.search.outcome import SearchResult, Trial
from retrofit.evaluation.continuations import Continuation
from retrofit.evaluation.metrics.context_use import LongContext
from retrofit.evaluation.metrics.effective import AGAINST_ORIGINAL, EffectiveLength, LengthTests, ShortContext
from retrofit.evaluation.metrics.longppl import ContextGain, LongPPL
from retrofit.evaluation.metrics.perplexity import Row
from retrofit.evaluation.metrics.protocols import ProtocolResult
from retrofit.evaluation.result import ModelEvaluation
from retrofit.evaluation.running import LengthCost, RunCost
from retrofit.evaluation.tasks.answers import TaskChange, TaskScore
from retrofit.evaluation.tasks.asking import Answer
from retrofit.evaluation.tasks.needle import Cell, NeedleResult
from retrofit.evaluation.tasks.ruler import Row as Task
from retrofit.evaluation.tasks.ruler import RulerResult
from retrofit.kernels.check import KernelCheck
from retrofit.kv_heads.repair.outcome import ConvertReport, LayerReport, RepairOutcome
from retrofit.publishing.gate import GateResult
from retrofit.publishing.reload import ReloadReport
from retrofit.recipe.schema import RopeSettings
from retrofit.report.data import RunData, StepRecord, Training

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PERPLEXITIES = {
    "original": {"python-docs": (14.2, 12.1, 11.0, 10.4, 96.0), "python-stdlib": (7.9, 6.8, 6.0, 5.6, 61.0)},
    "converted": {"python-docs": (61.0, 57.5, 55.0, 54.1, 52.0), "python-stdlib": (33.0, 30.1, 28.6, 27.9, 27.0)},
    "recovered": {"python-docs": (20.3, 17.6, 16.2, 15.6, 15.1), "python-stdlib": (12.6, 11.0, 10.1, 9.6, 9.3)},
}


def rows(label: str) -> tuple[Row, ...]:
    kinds = dict(PERPLEXITIES[label])
    both = zip(*kinds.values(), strict=True)
    kinds["all"] = tuple(math.sqrt(a * b) for a, b in both)
    return tuple(
        Row(kind, length, (length - 1) * 2, 2, ppl, ppl * 0.93, ppl * 1.08, 1024, ppl * 0.96, ppl * 0.88, ppl * 1.05,
            math.log2(ppl) / 4.1, "blocks of 512 tokens")
        for kind, values in kinds.items()
        for length, ppl in zip(LENGTHS, values, strict=True)
    )  # fmt: skip


def positions(label: str) -> tuple[tuple[float, float], ...]:
    level = {"original": 2.3, "converted": 3.9, "recovered": 2.75}[label]
    wobble = [0.12 * math.sin(i * 1.7 + len(label)) for i in range(24)]
    return tuple(
        (
            341.0 + 683 * i,
            level + 0.7 / (i + 1) + wobble[i] + (0.55 * (i - 12) if label == "original" and i > 12 else 0),
        )
        for i in range(24)
    )


UNIT = "blocks of 512 tokens"
NATIVE = 8192
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


WITHIN = ContextGain("all", NATIVE, NATIVE // 2, 4096, 0.052, 0.041, 0.063, UNIT)


def effective(label: str) -> EffectiveLength:
    """The original stops at its window; the final model is certified up to the new one."""
    broken = label == "original"

    def tests(length: int) -> LengthTests:
        past = length > NATIVE
        tail = None if not past else 9.2 if broken else 0.981
        low, high = (None, None) if tail is None else (tail * 0.97, tail * 1.03)
        gain = None if not past else (-2.1 if broken else 0.041)
        needle = 0.05 if past and broken else 0.9
        passed = not (past and broken)
        margins = {} if high is None else {"tail": math.log(1.05 / high)}
        margins["needle"] = needle - 0.765
        if gain is not None:
            margins["gain"] = gain - 0.01
        return LengthTests(
            length, past, tail, low, high, passed if past else None,
            gain, gain - 0.01 if gain else None, gain + 0.01 if gain else None, passed if past else None,
            needle, 0.765, passed, margins,
        )  # fmt: skip

    certified = 8192 if broken else 16384
    why = "16384 tokens: the tail is not shown to be predicted as well as at the native length" if broken else None
    return EffectiveLength(
        certified, NATIVE, 1024, AGAINST_ORIGINAL, UNIT, 4, tuple(tests(n) for n in LENGTHS), (), why, WITHIN
    )


def needle(label: str) -> NeedleResult:
    """Found everywhere within the window, by the original nowhere past it."""
    cells = []
    for length in (2048, 8192, 16384):
        for depth in DEPTHS:
            lost = label == "original" and length > NATIVE
            share = 0.0 if lost else 1.0 if depth > 0.3 else 0.8
            answer = Answer(("41837",), "41837" if share == 1 else "4183", share, share == 1, 4.2 - 4 * share,
                            3.1 * share, share)  # fmt: skip
            cells.append(Cell(length, depth, 0, int(depth * length), answer, answer.starts))
    scores = {n: sum(c.found for c in cells if c.length == n) / 5 for n in (2048, 8192, 16384)}
    return NeedleResult("needle", (2048, 8192, 16384), DEPTHS, 1, False, 0, tuple(cells), scores, 90_000, "blockwise")


def long_context(label: str) -> LongContext:
    """Everything that can be asked for."""
    gain = -2.1 if label == "original" else 0.041
    gains = [ContextGain(kind, 16384, NATIVE, 16384, gain, gain - 0.01, gain + 0.01, UNIT)
             for kind in ("python-docs", "python-stdlib", "all")]  # fmt: skip
    gains.insert(0, WITHIN)
    tasks = ("niah_single", "niah_multikey", "variable_tracking", "common_words", "frequent_words")
    return LongContext(
        NATIVE,
        tuple(gains),
        (LongPPL("all", 16384, 4096, 65532, 412, 3.9, 3.2, 4.8, label),),
        (
            ProtocolResult("sliding", 8192, 256, 4, 65532, 400_000, 11.2, 10.4, 12.1, -158_000.0, 0.84),
            ProtocolResult("yarn", 8192, 256, 4, 65532, 400_000, 11.4),
            ProtocolResult("longlora", 8192, 256, 4, 90_000, 400_000, 11.6),
            ProtocolResult("lm-eval", 8192, None, 4, 65532, 70_000, 12.0, 11.1, 12.9, -162_000.0, 0.86),
        ),
        needle(label),
        RulerResult(tuple(Task(task, 8192, 4, 0.5, 1.2, 0.8, 0.75, 0.6) for task in tasks), (), 4, 0, "blockwise"),
        effective(label),
    )


ASKED = {"original": 0.612, "converted": 0.381, "recovered": 0.574}


def tasks(label: str) -> tuple[TaskScore, ...]:
    """A choice with two metrics, and a perplexity, which cannot be paired."""
    acc = ASKED[label]
    return (
        TaskScore("arc_easy", "acc", acc, 0.0101, 2376, 0),
        TaskScore("arc_easy", "acc_norm", acc - 0.04, 0.0102, 2376, 0),
        TaskScore("lambada", "perplexity", 12.5, None, 5153, 0),
    )


def task_changes(label: str) -> tuple[TaskChange, ...]:
    """Against the original."""
    if label == "original":
        return ()
    before, change = ASKED["original"], ASKED[label] - ASKED["original"]
    return tuple(
        TaskChange("arc_easy", metric, 2376, before - less, before - less + change, change, change - 0.011,
                   change + 0.012, -change, 210, 120, 7.4e-7)
        for metric, less in (("acc", 0.0), ("acc_norm", 0.04))
    )  # fmt: skip


def short_context(label: str) -> tuple[ShortContext, ...]:
    """Of every model but the original."""
    before, after = (PERPLEXITIES[name]["python-docs"] for name in ("original", label))
    return () if label == "original" else tuple(
        ShortContext(n, 4 * (n - 1), a, b, b / a, 0.97 * b / a, 1.03 * b / a, UNIT)
        for n, a, b in zip(LENGTHS[:-1], before, after, strict=False)
    )  # fmt: skip


def search() -> SearchResult:
    """Three rounds: 24, 8 and 4 encodings."""
    trials = []
    for rung, count in ((1, 24), (2, 8), (3, 4)):
        for i in range(count):
            x, y = 0.02 + 0.012 * i, 2.41 + 0.3 / (1 + i) + 0.011 * i
            label = "yarn" if i == 0 else f"ntk theta x{2 + i}"
            trials.append(
                Trial(rung, label, label.split()[0], {}, 2048 * rung**2, 2.3 + x + 0.1 / rung, x, y + 0.2 / rung,
                      1.1 + y / 10, x + y + 0.2 / rung)
            )  # fmt: skip
    last = [trial for trial in trials if trial.rung == 3]
    winner = min(last, key=lambda trial: trial.objective)
    return SearchResult(
        winner.method,
        RopeSettings(),
        tuple(trials),
        winner,
        last[0],
        2.333,
        187_392,
        201_728,
        "python-docs",
        (2.3, 2.31),
    )


def cost(label: str, per_token: int) -> RunCost | None:
    """At two lengths, four rounds of the first and the last model."""
    if label == "converted":
        return None
    speed = {"original": 21.4, "recovered": 25.1}[label]
    at = tuple(
        LengthCost(n, n / 700, 700.0, 1450.0, 90 << 20, per_token * n, per_token * n, 16, speed - n / 400,
                   9.5e9 / (269e6 + per_token * n), tuple(n / 700 * r for r in ROUNDS),
                   tuple((speed - n / 400) / r for r in ROUNDS))
        for n in (512, 2048)
    )  # fmt: skip
    return RunCost(at, 269_030_016, "blockwise", "bfloat16", "cpu", 9.5e9, 3.9e11)


ROUNDS = (0.98, 1.0, 1.0, 1.03)


def written(label: str) -> tuple[Continuation, ...]:
    """Of the original and of the recovered model."""
    ends = {
        "original": " it boils and turns into steam, which rises into the air.\nWhen it cools",
        "recovered": " the water boils, and the steam rises. The steam is a gas",
    }
    if label not in ends:
        return ()
    prompts = ("When water is heated to 100 degrees,", "def read(path):\n    with open(path)")
    sources = ("", "/home/somebody/python-stdlib/argparse.py")
    return tuple(Continuation(p, ends[label], 40, source) for p, source in zip(prompts, sources, strict=True))


def model(label: str, heads: int) -> ModelEvaluation:
    per_token = 2 * 30 * heads * 64 * 2
    return ModelEvaluation(
        label,
        rows(label),
        position_losses=positions(label),
        kv_bytes_per_token=per_token,
        kv_cache_bytes={tokens: per_token * tokens for tokens in (8192, 16384, 32768, 131072)},
        kv_heads=heads,
        cost=cost(label, per_token),
        long_context=long_context(label),
        short_context=short_context(label),
        tasks=tasks(label),
        task_changes=task_changes(label),
        continuations=written(label),
    )


def conversion() -> ConvertReport:
    layers = tuple(
        LayerReport(
            i,
            ((0, 1, 2),),
            keys=0.08 + 0.05 * math.sin(i) ** 2 + (0.2 if i in (3, 17) else 0),
            values=0.22 + 0.08 * math.cos(i / 3) ** 2,
            repairs=(RepairOutcome("o_proj", i % 7 != 0, 0.31 + 0.01 * i, 0.22 + 0.008 * i),),
        )
        for i in range(30)
    )
    by_kind = {"python-docs": 24576, "python-stdlib": 24576}
    notes = ("Layers 0, 7, 14, 21, 28 keep the merged output projection: repair did not help.",)
    return ConvertReport("calibrated", 3, 1, layers, 49152, tuple(by_kind), by_kind, 201.0, notes)


def reload() -> ReloadReport:
    return ReloadReport(
        True, (), "float32", 2, 2048, 2e-3, 1e-4, 2.4e-7, 1.1e-8, "topics", "LlamaForCausalLM", "it boils", 16, 12.0, {}
    )


def run(**over: object) -> RunData:
    """Everything."""
    training = tuple(
        (step, 1.9 * math.exp(-step / 60) + 0.55 + 0.09 * math.sin(step * 2.1), held)
        for step in range(5, 201, 5)
        for held in [1.3 * math.exp(-step / 70) + 0.72 if step % 50 == 0 else None]
    )
    fields: dict[str, object] = {
        "name": "quickstart",
        "description": "SmolLM2-135M with one KV head per layer and twice the context, recovered by distillation.",
        "recipe_yaml": "name: quickstart\nmodel: embedded\nconvert:\n  kv_heads: 1\n  method: calibrated\n",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "created": "2026-01-05 12:00 UTC",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "models": (model("original", 3), model("converted", 1), model("recovered", 1)),
        "native_length": 8192,
        "claimed_length": 16384,
        "training": training,
        "recovery": Training("distill", 200, 200, 204_800, 16, 1e-3, 498.2),
        "steps": (
            StepRecord("load", 4.1, 800 << 20, 6.0, 700 << 20),
            StepRecord("convert", 201.0, 1900 << 20, 240.0, 2100 << 20),
            StepRecord("extend", 0.4, 300 << 20, 1.0, 300 << 20),
            StepRecord("recover", 412.0, 3300 << 20, 380.0, 3600 << 20),
            StepRecord("evaluate", 236.0, 2200 << 20, 250.0, 2000 << 20),
            StepRecord("publish", 31.0, 1400 << 20, None, None),
        ),
        "kernel": "blockwise (auto: exact, bounded memory on CPU)",
        "kernel_proof": KernelCheck("blockwise", "eager", 3.1e-5, 1e-3, 512, True, rounding=2.6e-5),
        "conversion": conversion(),
        "context": ExtendReport("yarn", 8192, 8192, 16384, 2.0, 2.0, search=search()),
        "gate": (
            GateResult("ppl_ratio@8192", "<= 2.0", 1.6, True, ""),
            GateResult("kv_ratio", ">= 3", 3.0, True, ""),
        ),
        "reload": reload(),
        "notes": (),
        "commands": ("retrofit run quickstart --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/quickstart",),
    }
    return RunData(**{**fields, **over})  # type: ignore[arg-type]
