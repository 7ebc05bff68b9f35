"""Published hyperparameters: what `--protocol mezo` sets.

They are those of MeZO's large_models/mezo.sh, with the rates that its README gives for OPT-13B
(https://arxiv.org/abs/2305.17333, https://github.com/princeton-nlp/MeZO).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MEZO = {
    "schedule": "constant", "max_length": 2048, "estimator": "spsa", "probes": 1, "noise": "normal",
}  # fmt: skip
TUNED_BY = {"adapter": "lora", "gain": "gain"}  # what --tune comes to where nothing else says it
# By what is trained. What the protocol does not train (a prompt, gains, an adapter of some kind) keeps its usual rate.
_MEZO_RATES = {None: {"lr": 1e-7, "eps": 1e-3}, "lora": {"lr": 5e-5, "eps": 1e-2}, "prefix": {"lr": 1e-3, "eps": 1e-1}}
_MEZO_EVALUATED = {"eval_every": 4_000, "score": "loss", "save": "best"}


def protocol(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the protocol in `values` sets, by what is trained; none without a protocol.

    Args:
        values: options by name, as a command line or a file gives them.
    """
    if values.get("protocol") is None:
        return {}
    more = _MEZO_EVALUATED if values.get("task") or values.get("eval") else {}
    method = values.get("peft") or TUNED_BY.get(values.get("tune"))
    rates = {} if values.get("adapter") else _MEZO_RATES.get(method, {})
    return {"batch_size": 16, "steps": 20_000} | rates | _MEZO | more


def line_of(values: Mapping[str, Any]) -> str:
    """One line that says what a run's protocol sets, and what the run has instead where an option was given."""
    parts = []
    for name, value in protocol(values).items():
        other = "" if values[name] == value else f" ({values[name]} was given)"
        parts.append(f"{name.replace('_', '-')} {value}{other}")
    return f"protocol {values['protocol']}: {', '.join(parts)}"
