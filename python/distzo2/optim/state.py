"""An optimizer between its steps: the parameter groups, the updates made so far, and what is saved of them.

Updates are numbered as their steps are, without a gap, whether forwards were run for them here or they are taken over
from a journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from distzo2.errors import DistZO2Error
from distzo2.optim.clipping import CoefficientClip
from distzo2.optim.parameter_groups import group_of_each
from distzo2_core import Update

if TYPE_CHECKING:
    from distzo2.record.entry import StepEntry
    from distzo2.record.journal import Journal
    from distzo2.streaming.runtime import StreamingRuntime

NON_FINITE_LOSS, NON_FINITE_COEFFICIENT = "non-finite loss", "non-finite coefficient"  # why a step was skipped


class OptimizerState(torch.optim.Optimizer):
    """What `ZOSGD` is without its steps."""

    def __init__(
        self,
        runtime: StreamingRuntime,
        params: Iterable[Any],
        defaults: dict[str, float],
        *,
        eps: float,
        num_probes: int,
        noise: str,
        seed: int,
        clip: CoefficientClip,
        max_skipped: int,
    ) -> None:
        """As for `ZOSGD`; `eps` is a float32 value."""
        self._runtime, self._clip = runtime, clip
        self.eps, self.num_probes, self.noise, self.seed = eps, num_probes, noise, seed
        self.max_skipped = max_skipped
        self._skipped_in_row = 0
        self.step_count = 0  # steps made, skipped ones included: the number of the next step
        self.journal: Journal | None = None
        super().__init__(params, defaults)
        self._bind()

    # ---- groups -----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; the updates made so far are applied first."""
        if not hasattr(self, "_epoch"):  # from the constructor
            super().add_param_group(param_group)
            return
        if self.journal is not None:
            raise DistZO2Error(f"the groups of a run are in its journal {self.journal.path}: they cannot change")
        super().add_param_group(param_group)
        try:
            self._bind()
        except BaseException:
            self.param_groups.pop()
            self._bind()
            raise

    def _bind(self) -> None:
        group_of = group_of_each(self._runtime.params, self.param_groups)
        other = self._runtime.owner
        if other is not None and other is not self and other.journal is not None:
            raise DistZO2Error(f"another optimizer of this model is writing the journal {other.journal.path}: close it")
        self._runtime.bind(self, group_of, len(self.param_groups), self.seed)
        self._epoch = self._runtime.epoch

    def _rebase(self) -> None:
        """The weights were replaced (load_state_dict, edit): a journal of the old ones cannot go on."""
        if self.journal is not None:
            raise DistZO2Error(
                f"the weights were replaced from outside, so the journal {self.journal.path} no longer leads to them: "
                "start a new run from a checkpoint of them"
            )
        self._epoch = self._runtime.epoch

    # ---- the updates so far -------------------------------------------------------------------------------------

    def take_over(self, entries: Sequence[StepEntry], first_like: int = 0) -> None:
        """Takes over a journal's steps, those from `first_like` on as if this optimizer had made them; no forward is
        run."""
        self.apply([entry.update for entry in entries], first_like)
        for entry in entries[first_like:]:
            self._skipped_in_row = self._skipped_in_row + 1 if entry.skipped else 0
            if self._skipped_in_row >= self.max_skipped:  # the run ended itself there, and was to go on all the same
                self._skipped_in_row = 0
            if entry.skipped != NON_FINITE_LOSS:
                self._clip.count(bool(entry.extra.get("clipped")))

    def apply(self, updates: Sequence[Update], first_like: int = 0) -> None:
        """Takes over updates made elsewhere (a journal's), as the steps that follow; no forward is run. From step
        `first_like` on, their coefficients count in the running median that clips those to come."""
        for update in updates:
            if update.step != self.step_count:
                raise DistZO2Error(f"update of step {update.step} where step {self.step_count} must follow")
            if len(update.groups) != len(self.param_groups):
                raise DistZO2Error(
                    f"update of step {update.step} has {len(update.groups)} parameter groups, the optimizer has "
                    f"{len(self.param_groups)}"
                )
            self._runtime.push([update])
            if update.step >= first_like:
                self._clip.remember([t.c for t in update.terms])
            self.step_count += 1

    # ---- what is saved ------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """There are no gradients; loops that call it may go on calling it."""

    def state_dict(self) -> dict[str, Any]:
        """Groups (without tensors), seed, step and the updates that stored weights have not got yet: none, since the
        weights are brought up to date here, so that a `model.state_dict()` at any time goes with it."""
        self._runtime.flush()
        state = super().state_dict()
        state["distzo2"] = {
            "seed": self.seed,
            "step": self.step_count,
            "eps": self.eps,
            "noise": self.noise,
            "num_probes": self.num_probes,
            "clip": self._clip.state(),
            "pending": [],
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over groups, seed and step; the model's weights are loaded with `model.load_state_dict`.

        Raises:
            DistZO2Error: the state is not ZOSGD's, its run had another kind of noise, or a journal is being written.
        """
        mine = state_dict.get("distzo2")
        if mine is None:
            raise DistZO2Error("this is not a state of ZOSGD: it has no entry 'distzo2'")
        if self.journal is not None:
            raise DistZO2Error("a run with a journal is resumed from it, with ZOSGD(journal=..., resume=True)")
        for key in ("noise", "num_probes", "eps"):
            if mine[key] != getattr(self, key):
                raise DistZO2Error(f"{key} is {mine[key]!r} in the state and {getattr(self, key)!r} in this optimizer")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "distzo2"})
        self.seed, self.step_count = mine["seed"], mine["step"]
        self._clip.load(mine["clip"])
        self._bind()
