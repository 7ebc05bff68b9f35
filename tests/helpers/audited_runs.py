"""Runs whose snapshots do not depend on how fast the machine is, and what `journal verify --run` says of them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runs import finetune

from distzo2.cli.main import main
from distzo2.record.snapshot_writer import SnapshotWriter

STEPS = 8
SNAPSHOTS = ["step-00000002", "step-00000004", "step-00000006"]


def make_run(files: SimpleNamespace, out: Path, *options: str) -> Path:
    """A finished run of 8 steps with snapshots of steps 2, 4 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("offer", "step_done"):
            patch.setattr(SnapshotWriter, name, _when_idle(getattr(SnapshotWriter, name)))
        snapshots = ["--snapshot-every=2", "--snapshot-pace=1", "--keep=3"]
        assert finetune(files, f"--steps={STEPS}", *snapshots, f"--out={out}", *options) == 0
    assert sorted(os.listdir(out / "snapshots")) == SNAPSHOTS
    return out


def _when_idle(method: Callable[..., None]) -> Callable[..., None]:
    """A method of the writer, called once its thread has done what it was given: each unit is then copied in the first
    step in which it comes by."""

    def call(self: SnapshotWriter, *args: Any) -> None:
        while self._errand.task:
            assert self._thread.is_alive()
            time.sleep(0.0005)
        method(self, *args)

    return call


def copied(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to, symlinks=True)


def verify(capsys: pytest.CaptureFixture[str], run: Path) -> SimpleNamespace:
    """What `journal verify RUN --run` prints: findings, notes and the last line; it and the exit status agree."""
    capsys.readouterr()
    status = main(["journal", "verify", str(run), "--run"])
    captured = capsys.readouterr()
    assert captured.err == "" and all(c.isprintable() or c == "\n" for c in captured.out)
    *lines, last = captured.out.splitlines()
    notes = [line for line in lines if line.startswith("note: ")]
    findings = [line for line in lines if line not in notes]
    assert status == (1 if findings else 0)
    assert (": not in order: " if findings else ": in order: ") in last, last
    return SimpleNamespace(findings=findings, notes=notes, last=last)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
