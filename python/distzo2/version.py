"""The version of the package, and those of packages that it may use."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from distzo2.errors import MissingPackageError

__version__ = "0.1.0"

INSTALL_HF = "pip install --no-build-isolation '.[hf]'"  # what brings peft, trl, accelerate and datasets


def release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (5, 23, 0) of "5.23.0.dev0"."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", text)[0].split(".")))


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
            raise MissingPackageError(f"{package} is not installed: {INSTALL_HF}") from None
        if release(found) < release(floor):
            raise MissingPackageError(f"{package} {found} is too old, {floor} or later is needed: {INSTALL_HF}")
