"""DistZO2 in the trainers of others: `integrations.transformers` and `integrations.trl`. Nothing else imports them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from distzo2.errors import DistZO2Error

INSTALL = "pip install --no-build-isolation '.[hf]'"


class MissingPackageError(DistZO2Error, ImportError):
    """A package that an integration needs is not installed, or is too old."""


def require(*, optional: bool = False, **floors: str) -> None:
    """Checks that packages are installed, in at least the given versions; with `optional` they may be missing.

    Raises:
        MissingPackageError: one is missing or too old; says which version is needed and what to install.
    """
    for package, floor in floors.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            if optional:
                continue
            raise MissingPackageError(f"{package} is not installed: {INSTALL}") from None
        if release(found) < release(floor):
            raise MissingPackageError(f"{package} {found} is too old, {floor} or later is needed: {INSTALL}")


def release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (5, 23, 0) of "5.23.0.dev0"."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", text)[0].split(".")))


require(transformers="5.20", accelerate="1.10")
require(optional=True, peft="0.18", datasets="4.0")
