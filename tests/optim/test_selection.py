"""Patterns that choose what is trained."""

from __future__ import annotations

import pytest
from tiny_peft import base_for

from distzo2.errors import UsageError
from distzo2.optim.selection import select


def chosen(**patterns: str) -> set[str]:
    model = base_for("lora_biases")  # an OPT, whose embedding and head are one
    select(model, **patterns)
    return {name.removeprefix("model.decoder.") for name, p in model.named_parameters() if p.requires_grad}


def test_patterns() -> None:
    everything = chosen(freeze="lm_head.weight")
    assert "embed_tokens.weight" not in everything and "embed_positions.weight" in everything
    biases = chosen(train_only="*.bias")
    assert biases and all(name.endswith(".bias") for name in biases)
    assert chosen(train_only="*.bias", freeze="re:layers\\.[01]\\. *norm*") == {
        name for name in biases if name.startswith("layers.2.") and "norm" not in name
    }
    assert chosen(train_only="last:1") == chosen(train_only="model.decoder.layers.2") != set()
    assert chosen(train_only="last:2 lm_head.weight") == chosen(train_only="last:2") | {"embed_tokens.weight"}


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"train_only": "*.bias nothing"}, "--train-only nothing: matches no parameter of OPTForCausalLM, which has"),
        ({"train_only": "*"}, r"--train-only \*: matches all that can be trained"),
        ({"freeze": "re:."}, "--freeze re:.: nothing is left to train"),
        ({"train_only": "*.bias", "freeze": "*.bias"}, "--train-only .* --freeze .*: nothing is left to train"),
        ({"freeze": "re:("}, "--freeze re:.: not a regular expression"),
        ({"train_only": "last:4"}, "--train-only last:4: expected last:1 to last:3"),
    ],
)
def test_what_matches_nothing_or_everything(patterns: dict[str, str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        chosen(**patterns)
