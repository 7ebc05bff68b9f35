"""Options as dataclasses: the types with their ranges, `option`, a field of one, and values that are checked."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from functools import cache
from inspect import get_annotations
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ByteSize, TypeAdapter, ValidationError
from pydantic import Field as Range

from distzo2.errors import UsageError
from distzo2.text import first_reason


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, not {str(value).lower()}")
    return value


def _float32(value: float) -> float:
    """Steps are computed in float32, which must hold the value."""
    if value and not 2.0**-149 <= abs(value) < 2.0**128:
        raise ValueError("expected a number in the range of float32")
    return value


def num_bytes(value: int | str | None) -> int | str | None:
    """Reads a number of bytes, with a suffix such as MiB or GiB or without; or "auto"; None stays None.

    Raises:
        ValueError: `value` is none of these.
    """
    try:
        return value if value in ("auto", None) else int(_BYTES.validate_python(value))
    except ValidationError:
        raise ValueError("expected a number of bytes (such as 12GiB), or auto") from None


Number = BeforeValidator(_not_bool)
Name = Annotated[str, Range(min_length=1)]
Count = Annotated[int, Number, Range(ge=1, lt=2**32)]  # a journal counts steps in 32 bits
CountOrZero = Annotated[int, Number, Range(ge=0, lt=2**32)]
Seed = Annotated[int, Number, Range(ge=0, lt=2**64)]
Positive = Annotated[float, Number, Range(gt=0), AfterValidator(_float32)]
Decay = Annotated[float, Number, Range(ge=0, lt=1)]
Percent = Annotated[float, Number, Range(gt=0, le=100)]
PositiveOrZero = Annotated[float, Number, Range(ge=0), AfterValidator(_float32)]
Share = Annotated[float, Number, Range(gt=0, le=1)]
Multiple = Annotated[
    Annotated[float, Number, Range(gt=1)] | None,
    BeforeValidator(lambda value: None if str(value).lower() == "none" else value),
]
_BYTES = TypeAdapter(Annotated[ByteSize, Number, Range(ge=1, lt=2**63)])
Bytes = Annotated[int | Literal["auto"] | None, BeforeValidator(num_bytes)]
Threads = Annotated[int, Number, Range(ge=1, le=1024)]
Switch = Annotated[bool, Range(strict=True)]
Stops = Annotated[
    list[Name],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    AfterValidator(lambda value: [text.replace("\\n", "\n") for text in value]),
]
Patterns = Annotated[str, BeforeValidator(lambda value: " ".join(value) if isinstance(value, list) else value)]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ComputeDtype = Literal["auto", "stored", "float32", "bfloat16", "float16"]
Estimator = Literal["spsa", "fzoo", "es", "1.5spsa", "meazo", "spsa-sign"]
Shape = Literal["zscore", "ranks", "group"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]
Noise = Literal["normal", "rademacher", "sign-r1", "sign-r4", "normal-r1", "normal-r4"]
Weights = Literal["device", "host", "disk"]
Store = Literal["affine4", "table4", "affine8", "affine16"]


def option(default: Any, text: str, metavar: str | None = None, **more: Any) -> Any:
    """A field of an options class.

    Args:
        default: MISSING if the option is required.
        text: its line in `--help`.
        metavar: what `--help` calls its value.
        more: `short`, a second flag; `bare`, the value of the flag without a value; `positional`, whether it is given
            by position; `repeats`, whether it may be given several times; `group`, the title of the group in `--help`
            that begins with it.
    """
    return field(default=default, metadata={"help": text, "metavar": metavar, **more})


Options = TypeVar("Options")


@cache
def types_of(kind: type) -> dict[str, Any]:
    """The types of an options class's fields, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind)}


def groups_of(kind: type) -> dict[str | None, list[Field]]:
    """The fields of an options class under the titles that `--help` gives them, a class's before those of its bases;
    None: no title."""
    known, groups = {f.name: f for f in fields(kind)}, {}
    for base in kind.__mro__:
        title = None
        for name in (name for name in get_annotations(base) if name in known):
            title = known[name].metadata.get("group") or title
            groups.setdefault(title, []).append(known.pop(name))
    return groups


def checked(kind: type, values: Mapping[str, Any], source: str | None = None) -> dict[str, Any]:
    """The values of options by field name, each of its type and in its range.

    Args:
        kind: an options class.
        values: by option name, with "-" or "_".
        source: the file that they come from; None: the command line.

    Raises:
        UsageError: a name is not an option, or a value is not of its kind; the message names source, option and value.
    """
    result = {}
    for key, value in values.items():
        name, shown = key.replace("-", "_"), f"--{key.replace('_', '-')}" if source is None else f"{source}: {key}:"
        if name in (left := getattr(kind, "left", {})):
            raise UsageError(f"{shown} is no longer an option: {left[name]}")
        if name not in types_of(kind):
            raise UsageError(f"{source}: {key!r} is not an option of this command")
        try:
            result[name] = TypeAdapter(types_of(kind)[name]).validate_python(value)
        except ValidationError as error:
            text = value if isinstance(value, str) and value else json.dumps(value, default=str)
            raise UsageError(f"{shown} {text}: {first_reason(error)}") from error
    return result


def made(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """The options of `values`, which `checked` returned, and the defaults of all others.

    Raises:
        UsageError: a required option is missing, or two options do not go together.
    """
    for f in fields(kind):
        if f.default is MISSING and f.name not in values:
            name = f.metadata["metavar"] if f.metadata.get("positional") else "--" + f.name.replace("_", "-")
            raise UsageError(f"{name} is missing")
    return kind(**values)


def read_config(kind: type, path: str | None) -> dict[str, Any]:
    """The checked values in a file of options, which is JSON (.json), YAML (.yaml, .yml) or TOML; none without a file.

    Raises:
        UsageError: the file cannot be read, holds no names and values, or one that `checked` refuses.
    """
    if path is None:
        return {}
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            values = json.loads(text)
        else:
            values = yaml.safe_load(text) if path.endswith((".yaml", ".yml")) else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config {path}: expected option names and values")
    return checked(kind, values, path)
