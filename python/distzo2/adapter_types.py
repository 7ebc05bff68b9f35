"""Types of adapters of the package peft that no forward can train, known without importing it."""

from __future__ import annotations

from typing import Any

from distzo2.errors import DistZO2Error

NO_STEP = {  # and why
    "ADALORA": "it cuts ranks by gradients, which a forward does not make",
    "XLORA": "its forward keeps the scalings of other adapters",
    "POLY": "it needs task ids, which the data do not have",
    "TRAINABLE_TOKENS": "its forward reads the embedding's weights itself; LoRA on embed_tokens works",
}


def kind_of(config: Any) -> str:
    """What peft calls a type of adapter, such as LORA."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def check_steps(config: Any, where: str, more: str = "") -> None:
    """`more` ends the message.

    Raises:
        DistZO2Error: forwards alone cannot train an adapter of `config`, not even one that is in memory.
    """
    tokens = getattr(config, "trainable_token_indices", None)
    kind = "TRAINABLE_TOKENS" if tokens else kind_of(config)
    if kind in NO_STEP:
        what = "LoRA with trainable_token_indices is" if tokens else f"adapters of type {kind} are"
        raise DistZO2Error(f"{where}: {what} not supported: {NO_STEP[kind]}{more}")


def check_adapters(model: Any) -> None:
    """
    Raises:
        DistZO2Error: a part of `model`, a module, trains an adapter that `check_steps` refuses.
    """
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and any(p.requires_grad for p in module.parameters()):
            for config in configs.values():
                check_steps(config, type(module).__name__)
