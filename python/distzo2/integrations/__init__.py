"""DistZO2 in the trainers of others: `integrations.transformers` and `integrations.trl`. Nothing else imports them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from distzo2.errors import DistZO2Error
from distzo2.version import INSTALL_HF, release


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
            raise MissingPackageError(f"{package} is not installed: {INSTALL_HF}") from None
        if release(found) < release(floor):
            raise MissingPackageError(f"{package} {found} is too old, {floor} or later is needed: {INSTALL_HF}")


require(transformers="5.20", accelerate="1.10")
require(optional=True, peft="0.18", datasets="4.0")
