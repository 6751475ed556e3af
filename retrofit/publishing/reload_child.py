"""The program of the fresh process: load a folder with stock transformers, score tokens, run our load snippet.

Run as a file by `retrofit/fresh_child.py`, never imported: it must show that nobody needs this package to use the
checkpoint, so it makes `retrofit` impossible to import before it does anything else.
"""

import contextlib
import importlib
import io
import os
import sys
import time
from importlib.abc import MetaPathFinder
from typing import Any

MAX_GENERATED = 2000  # characters of generated text that are kept


class _Blocked(MetaPathFinder):
    """Refuses `retrofit`, also where an editable install has put it on the path."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] == "retrofit":
            raise ModuleNotFoundError("retrofit is blocked in this process", name=fullname)


def require_stock() -> None:
    """Fail unless `import retrofit` fails and none of its modules is loaded."""
    try:
        importlib.import_module("retrofit")
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("retrofit can be imported here, so this proves nothing")
    loaded = [name for name in sys.modules if name.split(".")[0] == "retrofit"]
    if loaded:
        raise SystemExit(f"modules of retrofit are loaded: {loaded}")


def token_losses(model: Any, input_ids: Any, chunk: int) -> Any:
    """float32 [T - 1]: -log p of each token, a chunk of rows at a time with a cache (fp32 log-softmax)."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.as_tensor(input_ids, dtype=torch.long)[None]
    losses = []
    for start in range(0, ids.shape[1] - 1, chunk):
        stop = min(start + chunk, ids.shape[1] - 1)
        logits = model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses).numpy()


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Score `documents` (lists of token ids) in `dtype`, `chunk` tokens at a time, and run `snippet`; the folder is the
    one that this process was started in."""
    sys.meta_path.insert(0, _Blocked())
    require_stock()
    began = time.monotonic()
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        ".", dtype=getattr(torch, job["dtype"]), output_loading_info=True, trust_remote_code=False
    )
    model, loading = loaded
    del loaded
    model.eval()
    with torch.no_grad():
        losses = [token_losses(model, ids, job["chunk"]).tolist() for ids in job["documents"]]
    model_class = type(model)
    del model

    shown = io.StringIO()
    names: dict = {"__name__": "__main__"}
    with contextlib.redirect_stdout(shown):
        exec(compile(job["snippet"], "the load snippet", "exec"), names)
    new_tokens = names["output"].shape[-1] - names["inputs"]["input_ids"].shape[-1]
    require_stock()
    return {
        "losses": losses,
        "loading": {key: sorted(map(str, loading.get(key) or ())) for key in ("missing_keys", "unexpected_keys")}
        | {"mismatched_keys": sorted(str(key) for key in loading.get("mismatched_keys") or ())},
        "architecture": model_class.__name__,
        "stock": model_class.__module__.startswith("transformers."),
        "generated": shown.getvalue()[:MAX_GENERATED],
        "new_tokens": int(new_tokens),
        "seconds": time.monotonic() - began,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "isolated": bool(sys.flags.isolated),
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
    }
