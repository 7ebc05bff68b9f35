"""The peft package, which is optional: whether it is there, and which of its adapters can be trained or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distzo2.adapter_types import check_steps, kind_of
from distzo2.checkpoint.reading import ADAPTER_FILE
from distzo2.checkpoint.tensor_files import CheckpointError, read_json
from distzo2.errors import DistZO2Error, blaming
from distzo2.version import require

WORKING = ("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "IA3", "LOHA", "LOKR", "OFT", "HRA", "MISS")
_NOT_SAVED = {"P_TUNING": "peft saves what its network makes and not the network, so that no run could resume it"}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initial values that are taken out of the base
_NOT_OF_LORA = {  # fields of its configuration that must be empty, and why
    "layer_replication": "it makes another model",
    "use_qalora": "it needs quantized weights",
    "loftq_config": "it needs quantized weights",
    "alora_invocation_tokens": "its forward looks for tokens in the whole input",
    "arrow_config": "it routes between other adapters",
    "ensure_weight_tying": "the copies of tied weights would be saved once and are two in the model",
}


def peft_library() -> Any:
    """The module `peft`.

    Raises:
        DistZO2Error: it is not installed, cannot be imported, or is older than what is tested.
    """
    require(peft="0.18")
    with blaming("the package peft, which an adapter needs"):
        import peft
    return peft


def read_config(directory: Path) -> Any:
    """The checked `PeftConfig` of an adapter's directory, as one to be trained further.

    Raises:
        CheckpointError: there is no adapter. DistZO2Error: one that cannot be used.
    """
    if not (directory / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{directory}: expected the directory of an adapter, with {ADAPTER_FILE}")
    with blaming(f"{directory / ADAPTER_FILE}: not a configuration that peft knows"):
        config = peft_library().PeftConfig.from_pretrained(str(directory))
    check(config, str(directory), new=False)
    config.inference_mode = False  # else prompts are read past the forward of their module
    return config


def method_of(directory: str | None) -> str | None:
    """What `--peft` calls the adapter in a directory, by its configuration; None where there is none."""
    if directory is None or not (path := Path(directory, ADAPTER_FILE)).is_file():
        return None
    return {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}.get(read_json(path).get("peft_type"), "lora")


def check(config: Any, where: str, *, new: bool) -> None:
    """
    Raises:
        DistZO2Error: forwards alone cannot train, or with `new` not initialise, an adapter of `config`, or its files do
            not hold all of it.
    """
    check_steps(config, where, f"; these are: {', '.join(WORKING)}")
    kind = kind_of(config)
    if kind not in WORKING:
        why = f": {_NOT_SAVED[kind]}" if kind in _NOT_SAVED else ""
        raise DistZO2Error(f"{where}: adapters of type {kind} are not supported{why}; these are: {', '.join(WORKING)}")
    if getattr(config, "prefix_projection", False):
        raise DistZO2Error(f"{where}: prefix_projection: peft saves the prefix and not the network that makes it")
    if kind != "LORA":
        return
    for name, why in _NOT_OF_LORA.items():
        if getattr(config, name, None):
            raise DistZO2Error(f"{where}: LoRA with {name} is not supported: {why}")
    start = config.init_lora_weights
    if new and (start not in (True, False, "gaussian") or config.use_dora):
        asked = "use_dora" if config.use_dora else f"init_lora_weights={start!r}"
        raise DistZO2Error(
            f"{where}: {asked} starts from the base's weights or gradients, which are not loaded yet: make the adapter "
            "with peft, save it, and give its directory"
        )
    if str(start).lower().startswith(_CHANGES_BASE):
        advice = "save it with peft's path_initial_model_for_weight_conversion"
        raise DistZO2Error(f"{where}: init_lora_weights={start!r} has changed the base's weights: {advice}")
