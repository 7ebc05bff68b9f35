"""The fields that ZO adds to a trainer's arguments, and what of the trainer's own cannot go with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from distzo2.errors import DistZO2Error, UsageError
from distzo2.estimators.registry import ESTIMATORS
from distzo2.estimators.schedules import SCHEDULES
from distzo2.optim.settings import make_settings
from distzo2.option_types import num_bytes
from distzo2.streaming.offload import WEIGHTS
from distzo2_core import FAMILIES

EXISTING = ("error", "overwrite", "resume")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")

# Fields of the trainers that are refused where they are set, and why.
_REFUSED = {
    "deepspeed": "weights stream through DistZO2, not DeepSpeed; several ranks share a step with torchrun alone",
    "fsdp": "weights stream through DistZO2, not FSDP; several ranks share a step with torchrun and zo_slice",
    "parallelism_config": "several ranks share a step by zo_pert and zo_data",
    "torch_compile": "a compiled model skips the hooks by which weights become present; compile its blocks instead",
    "bf16_full_eval": "weights that stream cannot be cast; zo_compute_dtype sets what modules compute in",
    "fp16_full_eval": "weights that stream cannot be cast; zo_compute_dtype sets what modules compute in",
    "fp16": "there are no gradients to scale; bf16=True computes under autocast, zo_compute_dtype='float16' in float16",
    "neftune_noise_alpha": "its noise on embeddings would be noise in the difference of two losses",
    "auto_find_batch_size": "a step that runs out of memory ends the run; zo_max_lanes lowers what a step needs",
    "sync_ref_model": "it mixes weights in place; ref_model is fixed, and an adapter's base is its own reference",
    "use_liger_kernel": "its kernels read lm_head.weight outside of lm_head's forward",
}


# Options of `ZOSGD` that do not change while it steps, and their fields.
_OF_OPTIMIZER = {
    "seed": "seed", "eps": "zo_eps", "num_probes": "zo_probes", "noise": "zo_noise", "estimator": "zo_estimator",
    "max_coef": "zo_max_coef", "max_lanes": "zo_max_lanes", "fsync_every": "zo_fsync_every",
    "verify_every": "zo_verify_every", "momentum": "zo_momentum", "momentum_window": "zo_momentum_window",
    "clip_percentile": "zo_clip_percentile",
}  # fmt: skip


def _field(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text} | ({"choices": list(choices)} if choices else {}))


# HfArgumentParser evaluates the annotations of the class that it is given, so that those here may be strings.
@dataclasses.dataclass
class ZOFields:
    """Fields for any `TrainingArguments`: `@dataclass class MyArguments(ZOFields, TheirArguments): ...`."""

    zo_eps: float = _field(1e-3, "Size of the perturbation.")
    zo_eps_schedule: str = _field("constant", "How zo_eps falls over the steps, after the warm-up.", SCHEDULES)
    zo_eps_final: float = _field(0.1, "The share of zo_eps that its schedule ends at.")
    zo_probes: int = _field(1, "Perturbations a step; forwards of the batch: 2K, by fzoo K + 1, by 1.5spsa 2K + 1.")
    zo_noise: str = _field("normal", "Kind of noise.", tuple(FAMILIES))
    zo_estimator: str = _field("spsa", "How losses become coefficients.", tuple(ESTIMATORS))
    zo_max_coef: float | None = _field(10.0, "Clip coefficients to this multiple of their running median.")
    zo_clip_percentile: float | None = _field(None, "Clip them to this running percentile instead.")
    zo_momentum: float = _field(0.0, "What the terms of earlier steps are multiplied by, for each step of age.")
    zo_momentum_window: int | None = _field(
        None, "Steps whose terms an update lists; until they are negligible if unset."
    )
    zo_anchor: float = _field(0.0, "Pull towards the weights at the start, times the learning rate, a step.")
    zo_dropout: bool = _field(False, "Train with dropout, the same in both evaluations of a probe.")
    zo_max_lanes: int | None = _field(None, "Evaluations that share a pass over the weights, for memory; all if unset.")
    zo_weights: str = _field("host", "Where streamed weights live.", WEIGHTS)
    zo_directory: str | None = _field(None, "Directory of the weight file of zo_weights=disk; output_dir if unset.")
    zo_memory_budget: str | None = _field(None, "Bytes of the device for weights, such as 12GiB, or auto.")
    zo_host_memory: str | None = _field(None, "Bytes of the machine's memory for the weights of all ranks, or auto.")
    zo_write_every: int = _field(1, "Write a streamed block back at every N-th step, blocks in turn.")
    zo_compute_dtype: str | None = _field(None, "Dtype that modules compute in, whatever is stored.", COMPUTE_DTYPES)
    zo_journal: bool = _field(True, "Write every step to output_dir/journal.jsonl, from which a run resumes.")
    zo_existing: str = _field("error", "What to do where output_dir holds a run: error, overwrite or resume.", EXISTING)
    zo_fsync_every: int = _field(1, "Sync the journal to the disk after N steps.")
    zo_pert: int | None = _field(None, "Ranks along perturbations.")
    zo_data: int | None = _field(None, "Ranks along micro-batches.")
    zo_slice: bool | None = _field(None, "Each rank of a machine keeps a slice of every block; measured if unset.")
    zo_verify_every: int = _field(0, "Compare the weights of all ranks after every N steps.")

    def __post_init__(self) -> None:
        """Checks what can be checked without a model.

        Raises:
            UsageError: a field has no value that was expected, or is refused; says why, and what to use.
        """
        for name, reason in _REFUSED.items():
            if getattr(self, name, None):
                raise UsageError(f"{name}={getattr(self, name)!r} cannot go with ZO: {reason}")
        if OptimizerNames(self.optim) != OptimizerNames(type(self).optim):
            raise UsageError(f"optim={self.optim!r}: the optimizer is ZOSGD; zo_estimator and zo_noise are its choices")
        allowed = {"zo_existing": EXISTING, "zo_weights": WEIGHTS, "zo_compute_dtype": (*COMPUTE_DTYPES, None)}
        allowed["zo_eps_schedule"] = SCHEDULES
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(str, choices))}")
        for name, least in {"zo_write_every": 1, "zo_verify_every": 0, "zo_pert": 1, "zo_data": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{name}={value!r}: at least {least} was expected")
        if not 0 < self.zo_eps_final <= 1:
            raise UsageError(f"zo_eps_final={self.zo_eps_final!r}: above 0 and at most 1 was expected")
        for name in ("zo_memory_budget", "zo_host_memory"):
            try:
                num_bytes(getattr(self, name))
            except ValueError as error:
                raise UsageError(f"{name}={getattr(self, name)!r}: {error}") from None
        try:
            make_settings(**self._fixed_options(), max_clipped=0, max_skipped=0)
        except DistZO2Error as error:
            option, *rest = str(error).partition("=")
            raise UsageError("".join([_OF_OPTIMIZER.get(option, option), *rest])) from None
        self.bf16 = bool(self.bf16)  # TRL's default is autocast, which costs the difference of two losses its digits
        if self.bf16 and self.zo_compute_dtype is not None:
            raise UsageError(f"bf16=True and zo_compute_dtype={self.zo_compute_dtype!r} contradict: set one of them")
        # Nothing is kept for a backward, there are no gradients to clip, and the mean over ranks is the optimizer's.
        self.gradient_checkpointing = self.activation_checkpointing = self.average_tokens_across_devices = False
        self.max_grad_norm = 0.0
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()  # else ranks on CPUs do not meet
        self.restore_callback_states_from_checkpoint = True  # the patience of early stopping is the run's
        if hasattr(self, "activation_offloading"):  # of TRL
            self.activation_offloading = False
        super().__post_init__()

    @property
    def place_model_on_device(self) -> bool:
        """Weights stay where the hand-over puts them."""
        return False

    def hand_over_options(self) -> dict[str, Any]:
        """The options of `distzo2.offload`, without the device."""
        directory = self.zo_directory or self.output_dir
        return {
            "weights": self.zo_weights,
            "directory": directory if self.zo_weights == "disk" else None,
            "memory_budget": num_bytes(self.zo_memory_budget),
            "host_memory": num_bytes(self.zo_host_memory),
            "write_every": self.zo_write_every,
            "keep_start": self.zo_anchor != 0,
            "compute_dtype": self.zo_compute_dtype and getattr(torch, self.zo_compute_dtype),
        }

    def optimizer_options(self) -> dict[str, Any]:
        """The options of `ZOSGD`, without parameter groups and the journal."""
        pulls = {"weight_decay": self.weight_decay, "anchor": self.zo_anchor}
        return {"lr": self.learning_rate, **pulls, **self._fixed_options()}

    def _fixed_options(self) -> dict[str, Any]:
        return {option: getattr(self, name) for option, name in _OF_OPTIMIZER.items()}
