"""Which parameters are trained: patterns over their names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import nn

from distzo2.errors import UsageError
from distzo2.text import gib
from distzo2.weights.units import ParamInfo, collect_params, find_units


def select(model: nn.Module, train_only: str = "", freeze: str = "") -> None:
    """Sets `requires_grad` of a model's parameters before it is handed over.

    Args:
        model: whose parameters may be on meta.
        train_only: patterns with spaces between, of what stays trainable; without any, everything that is.
        freeze: patterns of what does not, whatever `train_only` says.

    A pattern is a name of a parameter or module, one with shell wildcards (`*` reaches over dots), `re:EXPRESSION`,
    which is searched in the names, or `last:K`, the last K blocks. Tied parameters have several names.

    Raises:
        UsageError: a pattern matches nothing or everything, or nothing is left to train.
    """
    names: dict[int, list[str]] = {}
    params = {id(p): p for p in model.parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    before = {key for key, p in params.items() if p.requires_grad}
    kept = before
    if train_only:
        kept = before & _matched(model, names, "--train-only", train_only)
        if kept == before and len(kept) == len(params):
            raise UsageError(f"--train-only {train_only}: matches all that can be trained: leave it out")
    if freeze:
        kept = kept - _matched(model, names, "--freeze", freeze)
    if not kept:
        given = [f"{flag} {value}" for flag, value in (("--train-only", train_only), ("--freeze", freeze)) if value]
        raise UsageError(f"{' '.join(given)}: nothing is left to train")
    for key, p in params.items():
        p.requires_grad_(key in kept)


def _matched(model: nn.Module, names: dict[int, list[str]], flag: str, patterns: str) -> set[int]:
    """Parameters, by id, one of whose `names` a pattern matches."""
    found: set[int] = set()
    for pattern in patterns.split():
        matches = _test_of(model, flag, pattern)
        hits = {key for key, each in names.items() if any(map(matches, each))}
        if not hits:
            some = ", ".join(each[0] for each in list(names.values())[:3])
            raise UsageError(f"{flag} {pattern}: matches no parameter of {type(model).__name__}, which has {some}, ...")
        found |= hits
    return found


def _test_of(model: nn.Module, flag: str, pattern: str):
    """The function that says whether a name matches `pattern`."""
    kind, _, text = pattern.partition(":")
    if kind == "re":
        try:
            return re.compile(text).search
        except re.error as error:
            raise UsageError(f"{flag} {pattern}: not a regular expression: {error}") from error
    if kind == "last":
        blocks = [unit.name for unit in find_units(model, collect_params(model)) if not unit.resident]
        if not text.isdecimal() or not 0 < int(text) <= len(blocks):
            raise UsageError(f"{flag} {pattern}: expected last:1 to last:{len(blocks)}")
        fronts = tuple(f"{name}." for name in blocks[-int(text) :])
        return lambda name: name.startswith(fronts)
    return lambda name: fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def trained(params: Iterable[ParamInfo]) -> str | None:
    """What is trained of a model that was handed over, as a line; None where that is everything."""
    known: Sequence[ParamInfo] = list(params)
    chosen = [p for p in known if p.trainable]
    if len(chosen) == len(known):
        return None
    values, of = sum(p.numel for p in chosen), sum(p.numel for p in known)
    size = gib(sum(p.num_bytes for p in chosen))
    return f"training {len(chosen)} of {len(known)} parameters: {values:,} of {of:,} values ({values / of:.3%}), {size}"
