"""Give a model fewer KV heads, measure it beside the original, and print what was saved and what was lost.

    python examples/smaller_cache.py --model embedded --kv-heads 1 --lengths 1024 4096 --out out/smaller

The conversion reads calibration text; `--method mean` reads none and shows what calibration is worth. Run it again
after a stop: every call resumes where it was, and what has ended is not done again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import retrofit


def main(arguments: list[str] | None = None) -> None:
    """Convert, evaluate twice, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded", help="hub id, folder, .gguf file, or `embedded`")
    parser.add_argument("--kv-heads", type=int, default=1, help="KV heads per layer afterwards")
    parser.add_argument("--method", default="calibrated", choices=["calibrated", "mean", "first"])
    parser.add_argument(
        "--text", nargs="*", default=[], help="what to measure on; by default Python's documentation and code"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="context lengths")
    parser.add_argument("--out", type=Path, default=Path("out/smaller"), help="folder for all results")
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    before = retrofit.inspect(options.model)
    converted = retrofit.convert(
        options.model, kv_heads=options.kv_heads, method=options.method, out=options.out / "model"
    )
    after = retrofit.inspect(converted.folder)

    measured = {"original": options.model, "converted": converted.folder}
    for name, model in measured.items():
        losses = options.out / f"{name}.npz"
        retrofit.evaluate(model, text=options.text, lengths=options.lengths, documents=1, out=losses)
    comparison = retrofit.compare(options.out / "original.npz", options.out / "converted.npz")

    print(f"KV cache: {before.kv_bytes_per_token:,} -> {after.kv_bytes_per_token:,} bytes a token")
    for row in comparison.rows:
        print(
            f"{row.kind}, {row.length:,} tokens: perplexity {row.ppl_a:.2f} -> {row.ppl_b:.2f}, "
            f"{row.ratio:.3f} times ({row.low:.3f} to {row.high:.3f})"
        )


if __name__ == "__main__":
    try:
        main()
    except retrofit.UserError as error:
        sys.exit(str(error))
