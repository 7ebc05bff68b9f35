"""The version of the package, and those of packages that it may use."""

from __future__ import annotations

import re

__version__ = "0.1.0"

INSTALL_HF = "pip install --no-build-isolation '.[hf]'"  # what brings peft, trl, accelerate and datasets


def release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (5, 23, 0) of "5.23.0.dev0"."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", text)[0].split(".")))
