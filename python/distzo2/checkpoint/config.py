"""What a checkpoint says of its model: configuration, class, settings of generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from distzo2.checkpoint.reading import CONFIG_FILE, adapter_in
from distzo2.checkpoint.tensor_files import CheckpointError, read_json
from distzo2.checkpoint.writing import GENERATION_FILE
from distzo2.errors import refusing

# Where configurations say how weights are quantized.
QUANT_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config", "quantize_config")
_CODE_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")  # may name kernels of a hub


def parts_of(config: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects in a configuration, itself included."""
    todo: list[Any] = [config]
    while todo:
        part = todo.pop()
        todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict):
            yield part


def load_config(directory: Path) -> Any:
    """The transformers configuration of a directory, without its quantisation, for which transformers would replace
    modules by its own. No code that comes with it, or from a hub, is run.

    Raises:
        CheckpointError: there is none that transformers knows, or it asks for code.
    """
    from transformers import AutoConfig

    path = directory / CONFIG_FILE
    if not path.is_file():
        found = adapter_in(directory) or "found none"
        raise CheckpointError(f"{directory}: expected a checkpoint directory with a config.json, {found}")
    for part in parts_of(read_json(path)):
        for key in _CODE_KEYS:
            if "/" in str(part.get(key)):
                raise CheckpointError(f"{path}: {key} names code from elsewhere, {str(part[key])[:80]!r}: not run")
    with refusing(f"{path}: not a configuration that transformers knows", CheckpointError):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if getattr(part, "return_dict", True) is False:  # transformers' own forwards need the names of inner outputs
            part.return_dict = True
        for key in QUANT_KEYS:
            if part is not None and hasattr(part, key):
                delattr(part, key)
    return config


def load_generation_config(directory: Path, model: nn.Module) -> Any:
    from transformers import GenerationConfig

    path = directory / GENERATION_FILE
    if not path.is_file():
        return getattr(model, "generation_config", None)
    read_json(path)  # checks its length
    with refusing(str(path), CheckpointError):
        return GenerationConfig.from_pretrained(directory, local_files_only=True)


def class_of(directory: Path, config: Any, auto_class: Any) -> Any:
    """The concrete model class for a checkpoint (see `from_pretrained`)."""
    import transformers

    def resolve(auto: Any) -> Any:
        known = auto._model_mapping.get(type(config), None)
        return known[0] if isinstance(known, (list, tuple)) else known

    if auto_class is not None:
        chosen = resolve(auto_class) if hasattr(auto_class, "_model_mapping") else auto_class
        if chosen is None:
            raise CheckpointError(f"{directory}: {auto_class.__name__} has no model for {type(config).__name__}")
        return chosen
    causal, base = resolve(transformers.AutoModelForCausalLM), resolve(transformers.AutoModel)
    names = getattr(config, "architectures", None)
    saved_from = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    chosen = getattr(transformers, saved_from, None)
    if chosen is None and saved_from and getattr(config, "auto_map", None):
        raise CheckpointError(f"{directory}: {saved_from} needs code that comes with the checkpoint, which is not run")
    if chosen in (None, base):
        chosen = causal or base
    if chosen is None:
        raise CheckpointError(f"{directory}: transformers has no model class for {type(config).__name__}")
    return chosen
