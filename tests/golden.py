"""What every command gives on tiny models: digests of the bytes it writes and the numbers it reports, as one JSON.

    python -m tests.golden OUT.json            write it
    python -m tests.golden OUT.json BEFORE.json    write it, and list what differs from an earlier one (exit code 1)

For changes that must change nothing: run it before and after, on one machine (another processor may sum in another
order). Seconds, paths, versions and peaks of memory are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny

# Keys of reports whose values belong to the machine or the moment, not to the result.
_OF_THE_MOMENT = (
    "second",
    "time",
    "memory",
    "peak",
    "rss",
    "version",
    "folder",
    "path",
    "host",
    "date",
    "flops_per",
    "bandwidth",
    "rate",
    "per_s",
    "disk",
    "out",
    "processor",
    "threads",
    "fingerprint",
    "measured",
    "bound",
    "prefill",
    "decode_",
)
_CONVERSIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("phi3", {}),
    ("mixtral", {}),
    ("gpt_bigcode", {}),
)


def prose(seed: int, words: int) -> str:
    """Made-up words in made-up order; no two seeds share a sentence."""
    generator = random.Random(seed)
    letters = "etaoinshrdlu"
    known = ["".join(generator.choice(letters) for _ in range(generator.randint(2, 8))) for _ in range(words // 2)]
    return " ".join(generator.choice(known) for _ in range(words)) + "."


def main() -> None:
    """See the module's docstring."""
    target = Path(sys.argv[1]).absolute()
    before = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")) if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory(prefix="golden-") as work, contextlib.chdir(work):
        os.environ["RETROFIT_CACHE"] = f"{work}/cache"
        after = collected(Path(work))
    target.write_text(json.dumps(after, indent=1, sort_keys=True), encoding="utf-8")
    if before is not None:
        differing = sorted(_differing(before, after))
        sys.stdout.write("".join(f"{line}\n" for line in differing) or f"{len(after)} results are the same\n")
        sys.exit(1 if differing else 0)


def collected(work: Path) -> dict[str, Any]:
    """{command: what it gave}."""
    import retrofit

    (work / "train").mkdir()
    for index in range(8):
        (work / "train" / f"{index}.txt").write_text(prose(index, 900), encoding="utf-8")
    for name, seed in (("held.txt", 99), ("other.txt", 123)):
        (work / name).write_text(prose(seed, 2000), encoding="utf-8")
    results: dict[str, Any] = {}

    def note(name: str, call: Callable[[], Any], *folders: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            reported = call()
        results[name] = {
            "reported": _settled(_plain(reported)),
            **{folder: dict(_bytes_of(work / folder)) for folder in folders},
        }

    for index, (family, over) in enumerate(_CONVERSIONS):
        model = save_tiny(work / f"model{index}", family, chat_template=True, **over)
        note(f"inspect {family} {over}", lambda m=model: retrofit.inspect(m))
        for method in ("mean", "calibrated"):
            if family == "gpt_bigcode" and method == "mean":
                continue
            options: dict[str, Any] = {} if method == "mean" else {"calibrate": ["train"], "tokens": 1024}
            out = f"converted-{index}-{method}"
            note(
                f"convert {family} {over} {method}",
                lambda m=model, out=out, method=method, options=options: retrofit.convert(
                    m, out=out, kv_heads=1, method=method, **options
                ),
                out,
            )
    llama = work / "model0"
    for method in ("yarn", "linear", "ntk", "llama3"):
        note(
            f"extend {method}",
            lambda m=method: retrofit.extend(llama, out=f"long-{m}", factor=2, method=m),
            f"long-{method}",
        )
    note("extend gemma2 yarn", lambda: retrofit.extend(work / "model3", out="long-gemma2", factor=2), "long-gemma2")
    for repair in ("o_proj", "transfer"):
        note(
            f"convert repair {repair}",
            lambda r=repair: retrofit.convert(
                llama, out=f"rep-{r}", kv_heads=2, calibrate=["train"], tokens=1024, repair=r
            ),
            f"rep-{repair}",
        )
    note(
        "recover",
        lambda: retrofit.recover(
            work / "converted-0-mean",
            teacher=llama,
            out="recovered",
            text=["train"],
            tokens=1024,
            sequence_length=64,
            rank=4,
        ),
        "recovered",
    )
    note(
        "evaluate",
        lambda: retrofit.evaluate(
            "recovered", text=["held.txt", "other.txt"], lengths=[64, 128, 256], documents=1, needle=[200, 256]
        ),
    )
    note("plan prices", lambda: retrofit.prices(llama, calibrate=["train"], tokens=2048, measure=False))
    recipe = _recipe()
    (work / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    note("plan", lambda: retrofit.plan("recipe.yaml", measure=False))
    note("run", lambda: retrofit.run("recipe.yaml", out="run"), "run")
    results["run"]["metrics"] = _settled(json.loads((work / "run/5-evaluate/metrics.json").read_text())["metrics"])
    note("compare", lambda: retrofit.compare("run/losses/original.npz", "run/losses/recovered.npz", bits=True))
    return results


def _recipe() -> dict[str, Any]:
    return {
        "name": "golden",
        "model": "model0",
        "convert": {
            "kv_heads": 1,
            "method": "calibrated",
            "calibration": {"text": ["train"], "tokens": 1024, "sequence_length": 64},
        },
        "context": {"length": 1024, "method": "yarn"},
        "recover": {
            "tokens": 1024,
            "sequence_length": 64,
            "text": ["train"],
            "evals": 2,
            "eval_tokens": 64,
            "adapter": {"rank": 2, "alpha": 4},
        },
        "evaluate": {
            "lengths": [64, 128, 600],
            "text": ["held.txt", "other.txt"],
            "documents": 1,
            "tail": 32,
            "chunk": 64,
            "cost_lengths": [],
            "resamples": 200,
        },
        "publish": {"license": "apache-2.0", "base_model": "someone/tiny"},
    }


def _plain(value: object) -> Any:
    from retrofit.console import to_json

    return json.loads(to_json(value))


def _settled(value: Any) -> Any:
    """Without what belongs to the machine or the moment; text that names the work folder too."""
    if isinstance(value, dict):
        return {
            key: _settled(item)
            for key, item in value.items()
            if not any(part in key.lower() for part in _OF_THE_MOMENT)
        }
    if isinstance(value, list):
        return [_settled(item) for item in value]
    if isinstance(value, str) and ("golden-" in value or "/" in value):
        return "text with a path"
    return value


def _bytes_of(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, digest) of weights, and of configurations as values."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "moments" in path.parts or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("config.json", "generation_config.json"):
            yield name, json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True)


def _differing(before: Any, after: Any, place: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if key not in before or key not in after:
                yield f"{place}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from _differing(before[key], after[key], f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _differing(old, new, f"{place}/{index}")
    elif before != after:
        yield f"{place}: {str(before)[:120]} -> {str(after)[:120]}"


if __name__ == "__main__":
    main()
