"""What a trainer's run keeps beside its checkpoints, and where a call of `train` begins.

In the output directory lie `journal.jsonl`, which leads from the base weights to every step, and `zo_state/`: the state
of the trainer (evaluations, the best metric, the patience of early stopping) and of its schedule. A killed run
continues after the journal's last step, whatever checkpoints there are.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from distzo2.errors import UsageError
from distzo2.record.journal import read_journal
from distzo2.record.lineage import BranchPoint

logger = logging.getLogger("distzo2")
JOURNAL = "journal.jsonl"
_STATE, _SCHEDULER = "trainer_state.json", "scheduler.pt"


@dataclass(frozen=True)
class Start:
    """Where `train` begins: after `step` steps of the journal (None: the run is new). Where that is not its last step,
    the journal was moved to `parent`."""

    step: int | None = None
    parent: str | None = None

    @property
    def branch(self) -> BranchPoint | None:
        return None if self.parent is None else BranchPoint(self.parent, self.step)


class RunFiles:
    """The files of the run in `directory`. Ranks may call what reads; rank 0 alone calls what writes."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.journal, self.state = self.directory / JOURNAL, self.directory / "zo_state"

    def start(self, resume: str | bool | None, existing: str) -> Start:
        """Decides where `train` begins, and makes the files ready for it.

        Args:
            resume: `resume_from_checkpoint` of `train`: True for the journal's last step (with `existing` "resume", for
                the first where there is no run), a checkpoint for its step.
            existing: `zo_existing`.

        Raises:
            UsageError: there is a run and `existing` is "error", or there is none to resume, or the checkpoint is of
                another run.
        """
        exists = self.journal.exists()
        if resume is True and existing == "resume" and not exists:
            resume = None
        if resume or (exists and existing == "resume"):
            if not exists:
                raise UsageError(
                    f'{self.journal} does not exist: there is no run to resume; zo_existing="resume" begins one where '
                    "there is none (zo_journal=False resumes from the weights of a checkpoint)"
                )
            made = len(read_journal(self.journal).entries)
            step = self._step_of(Path(resume)) if isinstance(resume, (str, os.PathLike)) else made
            if step > made:
                raise UsageError(f"{resume} is at step {step}, and {self.journal} holds {made} steps: of another run?")
            self._keep_state_of(step)
            return Start(step, None if step == made else self._move_journal())
        if exists and existing == "error":
            raise UsageError(
                f'{self.directory} holds a run: train(resume_from_checkpoint=True) continues it, zo_existing="resume" '
                'does so wherever there is one, zo_existing="overwrite" removes it'
            )
        if exists:
            self.journal.unlink()
            for path in (self.state, *self.directory.glob("checkpoint-*[0-9]")):
                shutil.rmtree(path, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        return Start()

    def _step_of(self, checkpoint: Path) -> int:
        if not (checkpoint / _STATE).is_file():
            raise UsageError(f"resume_from_checkpoint={str(checkpoint)!r} holds no {_STATE}")
        return TrainerState.load_from_json(str(checkpoint / _STATE)).global_step

    def _keep_state_of(self, step: int) -> None:
        """Makes `zo_state` the latest state that was saved at or before `step`."""
        places = (self.state, *self.directory.glob("checkpoint-*[0-9]"))
        found = {path: self._step_of(path) for path in places if (path / _STATE).is_file()}
        steps = {path: at for path, at in found.items() if at <= step}
        best = max(steps, key=steps.get, default=None)
        if best == self.state:
            return
        shutil.rmtree(self.state, ignore_errors=True)
        for name in (_STATE, _SCHEDULER) if best is not None else ():
            if (best / name).is_file():
                self.state.mkdir(exist_ok=True)
                shutil.copyfile(best / name, self.state / name)

    def _move_journal(self) -> str:
        """Moves the journal aside, as the parent of the one to come."""
        number = next(i for i in range(1, 10**6) if not (self.directory / f"journal-{i}.jsonl").exists())
        parent = self.directory / f"journal-{number}.jsonl"
        self.journal.rename(parent)
        return str(parent)

    def save(self, state: TrainerState, callbacks: list[Any], scheduler: Any) -> None:
        """Saves the state of the trainer and of its schedule; each file is the old one or the new one."""
        self.state.mkdir(parents=True, exist_ok=True)
        for callback in callbacks:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(self.state / f"{_STATE}.tmp"))
        torch.save(scheduler.state_dict(), self.state / f"{_SCHEDULER}.tmp")
        for name in (_STATE, _SCHEDULER):
            os.replace(self.state / f"{name}.tmp", self.state / name)

    def advance(self, step: int) -> int:
        """Sets the step of the saved state to `step`, where the trainer begins; returns the step it was of."""
        self.state.mkdir(exist_ok=True)
        path = self.state / _STATE
        state = TrainerState.load_from_json(str(path)) if path.is_file() else TrainerState()
        before, state.global_step = state.global_step, step
        state.save_to_json(str(path))
        return before

    def fast_forward(self, scheduler: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Brings a new schedule to `step`: from the saved one, where it depends on metrics, or else step by step."""
        if (self.state / _SCHEDULER).is_file():
            saved = torch.load(self.state / _SCHEDULER, weights_only=True)
            before, given = saved.get("base_lrs"), getattr(scheduler, "base_lrs", None)
            if before and given and before != given:
                logger.warning(
                    "learning_rate=%g has no effect: the run keeps the %g it began with", given[0], before[0]
                )
            scheduler.load_state_dict(saved)
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of steps of the schedule before the optimizer's
                while scheduler.last_epoch < step:
                    scheduler.step()
        for group, lr in zip(optimizer.param_groups, getattr(scheduler, "_last_lr", ()), strict=False):
            group["lr"] = lr
