"""From a local checkpoint folder to stock transformers objects. Remote code is never run; only safetensors are read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.config import CONFIG, read_config
from retrofit.checkpoint.side_files import GENERATION
from retrofit.errors import UserError
from retrofit.escape import shown
from retrofit.install import install_command
from retrofit.model.families import is_known
from retrofit.model.foreign import foreign_values
from retrofit.model.patterns import require_bounded
from retrofit.model.sensible import require_sensible
from retrofit.model.side_files import require_no_mark, require_side_files, require_usable, side_file

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")


# What supported configurations call the dropout of attention, residual stream and embeddings.
DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "residual_dropout",
)
# Tables that a configuration's class keeps: a field of that name would change how all others are read.
_OF_THE_CLASS = frozenset(
    {
        "attribute_map",
        "sub_configs",
        "sub_configs_defaults",
        "base_config_key",
        "default_config_fields",
        "default_rope_type",
        "default_theta",
        "ignore_keys_at_rope_validation",
        "nested_rope_parameter_keys",
        "is_custom_code",
        "is_remote_code",
    }
)


def load_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of a checkpoint folder, as the stock transformers class.

    What the class fills in for fields that config.json leaves out is part of it; which attention implementation runs
    the model is not. A leftover `auto_map` is accepted (and dropped) only when it names the very class that
    transformers itself has for this model_type. Raises UserError as `read_config` does, and for remote code, a
    model_type unknown to transformers, values its class refuses, heads for another task, and, where the architecture
    is supported, values that no model can have (`retrofit.model.sensible`).
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stored = read_config(folder)
    model_type, where = stored["model_type"], shown(Path(folder) / CONFIG)
    auto_map = stored.pop("auto_map", None) or {}
    if model_type not in CONFIG_MAPPING:
        if auto_map:
            raise _remote_code(model_type, where)
        raise UserError(
            f"transformers does not know the model type `{shown(model_type, 60)}`",
            where=where,
            fix=f"update transformers if it is new, {install_command('-U', 'transformers')}; or choose another model",
        )
    custom = auto_map.get("AutoModelForCausalLM")
    native = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if custom and str(custom).split(".")[-1] != native:
        raise _remote_code(model_type, where)
    if model_type == "mistral" and "layer_types" in stored:  # as AutoConfig reads it
        model_type = stored["model_type"] = "ministral"
    config_class = CONFIG_MAPPING[model_type]
    _require_fields(config_class, stored, where)
    with foreign_values(f"config.json is no valid `{model_type}` configuration", where, "correct it"), quiet():
        config = config_class.from_dict(stored, name_or_path=str(folder))
        config.standardize_rope_params()  # once more, with all fields in place, as the model does before it computes
    if is_known(config):
        _require_causal(config.architectures, native, where)
        require_sensible(config, where)
        _require_generation(folder)
    return config


def without_memory(config: PretrainedConfig) -> PreTrainedModel:
    """The stock model of a configuration, its parameters on the meta device: shapes and no values."""
    import torch
    from transformers import AutoModelForCausalLM

    where = f"the configuration of {shown(config.name_or_path or config.model_type)}"
    with foreign_values("transformers cannot build the model", where, "correct it"), quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _require_generation(folder: str | Path) -> None:
    """The settings of generation are some that transformers reads, as it does with every load of the model."""
    from transformers import GenerationConfig

    settings, where = side_file(folder, GENERATION), shown(Path(folder) / GENERATION)
    with foreign_values("the settings of generation are none", where, "correct or remove the file"), quiet():
        GenerationConfig.from_dict(settings)


def _require_fields(config_class: Any, stored: dict[str, Any], where: str) -> None:
    """No field stands in the place of a method of the class, or of its tables."""
    for name in stored:
        if name in _OF_THE_CLASS or callable(getattr(config_class, name, None)):
            raise UserError(
                f"config.json has a field `{shown(name, 60)}`, which no configuration has", where=where, fix="remove it"
            )


def _require_causal(architectures: list[str] | None, native: str | None, where: str) -> None:
    """The class named first is a language model; a head that classifies or rewards would be lost."""
    named = (architectures or [native or ""])[0]
    task = re.search(r"For([A-Z]\w*)$", named)
    if task and named != native and "CausalLM" not in task[1] and "Generation" not in task[1]:
        raise UserError(
            f"the checkpoint is a {shown(named, 80)}, not a causal language model",
            where=f"{where}: architectures",
            fix=f"give the language model it was made from; if it is one after all, write {native}",
        )


def load_model(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    kernel: str | None = None,
    dropout: bool = True,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """The stock model of a checkpoint folder in eval mode.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16". kernel: a name transformers knows, by default sdpa,
    or eager for a class without sdpa (Gemma 2); others are applied afterwards by `retrofit.kernels`. dropout: False
    leaves it out in training too. config: of the folder, where it is read already; it becomes the model's own. Raises
    UserError when the weights are not whole: every parameter must come from the checkpoint, with the shape the
    configuration asks for.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from retrofit.checkpoint.read import Checkpoint

    config = load_config(folder) if config is None else config
    if not dropout:
        config.update({name: 0.0 for name in DROPOUTS if hasattr(config, name)})
    Checkpoint.open(folder)
    loader: Any = AutoModelForCausalLM  # its annotations do not know output_loading_info
    try:
        with quiet():
            model, info = loader.from_pretrained(
                str(folder),
                config=config,
                dtype=resolve_dtype(dtype, folder),
                attn_implementation=kernel,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise UserError(
            f"transformers cannot read the weights: {shown(error)}", where=str(folder), fix="download them again"
        ) from error
    require_whole(info, str(folder))
    return model.to(device).eval()


def load_tokenizer(folder: str | Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The stock tokenizer of a checkpoint folder, that of its model. config: of the folder, where it is read already.

    Raises UserError when there is none, none without remote code, broken files, and ids that the model does not have.
    """
    from transformers import AutoTokenizer

    where = shown(folder)
    if config is None and (Path(folder) / CONFIG).exists():
        config = load_config(folder)
    require_side_files(folder)
    if config is not None:
        require_no_mark(Path(folder) / CONFIG)  # transformers reads it for the class of the tokenizer
    require_bounded(folder)
    fix = "put the model's tokenizer files (tokenizer.json, tokenizer_config.json) into the folder"
    with foreign_values("no tokenizer could be loaded", where, fix), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        require_usable(tokenizer, None if config is None else config.get_text_config().vocab_size, where)
    return tokenizer


def resolve_device(device: str) -> str:
    """ "auto" is CUDA where torch sees it, else MPS (the GPU of a Mac), else the CPU.

    Raises UserError for a GPU that is not there.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, there in present.items() if there)
    kind = device.partition(":")[0]
    if not present.get(kind, True):
        raise UserError(
            f"torch sees no {kind.upper()} device", where=f"device: {device}", fix="set device: auto or cpu"
        )
    return device


def multiplies_in_bfloat16(device: str) -> bool:
    """Whether the processor has bfloat16 matrix products of its own (else bfloat16 is slower than float32)."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    if device.startswith("mps"):
        return torch.backends.mps.is_macos_or_newer(14, 0)
    asked = getattr(torch.cpu, "get_capabilities", None)
    if asked is not None:
        capabilities = asked()
        names = ("avx512_bf16", "amx_bf16", "amx_tile", "sve_bf16", "bf16")
        return any(capabilities.get(name, False) for name in names)
    # Older releases of torch answer one question each, and none about Arm.
    older = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(one() for one in older if one is not None)


def product_dtype(device: str) -> torch.dtype | None:
    """What matrix products of float32 numbers are done in where speed counts: bfloat16, or None for their own dtype."""
    import torch

    return torch.bfloat16 if multiplies_in_bfloat16(device) else None


def working_dtype(dtype: str, folder: str | Path, device: str) -> str:
    """What a model is run in: `dtype`, where "auto" is the stored one, or float32 on a processor that does not multiply
    in the stored one (there, bfloat16 matrix products are some fifty times slower than float32)."""
    if dtype != "auto" or device.startswith("cuda") or (device.startswith("mps") and multiplies_in_bfloat16(device)):
        return dtype
    stored = stored_dtype(folder)
    return stored if stored == "float32" or (stored == "bfloat16" and multiplies_in_bfloat16(device)) else "float32"


def resolve_dtype(dtype: str, folder: str | Path) -> torch.dtype:
    """A torch dtype; "auto" is the one that most of the checkpoint's values are stored in."""
    import torch

    if dtype not in ("auto", *DTYPES):
        raise UserError(f"`{dtype}` is not a dtype", where="dtype", fix=f"choose one of: auto, {', '.join(DTYPES)}")
    return getattr(torch, stored_dtype(folder) if dtype == "auto" else dtype)


def stored_dtype(folder: str | Path) -> str:
    """The dtype most values of a checkpoint are stored in; without weights, what config.json says (else float32)."""
    from retrofit.checkpoint.files import holds_weights
    from retrofit.checkpoint.read import Checkpoint

    folder = Path(folder)
    if holds_weights(folder):
        stored = str(Checkpoint.open(folder).main_dtype).removeprefix("torch.")
        if stored in DTYPES:
            return stored
        if stored == "float64":
            return "float32"
        raise UserError(
            f"the weights are stored as {stored}, which is not a floating-point type that models compute in",
            where=str(folder),
            fix="give a checkpoint in float32, bfloat16 or float16",
        )
    config = read_config(folder)
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return named if named in DTYPES else "float32"


def require_whole(info: dict[str, Any], where: str) -> None:
    """Raises UserError when transformers' loading info says that a parameter did not come from the checkpoint."""
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(
            f"the checkpoint lacks {len(info['missing_keys'])} tensors of its architecture, first `{first}`",
            where=where,
            fix="download it again, or check that config.json belongs to these weights",
        )
    if info["mismatched_keys"]:
        name, *shapes = sorted(info["mismatched_keys"], key=lambda entry: entry[0])[0]
        stored, expected = (tuple(shape) for shape in shapes)
        raise UserError(
            f"`{name}` is stored as {stored} but config.json asks for {expected}",
            where=where,
            fix="check that config.json belongs to these weights",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own progress bars and load reports off inside the block; ours say what is going on."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            with warnings.catch_warnings():  # it also wants the hub's bars back, which the environment may forbid
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()


def _remote_code(model_type: str, where: str) -> UserError:
    return UserError(
        f"the model needs code of its own (`{shown(model_type, 60)}`, auto_map), and remote code is never run",
        where=where,
        fix="choose a model whose architecture is part of transformers",
    )
