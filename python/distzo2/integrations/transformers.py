"""`ZOMixin` makes any trainer of transformers, or built on it, train by zeroth-order steps: `ZOTrainer` and its like.

A trainer computes losses. The rest of it stays as it is: data, schedules, evaluation, callbacks, checkpoints.
`training_step` keeps the micro-batches of a step. With the last one the optimizer makes the step, for which it asks for
the loss of each as often as the estimator wants. Backward, clipping and wrappers for gradients do nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import is_peft_model
from torch import nn
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from distzo2.errors import UsageError
from distzo2.estimators.registry import make_estimator
from distzo2.estimators.schedules import factor_of
from distzo2.integrations.arguments import ZOFields
from distzo2.integrations.run_files import RunFiles, Start
from distzo2.models.pretrained import save_pretrained
from distzo2.optim.zosgd import ZOSGD
from distzo2.parallel import group as parallel
from distzo2.parallel.slice_rounds import meet_first
from distzo2.run.launch import from_rank_0
from distzo2.streaming.lanes import current_lane
from distzo2.streaming.offload import offload
from distzo2.streaming.offload import state_dict as state_dict_of

logger = logging.getLogger("distzo2")
_LARGE_RATE = 1e-5  # for all weights of a language model by spsa; 1e-6 is TRL's own default for preferences


class ZOMixin:
    """`class Mine(ZOMixin, MyTrainer): ...` trains by zeroth-order steps with whatever loss `MyTrainer` computes.

    Its arguments are a dataclass with `ZOFields`. The model may be plain, or handed over by `distzo2.offload` or
    `distzo2.from_pretrained`, whose options then count instead of the arguments'. `compute_loss` runs once for each
    micro-batch in each evaluation; `num_items_in_batch` is the micro-batch's own, and the losses become a mean over the
    step's tokens. What it counts belongs under `if distzo2.current_lane().first:`. In evaluations after the first,
    `self` is a copy, whose `_metrics` (those of TRL's trainers) are thrown away.

    Attributes:
        zo_optimizer: the `ZOSGD`, without accelerate's wrapper; None before `train`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args", next((a for a in args if isinstance(a, TrainingArguments)), None))
        if not isinstance(given, ZOFields):
            raise UsageError(
                f"args={type(given).__name__}: {type(self).__name__} needs arguments with the fields zo_..., such as "
                "ZOTrainingArguments, or a dataclass of your own: class MyArguments(ZOFields, TheirArguments)"
            )
        if kwargs.get("peft_config") is not None and hasattr(kwargs.get("model", args and args[0]), "_distzo2_runtime"):
            raise UsageError(
                "peft_config with a model that was handed over: give the plain model, or make the adapter before "
                "distzo2.offload"
            )
        self._zo_closures: list[Callable[[], Any]] = []
        self._zo_files, self._zo_start = RunFiles(given.output_dir), Start()
        self._zo_tokens = 0
        self._zo_unsaved = True  # what evaluations have changed in the trainer's state
        self._zo_missed = False  # the run that is resumed was killed before it evaluated or saved
        self._zo_log = _StepLog()
        super().__init__(*args, **kwargs)
        optimizer, more = self.optimizer, getattr(self, "optimizer_cls_and_kwargs", None)
        if more is not None or not isinstance(optimizer, ZOSGD | None):
            raise UsageError(f"the optimizer must be a distzo2.ZOSGD or left out, got {more or optimizer!r}")
        self._zo_journal = given.zo_journal and optimizer is None  # an optimizer that is given has its own

    @property
    def zo_optimizer(self) -> ZOSGD | None:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # ---- the model, and the ranks ---------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the mesh, once accelerate has met the other ranks, and hands the model over."""
        super().create_accelerator_and_postprocess()
        accelerator, args = self.accelerator, self.args
        for name, found in (
            ("DeepSpeed", self.is_deepspeed_enabled),
            ("FSDP", self.is_fsdp_enabled),
            ("fp16 autocast", accelerator.mixed_precision == "fp16"),
            ("DataParallel", args.n_gpu > 1),
        ):
            if found:
                raise UsageError(f"{name} cannot go with ZO: start one process a GPU with torchrun, without it")
        if parallel.world_size_of_environment() != args.world_size:
            started = parallel.world_size_of_environment()
            raise UsageError(f"torchrun started {started} ranks, and accelerate has met {args.world_size} of them")
        if parallel.current() is None and (args.world_size > 1 or args.zo_pert or args.zo_data):
            try:
                parallel.init(
                    args.zo_pert, args.zo_data, args.zo_slice, device=args.device, log=logger.info,
                    evaluations=make_estimator(args.zo_estimator).evaluations(args.zo_probes),
                )  # fmt: skip
            except UsageError as error:
                raise UsageError(re.sub(r"\b(pert|data)=", r"zo_\1=", str(error))) from None
        if parallel.current() is not None:
            meet_first(parallel.current().exchange)  # the trainer's own collectives then name a rank that is lost
        _hold_off(accelerator, self.zo_hand_over)
        if self.model is not None:
            self.zo_hand_over(self.model)

    def zo_hand_over(self, model: nn.Module) -> nn.Module:
        """Hands a model over, once; `model.train()` then leaves dropout off, unless `zo_dropout` is set.

        Raises:
            DistZO2Error: it has an adapter that forwards cannot train.
        """
        if is_peft_model(model):
            model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)  # what streams has its dtype
        if not hasattr(model, "_distzo2_runtime"):
            os.makedirs(self.args.output_dir, exist_ok=True)
            if model is not self.model:  # a reference, which no optimizer changes
                model.requires_grad_(False)
            offload(model, device=self.args.device, train=self.args.zo_dropout, **self.args.hand_over_options())
        model.train = partial(_train, model, self.args.zo_dropout)
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        self.model = super().call_model_init(trial)
        return self.zo_hand_over(self.model)

    def get_train_dataloader(self) -> Any:
        """Ranks of one data coordinate get the same batches."""
        mesh = parallel.current()
        if mesh is None or mesh.shape.size == 1:
            return super().get_train_dataloader()
        accelerator = self.accelerator
        plain = accelerator.prepare_data_loader

        def prepare(loader: Any, device_placement: bool | None = None, **_: Any) -> Any:
            return prepare_data_loader(
                loader,
                accelerator.device,
                num_processes=mesh.shape.data,
                process_index=mesh.data_rank,
                put_on_device=accelerator.device_placement if device_placement is None else device_placement,
                rng_types=["torch"],  # rank 0's, for samplers that draw from it
                dispatch_batches=False,
                even_batches=accelerator.even_batches,
                use_seedable_sampler=True,
                data_seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            )

        accelerator.prepare_data_loader = prepare
        try:
            return super().get_train_dataloader()
        finally:
            accelerator.prepare_data_loader = plain

    # The trainer adds up its ranks, of which those of one data coordinate have the same batches.

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // _num_pert()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // _num_pert()

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Those of the forwards of a step; the trainer's own count a forward as a third of forward and backward."""
        return super().floating_point_ops(inputs) / 3 * len(self.zo_optimizer.settings.evaluations) / _num_pert()

    # ---- the optimizer, its journal, resuming -----------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args, groups, rate = self.args, None, self.args.learning_rate
            is_default = rate == type(args).learning_rate and rate > _LARGE_RATE
            if is_default and args.zo_estimator == "spsa" and not is_peft_model(self.model):
                logger.warning(
                    "learning_rate=%g is a default made for AdamW: spsa on all weights takes 1e-7 to 1e-6", rate
                )
            if args.weight_decay:  # the trainer's own choice of what decays
                decaying = set(self.get_decay_parameter_names(self.model))
                named = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
                groups = [{"params": [param for name, param in named if name in decaying]}]
                groups += [{"params": [param for name, param in named if name not in decaying], "weight_decay": 0.0}]
                groups = [group for group in groups if group["params"]]
            start, journal = self._zo_start, self._zo_files.journal if self._zo_journal else None
            self.optimizer = ZOSGD(
                self.model, groups, journal=journal, resume=start.step is not None and start.parent is None,
                branch_from=start.branch, **args.optimizer_options(),
            )  # fmt: skip
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._zo_start.step:
            self._zo_files.fast_forward(scheduler, self.zo_optimizer, self._zo_start.step)
        return scheduler

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trains, as the trainer's `train`.

        Args:
            resume_from_checkpoint: True continues after the last step of the journal. The directory of a checkpoint
                continues after its step, and moves the journal so far to another name. The model must be what it was
                when the run began, not the checkpoint. With `zo_journal=False` it is the trainer's own resume.

        Raises:
            UsageError: the output directory holds a run and `zo_existing` is "error", or it holds none to resume, or
                this trainer has trained already.
            DistZO2Error: the journal is of another model, or another run.
        """
        if not self._zo_journal:
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)
        if self.optimizer is not None and self.model_init is None:
            raise UsageError("this trainer has trained already, and its journal is closed: make a new trainer")
        existing, files = self.args.zo_existing, RunFiles(self._get_output_dir(trial))  # of a search: a trial's own
        self._zo_files = files
        start = from_rank_0(
            "looking for a run in output_dir",
            lambda: vars(files.start(resume_from_checkpoint, existing)),
        )
        self._zo_start = start = Start(**start)
        resumed = None
        if start.step is not None:
            read = lambda: files.advance(start.step)  # noqa: E731
            self._zo_missed = from_rank_0("reading the state of the trainer", read) < start.step
            resumed = str(files.state)
        try:
            return super().train(resumed, trial, *args, **kwargs)
        finally:
            if self.zo_optimizer is not None:
                self.zo_optimizer.close()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._zo_start.step is None:  # else the weights are the base's and the journal's
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves unit by unit: no second copy of the weights is made."""
        streams = state_dict is None and isinstance(self.model, PreTrainedModel) and self.args.should_save
        if streams:
            self.model.save_pretrained = lambda path, **_: save_pretrained(self.model, path, overwrite=True)
        elif state_dict is None and is_peft_model(self.model) and self.args.should_save:
            state_dict = state_dict_of(self.model, trainable_only=True)
            state_dict |= dict(self.model.named_buffers(remove_duplicate=False))  # VeRA and its like save theirs
        try:
            super()._save(output_dir, state_dict)
        finally:
            if streams:
                del self.model.save_pretrained

    # ---- a step -------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keeps a micro-batch; with the last one of a step, makes the step and returns its loss."""
        self._zo_save_state()
        self.compute_loss = self._zo_keep  # in the place of whatever method the class has
        try:
            super().training_step(model, inputs, *args, **kwargs)
        finally:
            del self.compute_loss
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        closures, tokens, mesh = self._zo_closures, self._zo_tokens, parallel.current()
        self._zo_closures, self._zo_tokens = [], 0
        self._zo_schedule_eps()
        steps, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        try:
            loss = self.zo_optimizer.step(closures, tokens=tokens, sharded=False if mesh is None else "data")
        finally:
            self.current_gradient_accumulation_steps = steps
        self._zo_log.add(self.zo_optimizer.last, tokens * (1 if mesh is None else mesh.shape.data))
        return loss.to(self.args.device, torch.float32)

    def _zo_schedule_eps(self) -> None:
        args, steps = self.args, self.state.max_steps
        if args.zo_eps_schedule != "constant":
            final = {"final": args.zo_eps_final, "rises": False}
            factor = factor_of(args.zo_eps_schedule, steps, args.get_warmup_steps(steps), **final)
            self.zo_optimizer.eps = args.zo_eps * factor(self.zo_optimizer.step_count)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Makes no step in a run that has made its last one, or that the evaluation that it missed stops."""
        self._zo_catch_up(self.state.global_step / kwargs["num_update_steps_per_epoch"])
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._zo_catch_up(self.state.num_train_epochs)
        self._zo_save_state()
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])  # as `log` has it

    def _zo_catch_up(self, epoch: float) -> None:
        """Evaluates and saves what was due after the last step of a run that was killed before it did."""
        if self._zo_missed:
            self._zo_missed, self.state.epoch = False, epoch
            flow = DefaultFlowCallback()
            for event in (flow.on_step_end, flow.on_epoch_end)[: 2 if epoch == int(epoch) else 1]:
                event(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, 0.0)

    def _zo_save_state(self) -> None:
        if self._zo_unsaved and self._zo_journal and self.is_world_process_zero():
            self._zo_files.save(self.state, self.callback_handler.callbacks, self.lr_scheduler)
        self._zo_unsaved = False

    def _zo_keep(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """`compute_loss` of the trainer's own training step: keeps the micro-batch for the step."""
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        self._zo_tokens += main.numel() if isinstance(main, torch.Tensor) else 0
        count = None
        if kwargs.get("num_items_in_batch") is not None:
            _, count = self.get_batch_samples(iter([inputs]), 1, self.args.device)
            kwargs["num_items_in_batch"] = count
            mean = count is None or self.loss_is_scaled_for_ga is False  # of each micro-batch, whatever it counts
            count = None if mean else int(count)
        self._zo_closures.append(partial(_loss_of, self, model, inputs, args, kwargs, count))
        return torch.zeros((), device=self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super().evaluate(*args, **kwargs)
        self._zo_unsaved = True
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the coefficients, the signal and the speed, and leaves out losses that are not finite as
        `logging_nan_inf_filter` says; where all are, the loss is nan."""
        filtered = self.args.logging_nan_inf_filter
        if "loss" in logs:
            logs.update(self._zo_log.since_last(filtered))
        if "train_loss" in logs:
            logs["train_loss"] = self._zo_log.total(filtered)
        super().log(logs, *args, **kwargs)


def _num_pert() -> int:
    mesh = parallel.current()
    return 1 if mesh is None else mesh.shape.pert


class _StepLog:
    """The losses, coefficients and speed of the steps since the last log, and the losses of all."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._records: list[Any] = []
        self._tokens = 0

    def add(self, record: Any, tokens: int) -> None:
        self._losses.append(record.loss)
        self._records.append(record)
        self._tokens += tokens

    def since_last(self, filtered: bool) -> dict[str, float]:
        records, seconds = self._records, sum(record.seconds for record in self._records)
        losses = [record.loss for record in records]
        coefs = [abs(c) for record in records for c in record.coefs]
        differences = [d for record in records if (d := record.difference) is not None and math.isfinite(d)]
        logs = {
            "loss": _mean(losses, filtered),
            "zo_coef": _mean(coefs, filtered),
            "zo_signal": _mean(differences, filtered),
            "zo_clipped": float(sum(record.clipped for record in records)),
            "zo_skipped": float(sum(record.skipped is not None for record in records)),
        }
        if self._tokens:  # inputs may have other names than the model's, as those of preferences in TRL
            logs["tokens_per_second"] = self._tokens / seconds
        self._records, self._tokens = [], 0
        return logs

    def total(self, filtered: bool) -> float:
        return _mean(self._losses, filtered)


def _mean(values: list[float], filtered: bool) -> float:
    """The mean of those that are finite, or with `filtered` false of all; nan of none."""
    values = [value for value in values if math.isfinite(value)] if filtered else values
    return math.fsum(values) / len(values) if values else math.nan


def _loss_of(
    trainer: ZOMixin, model: nn.Module, inputs: dict[str, Any], args: tuple, kwargs: dict[str, Any], count: Any
) -> Any:
    """The loss of one micro-batch in one evaluation: (sum, number of tokens) where the trainer counts these."""
    if not current_lane().first:
        trainer = copy.copy(trainer)
        if hasattr(trainer, "_metrics"):
            trainer._metrics = copy.deepcopy(trainer._metrics)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, dict(inputs), *args, **kwargs)
    if count is None:
        return loss
    loss = loss.double() if isinstance(loss, torch.Tensor) else float(loss)
    return (loss * count, count) if count else (0.0, 0)


def _train(model: nn.Module, dropout: bool, mode: bool = True) -> nn.Module:
    """`model.train`: trainers ask the root's flag which metrics they gather, and modules theirs for dropout."""
    nn.Module.train(model, mode and dropout)
    model.training = mode
    return model


def _hold_off(accelerator: Any, hand_over: Callable[[nn.Module], nn.Module]) -> None:
    """Keeps accelerate from wrapping models for gradients, and from meeting other ranks in the middle of a step."""
    prepare, gather = accelerator.prepare_model, accelerator.gather

    def gather_outside(tensor: Any) -> Any:
        if current_lane() is not None:  # ranks evaluate different things: what is gathered there is a rank's own
            return tensor
        return gather(tensor)

    accelerator.gather = gather_outside
    accelerator.prepare_model = lambda model, *_, **__: prepare(hand_over(model), evaluation_mode=True)
    accelerator.backward = lambda loss, **_: None
    accelerator.clip_grad_norm_ = lambda parameters, max_norm, norm_type=2: None


@dataclasses.dataclass
class ZOTrainingArguments(ZOFields, TrainingArguments):
    """`TrainingArguments` with the fields of ZO."""


@dataclasses.dataclass
class ZOSeq2SeqTrainingArguments(ZOFields, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the fields of ZO."""


class ZOTrainer(ZOMixin, Trainer):
    """`transformers.Trainer` by zeroth-order steps, with `ZOTrainingArguments`."""


class ZOSeq2SeqTrainer(ZOMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` by zeroth-order steps, with `ZOSeq2SeqTrainingArguments`."""
