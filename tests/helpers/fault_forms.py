"""Which form of the fault tests runs."""

from __future__ import annotations

import os
from types import SimpleNamespace

ALL = bool(os.environ.get("DISTZO2_ALL_FAULTS"))


def arguments(files: SimpleNamespace, *more: str) -> list[str]:
    return [
        "finetune", f"--model={files.model}", f"--train={files.train}", f"--eval={files.eval}", "--out=out",
        "--steps=12", "--batch-size=2", "--lr=3e-4", "--seed=1", "--quiet", "--threads=1",
        "--eval-every=6", "--score=loss", "--snapshot-every=3", "--snapshot-pace=1", "--save=best", "--no-check", *more,
    ]  # fmt: skip
