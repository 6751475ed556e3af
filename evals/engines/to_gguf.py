"""llama.cpp's converter for the cases, whose tokenizer it does not know: token ids are given directly, so any will do.

Run in the converter's environment in the place of the library's `to_gguf.py`, which it calls.
"""

import json
import runpy
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[2] / "retrofit" / "publishing" / "engines" / "programs" / "to_gguf.py"


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Convert as the library's program does, with a byte-level vocabulary in every architecture."""
    import conversion
    import gguf
    import transformers
    from conversion.base import TextModel

    # A class of its own would add tokens, for which the tiny vocabulary has no rows.
    transformers.AutoTokenizer.from_pretrained = transformers.PreTrainedTokenizerFast.from_pretrained
    known = TextModel.get_vocab_base_pre

    def pre(self: Any, tokenizer: Any) -> Any:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    TextModel.get_vocab_base_pre = pre
    written = gguf.SpecialVocab.add_to_gguf

    def add(self: Any, writer: Any, quiet: bool = False) -> Any:
        self.merges = self.merges or ["a b"]
        return written(self, writer, quiet)

    gguf.SpecialVocab.add_to_gguf = add
    for name in {_architecture(Path(one["folder"])) for one in job["files"]}:
        try:
            conversion.get_model_class(name).set_vocab = lambda self: self._set_vocab_gpt2()
        except NotImplementedError:  # the converter says so itself
            continue
    return runpy.run_path(str(PROGRAM))["main"](job)


def _architecture(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["architectures"][0])
