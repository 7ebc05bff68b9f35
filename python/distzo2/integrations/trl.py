"""TRL's trainers by zeroth-order steps: supervised fine-tuning, DPO, KTO, reward models, and GRPO.

TRL computes log-probabilities with a fused head, which reads `lm_head.weight` outside of lm_head's forward. Around it
the head's window is opened: `model(..., fused_lm_head=True)` asks `get_output_embeddings()` for the head when it has
run the backbone, and is done with it when it returns. That holds for the versions in TESTED; where another version
reads the head earlier, the use guard of DistZO2 raises an error that names the parameter.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from collections import defaultdict
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from distzo2.errors import UsageError
from distzo2.integrations.arguments import ZOFields
from distzo2.integrations.transformers import ZOMixin
from distzo2.parallel import group as parallel
from distzo2.streaming.offload import present
from distzo2.version import release, require

require(trl="1.16", datasets="4.0")

import trl  # noqa: E402

TESTED = ("1.16",)

if ".".join(map(str, release(version("trl"))[:2])) not in TESTED:
    warnings.warn(
        f"distzo2.integrations.trl is tested with trl {', '.join(TESTED)}, and this is {version('trl')}: if an error "
        "names lm_head.weight, install a version that is tested",
        stacklevel=2,
    )

_fused = threading.local()  # stack: the windows of the fused forward that runs in this thread


class ZOTRLMixin(ZOMixin):
    """`ZOMixin` for trainers of TRL: opens the fused head, and averages the metrics of a step over ranks.

    Raises:
        UsageError: the trainer generates what it trains on (GRPO, RLOO), and there are several ranks.
    """

    def create_accelerator_and_postprocess(self) -> None:
        if hasattr(self.args, "num_generations") and parallel.world_size_of_environment() > 1:
            raise UsageError("GRPO and RLOO by ZO run on one rank: TRL deals completions to ranks by a plan of its own")
        super().create_accelerator_and_postprocess()

    def zo_hand_over(self, model: nn.Module) -> nn.Module:
        _open_fused_head(super().zo_hand_over(model))
        return model

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mesh = parallel.current()
        if mesh is not None and "loss" in logs:
            self._metrics["train"] = _over_ranks(mesh, self._metrics["train"])
        super().log(logs, *args, **kwargs)


def _over_ranks(mesh: parallel.Mesh, metrics: dict[str, list[float]]) -> dict[str, list[float]]:
    """The mean over data ranks of what each has gathered since the last log; numbers of tokens are added up."""
    rows = mesh.exchange.gather_bytes(json.dumps({key: sum(val) / len(val) for key, val in metrics.items()}).encode())
    merged: dict[str, list[float]] = defaultdict(list)
    for row in rows[:: mesh.shape.pert]:  # the first rank of each data coordinate has them
        for key, value in json.loads(row).items():
            merged[key].append(value)
    if "num_tokens" in merged:
        merged["num_tokens"] = [sum(merged["num_tokens"])]
    return merged


def _open_fused_head(model: nn.Module) -> None:
    """Opens the head's window where TRL's fused forward asks for the head, until that forward ends."""
    base = model.get_base_model() if is_peft_model(model) else model
    if "get_output_embeddings" in vars(base) or not hasattr(base, "get_output_embeddings"):
        return
    find = base.get_output_embeddings

    def get_output_embeddings() -> nn.Module | None:
        head = find()
        if head is not None and getattr(_fused, "stack", None) is not None:
            _fused.stack.enter_context(present(head))
        return head

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _fused.stack = ExitStack() if kwargs.get("fused_lm_head") else None

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        stack, _fused.stack = getattr(_fused, "stack", None), None
        if stack is not None:
            stack.close()

    base.get_output_embeddings = get_output_embeddings
    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, always_call=True)


@dataclasses.dataclass
class ZOSFTConfig(ZOFields, trl.SFTConfig):
    """`trl.SFTConfig` with the fields of ZO."""


@dataclasses.dataclass
class ZODPOConfig(ZOFields, trl.DPOConfig):
    """`trl.DPOConfig` with the fields of ZO."""


@dataclasses.dataclass
class ZOKTOConfig(ZOFields, trl.KTOConfig):
    """`trl.KTOConfig` with the fields of ZO."""


@dataclasses.dataclass
class ZORewardConfig(ZOFields, trl.RewardConfig):
    """`trl.RewardConfig` with the fields of ZO."""


@dataclasses.dataclass
class ZOGRPOConfig(ZOFields, trl.GRPOConfig):
    """`trl.GRPOConfig` with the fields of ZO. Its default `num_iterations=1` is refused: 2 works."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, every = self.gradient_accumulation_steps, self.steps_per_generation * self.num_iterations
        if steps % every == 0:  # TRL then takes the policy that is trained for the old one, and their ratio is 1
            raise UsageError(
                f"num_iterations={self.num_iterations}, with steps_per_generation={self.steps_per_generation} and "
                f"gradient_accumulation_steps={steps}: completions are new in every step. The value of the loss does "
                "not depend on the weights then, only its gradient does, so that both evaluations of a probe are equal "
                f"and nothing is learned; num_iterations={2 * steps // self.steps_per_generation} works"
            )


class ZOSFTTrainer(ZOTRLMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` by zeroth-order steps, with `ZOSFTConfig`."""


class ZODPOTrainer(ZOTRLMixin, trl.DPOTrainer):
    """`trl.DPOTrainer` by zeroth-order steps, with `ZODPOConfig`. A reference model streams too."""


class ZOKTOTrainer(ZOTRLMixin, trl.KTOTrainer):
    """`trl.KTOTrainer` by zeroth-order steps, with `ZOKTOConfig`."""


class ZORewardTrainer(ZOTRLMixin, trl.RewardTrainer):
    """`trl.RewardTrainer` by zeroth-order steps, with `ZORewardConfig`."""


class ZOGRPOTrainer(ZOTRLMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` by zeroth-order steps on one rank, with `ZOGRPOConfig`."""
