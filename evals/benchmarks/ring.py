"""Ring attention on this machine's cores: time, balance and bytes of 1, 2 and 4 ranks, and a model of N GPUs.

Every rank is a process with one thread, all on this machine, gloo between them: so this measures what is computed and
how evenly, and counts what is sent. It says nothing of a network. With fewer cores than ranks the wall time is that of
the cores; the processor seconds of each rank are its own. A rank alone runs `blockwise` on the whole sequence.

    OMP_NUM_THREADS=1 python -m evals.benchmarks.ring [--tokens 8192] [--rounds 3] [--rate R] [--backward-rate R]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from retrofit.kernels.ring_cost import (
    AttentionShape,
    Link,
    PassTime,
    backward_time,
    forward_time,
    hidden_from,
    hidden_from_backward,
    ulysses_bytes,
    ulysses_copies,
)

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
CASES = (("zigzag", None), ("contiguous", None), ("zigzag", 512))
GPU = AttentionShape(heads=32, kv_heads=8, head_dim=128)
LINKS = {"NVLink, 450 GB/s": 450e9, "one 400 Gb/s card each, 50 GB/s": 50e9}
LENGTHS = (32768, 131072, 1048576)


def work(meeting: str, rank: int, ranks: int, tokens: int, rounds: int, results: Any) -> None:
    """One rank: all cases, several rounds each."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    results.put((rank, [measured(rank, ranks, tokens, rounds, *case) for case in CASES]))
    dist.barrier()
    dist.destroy_process_group()


def measured(rank: int, ranks: int, tokens: int, rounds: int, placed: str, window: int | None) -> dict[str, Any]:
    """Seconds (wall, processor) and bytes of one rank, forward and backward, and the error against one process."""
    import torch
    import torch.distributed as dist

    from retrofit.kernels import blockwise, placement, ring
    from retrofit.kernels.ring_group import Ring

    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, heads, tokens, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    shares = getattr(placement, placed)(tokens, ranks)
    own = shares.positions(rank)
    inputs = [x[:, :, own].requires_grad_() for x in whole]
    shared = Ring(shares, rank)
    sent, exchange = [0], dist.batch_isend_irecv

    def counted(operations: list[Any]) -> list[Any]:
        sent[0] += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return exchange(operations)

    dist.batch_isend_irecv = counted
    found: dict[str, Any] = {"case": [placed, window], "pairs": shares.pairs(rank, window), "rounds": []}
    for _ in range(rounds):
        row = {}
        out: Any = None
        for name in ("forward", "backward"):
            dist.barrier()
            sent[0], wall, processor = 0, time.perf_counter(), time.process_time()
            if name == "backward":
                torch.autograd.grad(out, inputs, out.detach())
            elif ranks == 1:
                out = blockwise.attention(*inputs, HEAD_DIM**-0.5, window)
            else:
                out = ring.attention(*inputs, HEAD_DIM**-0.5, window, ring=shared)
            row[name] = {"processor": time.process_time() - processor, "bytes": sent[0]}
            dist.barrier()
            row[name]["wall"] = time.perf_counter() - wall
        found["rounds"].append(row)
    dist.batch_isend_irecv = exchange
    if rank == 0:
        with torch.no_grad():
            expected = blockwise.attention(*whole, HEAD_DIM**-0.5, window)[:, :, own]
        found["error"] = float((out.detach() - expected).abs().max())
    return found


def on_ranks(ranks: int, tokens: int, rounds: int) -> list[list[dict[str, Any]]]:
    """What every rank measured, in the order of ranks."""
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=work, args=(f"{folder}/meeting", rank, ranks, tokens, rounds, results))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found = dict(results.get() for _ in range(ranks))
        for process in processes:
            process.join()
    return [found[rank] for rank in range(ranks)]


def summary(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each case: seconds of the fastest round, processor seconds of every rank in it, bytes, and pairs."""
    rows = []
    for case in range(len(CASES)):
        parts = [rank[case] for rank in found]
        row: dict[str, Any] = {"case": parts[0]["case"], "ranks": len(parts), "error": parts[0]["error"]}
        row["pairs"] = [part["pairs"] for part in parts]
        for name in ("forward", "backward"):
            rounds = [[part["rounds"][n][name] for part in parts] for n in range(len(parts[0]["rounds"]))]
            row[name] = {
                "wall": min(max(one["wall"] for one in ones) for ones in rounds),
                "processor": [min(ones[rank]["processor"] for ones in rounds) for rank in range(len(parts))],
                "bytes": sum(one["bytes"] for one in rounds[0]),
            }
        rows.append(row)
    return rows


def theory(ranks: int, tokens: int) -> tuple[int, int]:
    """Bytes that all ranks send forward and backward, full attention in float32."""
    keys = (ranks - 1) * 2 * tokens * KV_HEADS * HEAD_DIM * 4
    return keys, 2 * keys


def gpus(rate: float, backward_rate: float) -> list[dict[str, Any]]:
    """The model of N GPUs: one layer's attention forward and backward."""
    rows = []
    for name, bandwidth in LINKS.items():
        link = Link(rate, bandwidth, backward_rate)
        for tokens in LENGTHS:
            for ranks in (2, 8, 32):
                times = [time_of(tokens, ranks, GPU, link) for time_of in (forward_time, backward_time)]
                rows.append(
                    {
                        "link": name,
                        "tokens": tokens,
                        "gpus": ranks,
                        "forward": [times[0].seconds, times[0].efficiency],
                        "both": [sum(part.seconds for part in times), _efficiency(times)],
                        "gib_sent": sum(part.bytes_sent for part in times) / 2**30,
                    }
                )
    return rows


def _efficiency(times: list[PassTime]) -> float:
    return sum(part.compute for part in times) / sum(part.seconds for part in times)


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    m, tokens = result["machine"], result["tokens"]
    lines = [
        "# Ring attention",
        "",
        f"`{result['command']}` on {m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB, Python {m['python']}, "
        f"torch {m['torch']}; load of the machine at the start {result['load']:.1f}.",
        "",
        f"One layer's causal attention over {tokens:,} tokens, {HEADS} query and {KV_HEADS} KV heads of {HEAD_DIM}, "
        "float32, forward and backward. Every rank is a process with one thread on this machine, gloo between them, so "
        "this shows what is computed and how evenly, and not a network. One rank is `blockwise` on the whole sequence. "
        f"Fastest of {result['rounds']} rounds. Processor seconds are a rank's own, whoever shares its core; the "
        "speed-up is by those of the busiest rank, as if every rank had a core and no transfer took time. Wall seconds "
        f"are those of {m['cores']} cores, which 4 ranks share, and of whatever else ran.",
        "",
        "| ranks | tokens are | window | wall, s | processor, s, all | busiest rank | busiest / mean | speed-up | "
        "MiB sent | in theory | largest error |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    alone = {tuple(row["case"]): row for row in result["rows"] if row["ranks"] == 1}
    for row in result["rows"]:
        placed, window = row["case"]
        if row["ranks"] == 1 and placed == "contiguous":
            continue
        processor = _processor(row)
        sent = (row["forward"]["bytes"] + row["backward"]["bytes"]) / 2**20
        expected = f"{sum(theory(row['ranks'], tokens)) / 2**20:.1f}" if window is None else ""
        cells = [
            str(row["ranks"]),
            placed if row["ranks"] > 1 else "",
            str(window or ""),
            f"{row['forward']['wall'] + row['backward']['wall']:.2f}",
            f"{sum(processor):.2f}",
            f"{max(processor):.2f}",
            f"{max(processor) / statistics.mean(processor):.2f}",
            f"{_processor(alone[placed, window])[0] / max(processor):.2f}",
            f"{sent:.1f}",
            expected,
            f"{row['error']:.0e}" if row["ranks"] > 1 else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Balance in (query, key) pairs, exactly: the busiest rank has "
        + ", ".join(
            f"{max(row['pairs']) / statistics.mean(row['pairs']):.3f} times the mean ({row['ranks']} ranks, "
            f"{row['case'][0]}{', window ' + str(row['case'][1]) if row['case'][1] else ''})"
            for row in result["rows"]
            if row["ranks"] > 1
        )
        + ".",
        "",
        *_gpu_lines(result),
    ]
    return "\n".join(lines) + "\n"


def _processor(row: dict[str, Any]) -> list[float]:
    """Processor seconds of each rank, forward and backward."""
    return [a + b for a, b in zip(row["forward"]["processor"], row["backward"]["processor"], strict=True)]


def _gpu_lines(result: dict[str, Any]) -> list[str]:
    rate, backward_rate = result["rate"], result["backward_rate"]
    lines = [
        "## N GPUs: a model, not a measurement",
        "",
        f"`retrofit.kernels.ring_cost` for one layer of {GPU.heads} query and {GPU.kv_heads} KV heads of "
        f"{GPU.head_dim} in bfloat16, with tiles of {rate / 1e12:.0f} TFLOP/s forward and {backward_rate / 1e12:.0f} "
        "backward (one H200, measured with `blockwise` at 32k tokens) and links of the given bandwidth each way "
        "(assumed). A step takes as long as its products or its transfers; latency, launches, merging in float32 and "
        "smaller tiles are left out.",
        "",
        "| link | transfers hide from, tokens a GPU, forward | backward |",
        "|---|---:|---:|",
    ]
    for name, bandwidth in LINKS.items():
        link = Link(rate, bandwidth, backward_rate)
        lines.append(f"| {name} | {hidden_from(GPU, link):,.0f} | {hidden_from_backward(GPU, link):,.0f} |")
    lines += [
        "",
        "| link | tokens | GPUs | forward, ms | of ideal | forward + backward, ms | of ideal | GiB sent by each |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["gpus"]:
        forward, both = row["forward"], row["both"]
        lines.append(
            f"| {row['link']} | {row['tokens']:,} | {row['gpus']} | {forward[0] * 1e3:.1f} | {forward[1]:.0%} | "
            f"{both[0] * 1e3:.1f} | {both[1]:.0%} | {row['gib_sent']:.2f} |"
        )
    # What its README measured: 591.5 forward passes a second of 8,192 tokens on one GPU, NVLink of 200 GB/s each way.
    theirs = Link(591.5 * 2 * GPU.heads * GPU.head_dim * 8192**2, 200e9, None)
    times = [time_of(8 * 8192, 8, GPU, theirs) for time_of in (forward_time, backward_time)]
    lines += [
        "",
        "## Beside others, as they report it",
        "",
        "[ring-flash-attention](https://github.com/zhuzilin/ring-flash-attention) (its README): zigzag at 85.2% of "
        "ideal forward and 90.2% forward and backward on 8 H800 with 8,192 tokens each, the plain ring at 52 to 54%. "
        f"For that setting this model says {times[0].efficiency:.0%} and {_efficiency(times):.0%}: all transfers but "
        "the last hide there, so the rest is what the model leaves out, and ours will lose as much or more. It has no "
        "sliding windows.",
        "",
        "[ALST](https://arxiv.org/abs/2506.13996) (its abstract) trains Llama-8B on 500,000 tokens with one H100, "
        "3.7 million with 8 and 15 million with 32. It splits heads (Ulysses), each rank attending over the whole "
        "sequence for its own. Beyond as many GPUs as KV heads these are copied, and what a conversion saved is lost "
        "again; what a ring sends falls with the KV heads.",
        "",
        "| KV heads of 32 query heads | copies of each on 8 GPUs that split heads | MiB a GPU sends forward then, "
        "131,072 tokens | in a ring |",
        "|---:|---:|---:|---:|",
    ]
    for kv_heads in (8, 4, 2, 1):
        shape = AttentionShape(GPU.heads, kv_heads, GPU.head_dim)
        sent = forward_time(131072, 8, shape, theirs).bytes_sent / 2**20
        split = ulysses_bytes(131072, 8, shape) / 2**20
        lines.append(f"| {kv_heads} | {ulysses_copies(GPU.heads, kv_heads, 8)} | {split:.0f} | {sent:.0f} |")
    lines += ["", "Not run: NCCL, and any of this on more than one GPU."]
    return lines


def main() -> None:
    """Measure and write both files."""
    import os

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=344e12, help="FLOP/s of an attention tile on one GPU")
    parser.add_argument("--backward-rate", type=float, default=317e12, help="the same in the backward pass")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from evals.benchmarks.scoring import machine

    result: dict[str, Any] = {
        "command": " ".join(["OMP_NUM_THREADS=1 python -m evals.benchmarks.ring", *sys.argv[1:]]),
        "machine": machine(1),
        "load": os.getloadavg()[0],
        "tokens": options.tokens,
        "rounds": options.rounds,
        "rate": options.rate,
        "backward_rate": options.backward_rate,
    }
    result["rows"] = [row for ranks in (1, 2, 4) for row in summary(on_ranks(ranks, options.tokens, options.rounds))]
    result["gpus"] = gpus(options.rate, options.backward_rate)
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    (options.out / "ring.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "ring.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
