"""Conversion of a checkpoint of 1.26 billion parameters: time beside `cp -r`, and peak memory.

A random checkpoint in the shape of Llama (22 layers, hidden 2048, 32 query and 32 KV heads, bfloat16, several shards)
is made, then copied by `cp -r`, copied by `cp -r` and `sync` of the files, and converted to 8 KV heads by `mean`, by
turns, and converted by `calibrated` once, on random token ids. Every conversion is a process of its own, timed from
outside, imports included; its peak memory is what the kernel counted for it (ru_maxrss of wait4).

A conversion waits until its files are on the disk, and plain `cp -r` does not: it leaves them to the page cache. The
limit is set against plain `cp -r`; the durable copy is measured beside it.

    python -m evals.benchmarks.large [--tokens 4096] [--rounds 3]
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
MIB = 1 << 20
KV_HEADS = 8
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
LIMITS = {"mean: times the seconds of cp -r": 1.5, "mean: MiB": 700, "calibrated: MiB": 2560}


def make(folder: Path) -> None:
    """Write the random checkpoint, one tensor in memory at a time."""
    import torch

    from retrofit.checkpoint.write import ShardWriter, write_config

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    c, i, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).to(torch.bfloat16)

    with ShardWriter(folder, "600MB") as writer:
        writer.add("model.embed_tokens.weight", matrix(v, c))
        for layer in range(CONFIG["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            for name, rows in (("q_proj", c), ("k_proj", kv), ("v_proj", kv), ("o_proj", c)):
                writer.add(f"{prefix}.self_attn.{name}.weight", matrix(rows, c))
            for name, rows, columns in (("gate_proj", i, c), ("up_proj", i, c), ("down_proj", c, i)):
                writer.add(f"{prefix}.mlp.{name}.weight", matrix(rows, columns))
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{prefix}.{name}.weight", torch.ones(c, dtype=torch.bfloat16))
        writer.add("model.norm.weight", torch.ones(c, dtype=torch.bfloat16))
        writer.add("lm_head.weight", matrix(v, c))
    write_config(folder, CONFIG)


def convert(source: Path, out: Path, method: str, tokens: int) -> None:
    """What a child process does: one conversion, staged and resumable as in a run."""
    from retrofit.checkpoint.staging import staged
    from retrofit.kv_heads.convert import convert as convert_heads

    text = None
    if method != "mean":
        import torch

        from retrofit.kv_heads.convert import CalibrationText

        ids = torch.randint(0, CONFIG["vocab_size"], (tokens // 512, 512), generator=torch.Generator().manual_seed(1))
        text = CalibrationText(ids, tuple(("one", "two")[n % 2] for n in range(len(ids))))
    work = out.with_name(f"{out.name}.work")
    with staged(out, keep=work / "checkpoint") as folder:
        convert_heads(source, folder, kv_heads=KV_HEADS, method=method, text=text, work=work)  # type: ignore[arg-type]
    shutil.rmtree(work)


def measured(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident memory (MiB) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return {"seconds": time.perf_counter() - began, "mib": usage.ru_maxrss * 1024 / MIB}


def run_all(place: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Make the checkpoint, measure, and leave nothing behind."""
    source, out = place / "source", place / "out"
    child = [sys.executable, "-m", "evals.benchmarks.large", "--child", str(source), str(out)]
    subprocess.run([*child, "make", "0"], check=True)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    shards = len(list(source.glob("*.safetensors")))
    commands = {
        "cp": ["cp", "-r", str(source), str(out)],
        "cp and sync": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(out)],
        "mean": [*child, "mean", "0"],
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for round_ in range(rounds + 1):  # the first one brings the source into the page cache and is not counted
        for name, command in commands.items():
            # Free memory as a copy leaves it, before each: after a conversion, the next copy takes three times as long.
            subprocess.run(commands["cp"], check=True)
            shutil.rmtree(out)
            os.sync()
            found = measured(command)
            shutil.rmtree(out)
            if round_:
                rows[name].append(found)
    os.sync()
    rows["calibrated"] = [measured([*child, "calibrated", str(tokens)])]
    return {"bytes": nbytes, "shards": shards, "tokens": tokens, "kv_heads": KV_HEADS, "rounds": rows}


def times(result: dict[str, Any], copy: str) -> list[float]:
    """Seconds of `mean` over those of a copy, round by round."""
    rounds = result["rounds"]
    return [mean["seconds"] / one["seconds"] for one, mean in zip(rounds[copy], rounds["mean"], strict=True)]


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """What was measured beside each limit. The ratio is the median over rounds of neighbours."""
    rounds = result["rounds"]
    values = (
        statistics.median(times(result, "cp")),
        max(row["mib"] for row in rounds["mean"]),
        max(row["mib"] for row in rounds["calibrated"]),
    )
    return {
        name: {"measured": value, "limit": limit, "met": value <= limit}
        for (name, limit), value in zip(LIMITS.items(), values, strict=True)
    }


def markdown(result: dict[str, Any], command: str) -> str:
    """The result as tables."""
    m, rounds = result["machine"], result["rounds"]
    lines = [
        "# A large checkpoint",
        "",
        f"`{command}` on {m['processor']}, {m['threads']} thread of {m['cores']} cores, {m['memory_gib']} GiB, "
        f"Python {m['python']}, torch {m['torch']}, transformers {m['transformers']}.",
        "",
        f"A random checkpoint: {result['bytes'] / 1e9:.2f} GB in {result['shards']} shards, 22 layers, hidden 2048, 32 "
        f"query and 32 KV heads, bfloat16, converted to {result['kv_heads']} KV heads. Each is a process of its own, "
        "imports included. A conversion waits until its files are on the disk; so does `cp -r` with `sync` of what it "
        "copied, and plain `cp -r` does not.",
        "",
        "| round | `cp -r`, s | with `sync`, s | `mean`, s | times `cp -r` | times with `sync` | `mean`, peak MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for n, mean in enumerate(rounds["mean"]):
        seconds = [rounds[name][n]["seconds"] for name in ("cp", "cp and sync", "mean")]
        ratios = [times(result, name)[n] for name in ("cp", "cp and sync")]
        cells = [str(n + 1), *(f"{s:.1f}" for s in seconds), *(f"{r:.2f}" for r in ratios), f"{mean['mib']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    (calibrated,) = rounds["calibrated"]
    spent = f"{calibrated['seconds']:.0f} s, peak {calibrated['mib']:.0f} MiB"
    lines += [
        "",
        f"`calibrated` on {result['tokens']:,} tokens: {spent}.",
        "",
        "| | measured | at most | |",
        "|---|---:|---:|---|",
    ]
    for name, row in result["verdict"].items():
        value = f"{row['measured']:.2f}" if row["limit"] < 10 else f"{row['measured']:.0f}"
        lines.append(f"| {name} | {value} | {row['limit']} | {'met' if row['met'] else 'NOT MET'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--rounds", type=int, default=3, help="of the copies and mean by turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--place", type=Path, help="folder for the checkpoints (11 GB); default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        atexit.register(gc.freeze)  # as the `retrofit` command does
        source, out, what, tokens = options.child
        if what == "make":
            make(Path(source))
        else:
            convert(Path(source), Path(out), what, int(tokens))
        return
    from evals.benchmarks.scoring import machine

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    command = " ".join(["python -m evals.benchmarks.large", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        result = run_all(Path(place), options.rounds, options.tokens)
    result = {"command": command, "machine": machine(options.threads), **result}
    result["verdict"] = verdict(result)
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(result, command)
    (options.out / "large.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "large.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
