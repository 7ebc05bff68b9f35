"""The types of options with their ranges, and `option`, a field of an options class."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, TypeAdapter, ValidationError
from pydantic import Field as Range


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
