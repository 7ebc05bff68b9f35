"""The training loop of a run: its steps, evaluations, metrics and the checkpoint at the end."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distzo2.checkpoint.reading import ADAPTER_FILES
from distzo2.checkpoint.writing import holds_checkpoint
from distzo2.errors import DistZO2Error, UsageError, blaming, one_line
from distzo2.estimators.registry import make_estimator
from distzo2.estimators.schedules import factor_of
from distzo2.models.pretrained import clamped, save_pretrained
from distzo2.models.replay import replay
from distzo2.optim.signal import REFERENCE, TF32, Signal, advice, computed_in, signal_of
from distzo2.optim.zosgd import ZOSGD
from distzo2.parallel.group import current
from distzo2.peft.adapters import save_adapter
from distzo2.peft.merging import merge_adapter
from distzo2.peft.replay import replay_adapter
from distzo2.record.lineage import BranchPoint
from distzo2.rewards.functions import figure_of
from distzo2.rewards.objective import Question, RewardObjective
from distzo2.run.directory import RunDirectory
from distzo2.run.launch import from_rank_0, launch_id, together
from distzo2.run.metrics import Metrics, finite, open_report, peak_bytes, progress_bar, resident_bytes
from distzo2.run.options import FinetuneOptions
from distzo2.run.preflight import DTYPES, ModelSize
from distzo2.streaming.offload import runtime_of
from distzo2.tasks.batches import DataOrder
from distzo2.tasks.held_out import HeldOut
from distzo2.tasks.objectives import Objective
from distzo2.tasks.tokenize import Example
from distzo2.text import dtype_name, gib
from distzo2.version import __version__

_OPTIMIZER = (  # options of finetune that ZOSGD has under the same name
    "lr", "eps", "weight_decay", "anchor", "noise", "seed",
    "max_lanes", "max_coef", "max_clipped", "max_skipped", "verify_every", "momentum", "momentum_window",
    "clip_percentile", "probe_batches",
)  # fmt: skip
_ABOUT = ("kind", "step", "examples", "tokens", "seconds", "data", "crc")  # in an evaluation's line, besides scores
_STATS = ("compute_s", "noise_s", "exposed_wait_s", "upload_s", "download_s", "bytes_up", "bytes_down")
MOST_CLAMPED = 0.01  # of codes at an end of their range, beyond which a run says so
AUTO_RATE = 0.05  # of --lr auto: SmolLM2-135M learned best near it, dense, with LoRA and with codes (docs/packed.md)
SIGNAL_PROBES = (4, 8)  # the second four where the first leave the question open
TRACE_FROM = 2  # steps after the first, so that what is traced is the steady state


class TrainLoop:
    """One process's part of a run."""

    def __init__(
        self,
        options: FinetuneOptions,
        log: Callable[[str], None],
        run: RunDirectory,
        model: torch.nn.Module,
        objective: Objective | RewardObjective,
        train: list[Example] | list[Question],
        held_out: HeldOut,
        size: ModelSize,
    ) -> None:
        self.options, self.log, self.run, self.model = options, log, run, model
        self.objective, self.train, self.held_out, self.size = objective, train, held_out, size
        self.runtime = runtime_of(model)
        self.mesh = current()
        self.leads = self.mesh is None or self.mesh.rank == 0
        self.order = DataOrder(len(train), options.batch_size, options.seed)
        self.score_name = options.score and figure_of(options.score, options.reward)
        if self.score_name is None:
            rewarded = options.objective == "reward"
            self.score_name = "reward" if rewarded else "accuracy" if train[0].chooses else "loss"
        self.metrics: Metrics | None = None
        self.optimizer: ZOSGD | None = None
        self.estimator = make_estimator(options.estimator, **options.estimator_options)
        steps = options.steps, options.warmup
        self._factor = factor_of(options.schedule, *steps, decay=options.decay)
        final = {"final": options.eps_final, "rises": False}
        self._eps_factor = factor_of(options.eps_schedule, *steps, decay=options.decay, **final)
        self._tracing = False
        self._signal: dict[str, Any] = {}  # as the first step found it
        self._looks_at_codes = any(param.is_coded for param in self.runtime.params)

    def settle_compute_dtype(self) -> torch.dtype | None:
        """Looks, before the first step of a run that does not compute in float32, at how much of it is signal. Where
        the dtype is left to us, float32 takes the place of one with too little, or where that is not sure, of one that
        does not pay; where it is not, a line says so if it is too little.

        Returns:
            What the run computes in; None: as stored.
        """
        o, runtime = self.options, self.runtime
        dtype = computed_in(runtime)
        if o.no_signal or dtype == REFERENCE or o.objective == "reward":
            return runtime.compute_dtype
        start = time.perf_counter()
        with blaming(f"{o.model}: the model fails on the first batch"):
            closures = [self.objective.closure(batch) for batch in self._batches(0)]
            lanes = o.max_lanes or o.micro_batches * len(self.estimator.evaluations(o.probes))
            more = {"noise": o.noise, "seed": o.seed, "max_lanes": lanes}  # no more memory than a step takes
            more |= {"dtypes": [dtype], "eps": [o.eps], "probes": SIGNAL_PROBES, "is_open": _is_open}
            try:
                found = signal_of(self.model, closures, **more)[0]
            except Exception as error:
                if self.mesh is not None or isinstance(error, DistZO2Error):
                    raise
                reason = one_line(error).partition("; distzo2: ")[0]  # without our note's remedy
                self.log(f"no look at the signal, which computes in float32 too: {reason}")
                return runtime.compute_dtype  # if the model fails in this too, the first step says so
        is_clear, pays = from_rank_0(
            "the signal",
            lambda: [found.is_enough or not found.size > 0, not found.is_little and found.pays],
        )
        name, seconds = dtype_name(dtype), time.perf_counter() - start
        figures = found.correlation, found.least, found.most
        shown = "{:.2f} ({:.2f} to {:.2f})".format(*figures) if all(map(math.isfinite, figures)) else "none"
        self.log(f"signal at eps {o.eps:g} in {name}: correlation with float32 {shown}, {seconds:.1f} s")
        kept = ("eps", "correlation", "least", "most", "slope", "relative_error", "floor", "curvature", "difference")
        self._signal = finite({"compute_dtype": name, **{key: getattr(found, key) for key in kept}})
        if o.compute_dtype == "auto" and dtype != TF32 and not is_clear:
            chosen = name if pays else "float32; the weights stay stored as they are"
            self.log(f"computing in {chosen} (float32 takes {1 / found.cost:.2g} times as long)")
            if not pays:
                runtime.compute_in(REFERENCE)
        elif about := advice(found):
            self.log(about)
        return runtime.compute_dtype

    def settle_rate(self) -> float:
        """The learning rate: for "auto", `AUTO_RATE` times eps over the spread of losses that perturbations make at the
        start. A step of FZOO moves weights by a share of the rate, whatever the spread, and this moves the loss by a
        share of its spread."""
        o = self.options
        if o.lr != "auto":
            return o.lr
        closures = [self.objective.closure(batch) for batch in self._batches(0)]
        more = {"noise": o.noise, "seed": o.seed, "max_lanes": o.max_lanes}
        more |= {"dtypes": [computed_in(self.runtime)], "eps": [o.eps], "probes": o.probes}
        found = signal_of(self.model, closures, **more)[0]
        spread = float(np.sqrt(np.mean(np.square(found.differences)))) / 2  # of one side
        spread = from_rank_0("the spread", lambda: spread)
        if not 0 < spread < math.inf:
            why = "do not change the loss: give a larger --eps" if spread == 0 else "make losses that are not finite"
            raise DistZO2Error(f"--lr auto: perturbations at the start {why}")
        rate = AUTO_RATE * o.eps / spread
        self.log(f"lr {rate:.3g}: {AUTO_RATE} eps / spread, the losses at the start having a spread of {spread:.2g}")
        self.options = replace(o, lr=rate)
        return rate

    def start(self, settings: dict[str, Any], data_hash: str) -> None:
        """Opens journal and metrics; a resumed run takes over the steps that it has made. `data_hash` is that of
        the examples."""
        o = self.options
        optimizer = self.optimizer = ZOSGD(
            self.model,
            num_probes=o.probes,
            estimator=self.estimator,
            **{name: getattr(o, name) for name in _OPTIMIZER},
            journal=self.run.journal,
            resume=o.resume,
            branch_from=BranchPoint(RunDirectory(o.branch_from).journal, o.at_step) if self.branches else None,
            fsync_every=o.fsync_every,
            data_hash=data_hash,
        )
        self.objective.rule = "mean" if optimizer.settings.older_rules else "sum"
        self._first_step = optimizer.step_count  # of this process
        if optimizer.step_count > o.steps:  # of a branch; a resumed run was checked before
            raise UsageError(f"--steps {o.steps}: the branch takes over {optimizer.step_count} steps")
        if not o.resume and not o.no_check:
            with blaming(f"{o.model}: the model fails on the first batch"):
                optimizer.check(self.objective.closure(self._batches(0)[0]))
        data = hashlib.sha256(Path(o.eval).read_bytes()).hexdigest() if o.eval else self.held_out.digest()
        self.metrics = Metrics(self.run.metrics if self.leads else None, data[:16] if self.held_out else None, self.log)
        if self.leads and (o.resume or self.branches):
            self.metrics.match(optimizer.journal.entries, optimizer.step_count)
            what = f"resumed {self.run.path}" if o.resume else f"branched from {o.branch_from}"
            self.log(f"{what} at step {optimizer.step_count} of {o.steps}")
        if o.resume:
            evals = from_rank_0("the evaluations so far", lambda: list(self.metrics.evals.values()))
            self.metrics.evals = {line["step"]: line for line in evals}
        if self.leads:
            self.run.update(
                options=settings,
                distzo2=__version__,
                objective=self.objective.name,
                model_bytes=self.size.total,
                **({"signal": self._signal} if self._signal else {}),
                status="running",
                launch=launch_id(),
                **self._best_so_far(),
            )
        if self.leads and o.report_to != "none":
            names, about = self.run.record.get("reports", {}), {**settings, **self.run.record.get("signal", {})}
            report, name = open_report(o.report_to, self.run.path, names.get(o.report_to), about)
            self.run.update(reports={**names, o.report_to: name})
            self.metrics.report_to(report)

    def run_to_end(self) -> None:
        """Makes the steps that are left, with their evaluations, and saves the checkpoint."""
        o, optimizer = self.options, self.optimizer
        self._evaluate_if_due()
        bar = progress_bar(o.quiet or not self.leads, total=o.steps, initial=optimizer.step_count)
        try:
            with bar:
                while optimizer.step_count < o.steps:
                    self._step(bar)
                    self._look_at_codes()
                    self._evaluate_if_due(bar)
        except KeyboardInterrupt:
            self._stopped("interrupted")
            advice = f"continue with distzo2 finetune --resume --out {o.out}"
            text = f"interrupted: {optimizer.step_count} steps are in the journal; {advice}"
            raise KeyboardInterrupt(text if self.has_stepped else "") from None
        except DistZO2Error as error:
            self._stopped(f"stopped: {error}")
            raise
        with together(self.mesh, "saving"):
            if self.leads:
                self._save()
                optimizer.journal.sync()  # a finished run keeps its steps through a power cut
                self._ended("finished")  # if this cannot be written, the run has not finished
        if self.runtime.kept is not None:
            self.runtime.kept.done()

    @property
    def branches(self) -> bool:
        """Whether the run begins with another's steps; not after a restart by torchrun."""
        return bool(self.options.branch_from) and not self.options.resume

    @property
    def has_stepped(self) -> bool:
        """Whether the run has made a step besides its parent's, in this process or an earlier one."""
        return self.optimizer is not None and self.optimizer.step_count > self.optimizer.first_step

    # ---- a step -----------------------------------------------------------------------------------------------------

    def _batches(self, step: int) -> list[Any]:
        """The micro-batches of a step."""
        indices = self.order.batch(step)
        part = len(indices) // self.options.parts
        groups = [indices[i : i + part] for i in range(0, len(indices), part)]
        return [self.objective.batch([self.train[i] for i in group]) for group in groups]

    def _step(self, bar: Any) -> None:
        optimizer, step = self.optimizer, self.optimizer.step_count
        self._trace(step)
        for group in optimizer.param_groups:
            group["lr"] = self.options.lr * self._factor(step)
        optimizer.eps = self.options.eps * self._eps_factor(step)
        batches = self._batches(step)
        tokens = sum(b.num_tokens for b in batches)
        self.runtime.reset_stats()
        start, start_ns = time.perf_counter(), time.perf_counter_ns()
        try:
            optimizer.step([self.objective.closure(b) for b in batches], tokens=tokens)
        finally:
            # A step that ends the run was made: it is in the journal, and in the metrics.
            self.runtime.trace.add("step", f"step {step}", start_ns, time.perf_counter_ns())
            if optimizer.step_count > step:
                self._note(tokens, time.perf_counter() - start, bar)

    def _note(self, tokens: int, seconds: float, bar: Any) -> None:
        last, stats, device = self.optimizer.last, self.runtime.stats(), self.runtime.device
        times = {"seconds": seconds} | {name: stats.get(name, 0) for name in _STATS}
        times["transfer_s"] = times["upload_s"] + times["download_s"]
        # The host waits in acquire on a CPU; on CUDA the device does, for what the host has queued.
        times["exposed_wait_s"] += stats.get("stall_s", 0.0)
        memory = resident_bytes()
        self.metrics.write(
            kind="step",
            step=last.step,
            loss=last.loss,
            coefs=last.coefs,
            lr=last.lr[0],
            eps=last.eps,
            difference=last.difference,
            skipped=last.skipped,
            clipped=last.clipped,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            **times,
            up_bytes_per_s=_rate(times["bytes_up"], times["upload_s"]),
            down_bytes_per_s=_rate(times["bytes_down"], times["download_s"]),
            rss=memory,
            peak=peak_bytes(),
            device_peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )
        if last.skipped:
            bar.write(f"step {last.step}: {last.skipped}: not applied")
        bar.set_postfix_str(f"loss {last.loss:.4f}, {tokens / seconds:.0f} tokens/s, {gib(memory)}", refresh=False)
        bar.update()

    def _look_at_codes(self) -> None:
        """Says once that many codes are clamped, soon after they are. A look reads all codes, as a forward does: on all
        ranks, before evaluations, at the end, and after 1, 2, 4, 8, ... steps, which are few."""
        o, step = self.options, self.optimizer.step_count
        is_due = step & (step - 1) == 0 or step == o.steps or (o.eval_every and step % o.eval_every == 0)
        if self._looks_at_codes and is_due and (share := clamped(self.model)) > MOST_CLAMPED:
            lost = "where updates are lost: a lower --lr, or --store affine16, keeps them"
            self.log(f"warning: step {step}: {share:.1%} of the codes are at an end of their range, {lost}")
            self._looks_at_codes = False

    def _trace(self, step: int) -> None:
        """Records --trace-steps steps from the third on, or from the first where there are no more."""
        o = self.options
        if o.trace is None or not self.leads:
            return
        first = max(self._first_step, min(TRACE_FROM, max(0, o.steps - o.trace_steps)))
        if step == first:
            self.runtime.weights.enable_trace(True)
            self._tracing = True
        elif step == first + o.trace_steps:
            self._end_trace()

    def _end_trace(self) -> None:
        self.runtime.weights.save_trace(self.options.trace or self.run.trace)
        self.runtime.weights.enable_trace(False)
        self._tracing = False

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate_if_due(self, bar: Any = None) -> None:
        o, step = self.options, self.optimizer.step_count
        due = step in (self.optimizer.first_step, o.steps) or (o.eval_every and step % o.eval_every == 0)
        if not self.held_out or not due or step in self.metrics.evals:
            return
        start = time.perf_counter()
        score = self.held_out.score(self.objective, batch_size=o.eval_batch_size, mesh=self.mesh)
        self.metrics.write(
            kind="eval",
            step=step,
            **score.figures(),
            examples=score.num_examples,
            tokens=score.num_tokens,
            seconds=time.perf_counter() - start,
        )
        if bar is not None and not bar.disable:
            bar.clear()
        self.log(f"step {step}: held-out {score} ({score.num_examples} examples)")
        if self.leads:
            self.run.update(**self._best_so_far())

    def _best(self) -> int | None:
        """The step whose evaluation is best; of equals the first."""
        sign = -1 if self.score_name == "loss" else 1
        values = {step: finite(line.get(self.score_name)) for step, line in sorted(self.metrics.evals.items())}
        scores = {step: sign * value for step, value in values.items() if value is not None}
        return max(scores, key=scores.get) if scores else min(values, default=None)

    def _best_so_far(self) -> dict[str, Any]:
        """The entries of run.json about the best step."""
        best = self._best()
        if best is None:  # its entries may come from evaluations that no longer count
            return dict.fromkeys({"best_step", "best"} & self.run.record.keys())
        return {"best_step": best, "best": {k: v for k, v in self.metrics.evals[best].items() if k not in _ABOUT}}

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.options.save == "none":
            return
        self.optimizer.journal.sync()  # no checkpoint is ahead of the journal
        best = self._best() if self.options.save == "best" else None
        step = self.optimizer.step_count if best is None else best
        o = self.options
        made = self.run.checkpoint if o.writes_model else self.run.adapter
        if self.run.record.get("checkpoint_step") == step and made.exists():
            return
        if o.adapts:
            self._save_adapter(step)
        if not o.writes_model:
            self.run.update(checkpoint_step=step)
            return
        self.run.check_checkpoint()
        # A resumed run knows whose the files are if this process is killed meanwhile.
        self.run.update(checkpoint_step=None, saving_step=step, checkpoint_files=None)
        self.run.drop_checkpoint()
        if o.adapts:
            merge_adapter(o.model, self.run.adapter, self.run.checkpoint, dtype=DTYPES.get(o.dtype))
        elif step == self.optimizer.step_count:
            save_pretrained(self.model, self.run.checkpoint)
        else:
            replay(o.model, self.run.journal, self.run.checkpoint, to_step=step, progress=False)
        names = holds_checkpoint(self.run.checkpoint)
        self.run.update(checkpoint_step=step, saving_step=None, checkpoint_files=names)
        self.log(f"wrote {self.run.checkpoint} (step {step})")
        if any(param.narrow is not None for param in self.runtime.params):
            self.log("what was trained is in float32 there: load it with dtype=torch.float32, or --dtype float32")

    def _save_adapter(self, step: int) -> None:
        run = self.run
        if step == self.optimizer.step_count:
            save_adapter(self.model, run.adapter)
        else:
            for name in ADAPTER_FILES:
                (run.adapter / name).unlink(missing_ok=True)
            replay_adapter(run.adapter_start, run.journal, run.adapter, to_step=step, progress=False)
        self.log(f"wrote {run.adapter} (step {step})")

    def _stopped(self, status: str) -> None:
        """Records why the run stopped. Write failures are suppressed so that they do not mask the original error."""
        if not self.leads:
            return
        with suppress(OSError, DistZO2Error):
            self.optimizer.journal.sync()
        with suppress(OSError, DistZO2Error):  # also where the journal is what failed
            self._ended(status)

    def _ended(self, status: str) -> None:
        if self._tracing:
            self._end_trace()
        stats = self.runtime.stats()
        self.run.update(
            status=status,
            steps_done=self.optimizer.step_count,
            peak_bytes=peak_bytes(),
            weights_in_memory=sum(stats[k] for k in ("resident_bytes", "slot_bytes", "scratch_bytes")),
            **self._best_so_far(),
        )

    def close(self) -> None:
        """Closes what `start` opened. A new run that ends before its first step leaves no weight file."""
        if self.runtime.kept is not None and not self.options.resume and not self.has_stepped:
            self.runtime.kept.done()
        if self.metrics is not None:
            self.metrics.close()
        if self.optimizer is not None:
            self.optimizer.close()


def _is_open(found: Sequence[Signal]) -> bool:
    """Whether more probes are to tell how much is signal, on all ranks alike."""
    return from_rank_0("the signal", lambda: not any(s.is_enough or s.is_little for s in found))


def _rate(num_bytes: float, seconds: float) -> float | None:
    return num_bytes / seconds if seconds > 0 else None
