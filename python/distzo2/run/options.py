"""The options of each command, a frozen dataclass a command: types with their ranges, defaults and help texts.

Options come from the command line, from a file (TOML, YAML or JSON), or from the run.json of an earlier run. All of
them pass `checked`, which refuses unknown names and values out of range before anything is loaded.
"""

# ruff: noqa: RUF009  (`option` calls `dataclasses.field`)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic import Field as Range

from distzo2.errors import UsageError
from distzo2.option_groups import Estimating
from distzo2.option_types import (
    Bytes,
    ComputeDtype,
    Count,
    CountOrZero,
    Dtype,
    Multiple,
    Name,
    Noise,
    Number,
    Patterns,
    Percent,
    Positive,
    PositiveOrZero,
    Schedule,
    Seed,
    Share,
    Stops,
    Store,
    Switch,
    Threads,
    Weights,
    option,
)
from distzo2.rewards.functions import FIGURES, parsed

PLACES = ("resume", "out", "branch_from", "at_step")  # of finetune: where a run begins and is kept, not what it does

# Options of finetune that left, and what to do instead. A run.json may still hold them.
LEFT = {
    "journal_chain": "journals are no longer chained; `sha256sum journal.jsonl` stands for a whole run",
    "keep": "OUT/weights.dzo2 holds one copy of each unit of weights",
}


def _reward(name: str) -> str:
    parsed(name)
    return name


def _score(name: str) -> str:
    try:
        return name if name in FIGURES else _reward(name)
    except ValueError as error:
        raise ValueError(f"{error}; or accuracy, loss or reward") from None


Reward = Annotated[str, AfterValidator(_reward)]
Score = Annotated[str, AfterValidator(_score)]


# ---- groups that several commands have ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Options of every command that loads a model."""

    device: str = option("cpu", "where it computes", "cpu|cuda|cuda:N", group="where it runs")
    weights: Weights = option(
        "host", "where streamed weights live: the device, pinned memory, or a file as large as the model"
    )
    weights_dir: str | None = option(None, "directory of that file (default: the output directory, or /tmp)", "DIR")
    memory_budget: Bytes = option(
        None,
        "bytes of the device for weights, such as 12GiB: blocks that fit stay there, the others stream; auto: 70% of "
        "what is free (default: all blocks stream)",
        "BYTES|auto",
    )
    host_memory: Bytes = option(
        "auto",
        "bytes of the machine's memory that the weights of all ranks may take, such as 200GB (default, and auto: nine "
        "tenths of what is available)",
        "BYTES|auto",
    )
    write_every: Count = option(
        1, "write a streamed block back at every N-th step, blocks in turn: spares a disk, makes more noise"
    )
    dtype: Dtype = option("auto", "dtype of the weights; auto: the checkpoint's")
    store: Store | None = option(
        None,
        "pack the blocks' matrices at load, 64 weights with a scale: affine16 and affine8 can be trained "
        "(docs/packed.md), affine4 and table4 are frozen, for adapters (default: as the checkpoint has them)",
    )
    compute_dtype: ComputeDtype = option(
        "auto",
        "dtype that the model computes in, whatever is stored; auto: as stored, but float32 on a CPU that has no "
        "instructions for it, and, for finetune, where differences of losses would be rounding (see distzo2 signal)",
    )
    tf32: Switch = option(False, "multiply float32 matrices in TF32 on a GPU: 10 bits of precision, bfloat16 has 7")
    threads: Threads | None = option(None, "CPU threads for computing (default: torch's choice)")


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """Options of every command that reads a model with an adapter."""

    adapter: str | None = option(
        None, "directory of a peft adapter (LoRA, prefix, ...) of the model; finetune trains it further", "DIR"
    )


@dataclass(frozen=True, kw_only=True)
class Trained(Adapted):
    """Options of what is trained: the whole model, an adapter of it, or chosen parameters.

    Raises:
        UsageError: two options do not go together.
    """

    peft: Literal["lora", "prefix", "prompt"] | None = option(
        None,
        "train an adapter and leave the model as it is: OUT/adapter loads with peft (docs/peft.md)",
        group="what is trained",
    )
    tune: Literal["adapter", "gain", "code", "full"] | None = option(
        None,
        "adapter: as --peft lora; gain: a factor for each group of packed weights (docs/packed.md); code: weights "
        "stored as codes (--store affine16, or affine8); full: weights as they are (default: what --peft, --adapter "
        "and --store say)",
    )
    lora_r: Count = option(8, "rank of LoRA's matrices")
    lora_alpha: Positive = option(16.0, "LoRA's scale is this over its rank")
    lora_targets: str | None = option(
        None, "modules with LoRA, or all-linear (default: peft's for the architecture, mostly q_proj,v_proj)", "NAMES"
    )
    virtual_tokens: Count = option(5, "tokens of a prefix or prompt; they start at what the model makes of real ones")
    train_only: Patterns = option(
        "",
        "train no other parameters: names with wildcards (*.bias), modules, re:EXPRESSION, or last:K blocks; may be "
        "given several times",
        "PATTERN",
        repeats=True,
    )
    freeze: Patterns = option("", "leave these parameters as they are; patterns as above", "PATTERN", repeats=True)

    def __post_init__(self) -> None:
        if self.peft and self.adapter:
            raise UsageError("--peft makes an adapter, --adapter trains one further: give one of them")
        if self.tune == "adapter" and not self.adapts:
            object.__setattr__(self, "peft", "lora")
        elif self.tune in ("gain", "code", "full") and self.adapts:
            raise UsageError(f"--tune {self.tune}: with {'--peft' if self.peft else '--adapter'} an adapter is trained")
        if self.tune == "gain" and (self.train_only or self.freeze):
            flag = "--train-only" if self.train_only else "--freeze"
            raise UsageError(f"{flag}: with --tune gain the gains of all blocks are trained, and nothing else")
        if self.train_only and self.adapts:
            raise UsageError("--train-only: an adapter is all that is trained with it; --freeze leaves parts of it out")
        store = getattr(self, "store", None)  # of `Placement`
        object.__setattr__(self, "store", store or ("affine16" if self.tune == "code" else None))
        if self.store in ("affine4", "table4") and not (self.adapts or self.train_only or self.tune == "gain"):
            raise UsageError(
                f"--store {self.store}: codes of 4 bits are not trained, since updates are less than their spacing: "
                "--peft lora trains an adapter beside them, --tune gain their scales, --store affine16 the codes"
            )
        if self.tune == "full" and self.store is not None:
            raise UsageError(f"--tune full: --store {self.store} trains codes; leave one of them out")

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, and the model itself is not."""
        return bool(self.peft or self.adapter)


@dataclass(frozen=True, kw_only=True)
class DataReading:
    """Options of every command that reads data files."""

    objective: Literal["lm", "choices", "error", "reward"] | None = option(
        None,
        "lm: cross-entropy of the completion's tokens; choices: cross-entropy over the choices, each scored by the "
        "mean log-likelihood of its tokens; error: 1 - accuracy, which has no gradient; reward, of finetune alone: "
        "--reward of what the model writes (default: choices where lines have choices, else lm)",
        group="data",
    )
    truncate: Literal["error", "left", "right"] | None = option(
        None,
        "what to do with a line that is longer than --max-length: stop with file and line number, or drop tokens of "
        "its beginning or its end (of a line with choices: of its prompt) (default: error; with --task left)",
    )
    max_length: Count | None = option(None, "longest sequence (default: the model's)")
    skip_bad_lines: CountOrZero = option(0, "skip at most N bad lines of a file, and report how many", "N")
    split_special_tokens: Switch = option(
        False, "read special tokens that the data spell, such as </s>, as text and not as these tokens"
    )


@dataclass(frozen=True, kw_only=True)
class TaskReading:
    """Options of commands that read a published data set in place of a JSONL file."""

    task: Name | None = option(
        None, "a published task, such as sst2 or squad, in place of a file (distzo2 tasks lists them)", "NAME",
        group="a published task",
    )  # fmt: skip
    data: Name | None = option(None, "directory of its data set: parquet, JSONL, arrow or TSV, as published", "DIR")
    task_file: str | None = option(None, "TOML with tasks of your own", "FILE")
    task_seed: CountOrZero = option(0, "draws the examples")
    num_eval: Count | None = option(None, "examples of the evaluation (default: the task's, 1000)")
    max_new_tokens: Count = option(
        50, "tokens that the model writes at most, for a reward and for scores of answers", group="what it writes"
    )
    stop: Stops | None = option(
        None, "text that ends what it writes (\\n: a new line); may be given several times", "TEXT", repeats=True
    )
    reward_timeout: Positive = option(
        60.0, "a reward that takes longer for a micro-batch is ended: a step is skipped, distzo2 eval stops", "SECONDS"
    )
    reward_inline: Switch = option(False, "run rewards in this process, where nothing ends them")

    def check_source(self, **files: str | None) -> None:
        """Raises UsageError unless a task with its data, or the first of `files` (by option), is given."""
        name, given = next(iter(files)), [name for name, path in files.items() if path]
        if self.task and given:
            raise UsageError(f"--task and --{given[0]}: give one of them")
        if self.task and not self.data:
            raise UsageError("--task needs --data, the directory of its data set")
        if not self.task and (self.data or self.task_file):
            raise UsageError(f"--{'data' if self.data else 'task-file'} needs --task")
        if not self.task and not files[name]:
            raise UsageError(f"--{name} is missing")


# ---- finetune ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Estimating, Trained, TaskReading, DataReading, Placement):
    """Options of `distzo2 finetune`.

    Raises:
        UsageError: two options do not go together.
    """

    left = LEFT

    model: Name = option(
        MISSING, "directory of a Hugging Face checkpoint and its tokenizer, or a GGUF file", "DIR", group="what"
    )
    train: Name | None = option(
        None,
        "JSONL of prompt + completion, prompt + choices + label, messages, or text, with --objective reward of rows "
        "with a prompt; or give --task",
        "FILE",
    )
    eval: str | None = option(
        None, "JSONL of held-out lines of the same kind, with --objective reward of rows with a prompt", "FILE"
    )
    out: Name = option(MISSING, "directory of the run: journal, metrics, checkpoint", "DIR")
    resume: Switch = option(False, "continue the run in --out; options not given are that run's")
    branch_from: str | None = option(
        None,
        "begin with the first steps of the run in that directory, and continue in --out with other options; options "
        "not given are that run's, and --seed, --model and --dtype must be",
        "RUN",
    )
    at_step: CountOrZero | None = option(None, "how many of its steps --branch-from takes over (default: all)")

    reward: Reward | None = option(
        None,
        "with --objective reward: FILE.py:FUNCTION of prompts, completions and rows, lists, to a number for each "
        "completion, higher is better; or exact, f1, number (of right answers), regex:PATTERN, json:FILE with a schema",
        "NAME",
    )
    temperature: PositiveOrZero = option(0.0, "of what the model writes for a reward; 0: the likeliest token each time")
    top_k: CountOrZero = option(50, "with a temperature, sample among the K likeliest tokens; 0: all", "K")
    num_train: Count | None = option(None, "examples of --task to learn (default: its own, 1000)")
    num_dev: Count | None = option(None, "held-out examples of --task (default: its own, 500 or 100)")

    steps: Count = option(MISSING, "steps in all, one update each", group="how it learns")
    protocol: Literal["mezo"] | None = option(
        None, "mezo: that paper's steps, batch, --lr, --eps, evaluations and choice of a step; options given win"
    )
    lr: PositiveOrZero | Literal["auto"] = option(
        1e-6,
        "learning rate, per unit of the estimated gradient (default: 1e-6, LoRA and gains 1e-4, prompts 1e-2; by "
        "1.5spsa 1e-4; by fzoo, es, meazo and spsa-sign 2e-3, LoRA and gains 3e-2, prompts 1e-2); auto: by fzoo, "
        "0.05 eps / spread of the losses at the start, kept",
        "X|auto",
    )
    eps: Positive = option(
        1e-3,
        "size of a perturbation, in units of a weight (default: 1e-3, by 1.5spsa 1e-4; LoRA and gains 1e-2; prompts "
        "1e-1)",
    )
    batch_size: Count = option(16, "examples a step")
    micro_batches: Count = option(1, "parts of a batch, to save memory for long sequences; must divide --batch-size")
    weight_decay: PositiveOrZero = option(0.0, "pull towards 0, times --lr, a step; biases and norms are left out")
    anchor: PositiveOrZero = option(
        0.0,
        "pull towards the weights at the start, times --lr, a step; a second copy of what is trained is kept for it",
    )
    schedule: Schedule = option(
        "constant", "of the learning rate, down to 0 at --steps; wsd: in the last of them alone, as --decay says"
    )
    eps_schedule: Schedule = option("constant", "of --eps, which stays as it is in --warmup and ends at --eps-final")
    eps_final: Share = option(0.1, "the share of --eps that --eps-schedule ends at", "SHARE")
    warmup: CountOrZero = option(0, "steps in which the learning rate rises from 0")
    decay: Share = option(0.2, "the share of the steps in which a wsd schedule falls", "SHARE")
    seed: Seed = option(0, "of perturbations, data order and dropout")
    train_mode: Switch = option(False, "leave dropout on; it adds noise to the difference of two losses")

    eval_every: CountOrZero = option(
        0, "steps between evaluations, besides the first and the last; 0: none", group="what is kept"
    )
    eval_batch_size: Count = option(16, "examples in a micro-batch of an evaluation")
    score: Score | None = option(
        None,
        "held-out figure that decides the best step: accuracy, loss, or how good answers are that the model writes, as "
        "for --reward (default: reward with one, accuracy where lines have choices, else loss)",
        "NAME",
    )
    save: Literal["last", "best", "none"] = option(
        "last",
        "checkpoint written at the end to OUT/checkpoint: of the last step, of the best (rebuilt from the journal), or "
        "none; any step can be rebuilt later with distzo2 replay",
    )
    merge: Switch = option(False, "write OUT/checkpoint too, with the adapter merged into the model")
    snapshot_every: CountOrZero | None = option(
        None,
        "steps between copies of the trained weights, made in the background in OUT/weights.dzo2, from which --resume "
        "continues instead of from the model; 0: none (default: 0; with --weights disk, where streamed blocks live "
        "in that file, 100 for the other weights)",
        "STEPS",
    )
    snapshot_minutes: PositiveOrZero = option(0.0, "minutes between these copies; 0: none by time", "MINUTES")
    snapshot_pace: Share = option(0.03, "the most that making copies may take of the steps' time", "SHARE")
    fsync_every: Count = option(
        1, "sync the journal to the disk after N steps; a power cut may cost the steps since, a kill does not"
    )
    trace: str | None = option(
        None,
        "record compute, waits and transfers of some steps as a Chrome trace, which opens in Perfetto (without a name: "
        "OUT/trace.json)",
        "FILE",
        bare="",
    )
    trace_steps: Count = option(3, "how many steps --trace records")
    report_to: Literal["none", "tensorboard", "wandb"] = option(
        "none",
        "show the metrics as curves: tensorboard writes event files to OUT/tensorboard, wandb sends them to Weights & "
        "Biases; OUT/metrics.jsonl is written in any case",
    )
    quiet: Switch = option(False, "no progress bar")

    max_coef: Multiple = option(
        10.0, "clip coefficients to this multiple of their median; none: never", "X|none", group="when it goes wrong"
    )
    clip_percentile: Percent | None = option(
        None, "in place of --max-coef: clip them to this percentile of the last 101 steps", "P"
    )
    max_clipped: CountOrZero = option(10, "stop after N clipped steps in a row; 0: never")
    no_signal: Switch = option(
        False, "skip the look at how much of a difference of losses is rounding, where the model computes in 16 bits"
    )
    no_check: Switch = option(
        False, "skip the checks that two equal forward passes agree to the bit, and that no token sees later ones"
    )
    max_skipped: Count = option(
        5, "stop after N steps in a row whose loss is not finite or whose reward fails; such steps are not applied"
    )
    max_lanes: Count | None = option(
        None, "evaluations (perturbation x micro-batch) in a pass over the weights; fewer save memory (default: all)"
    )

    parallel: str | None = option(
        None,
        "ranks that share the perturbations of a step, and ranks that share its micro-batches; P x D is the number of "
        "ranks (default: the mesh whose busiest rank has the least to do)",
        "pert=P,data=D",
        group="many ranks (torchrun --nproc-per-node N -m distzo2 finetune ...)",
    )
    slice: Literal["on", "off"] | None = option(
        None,
        "each rank keeps a slice of every streamed block, and the ranks of a machine gather the blocks together "
        "(default: what is faster, as measured at the start)",
    )
    verify_every: CountOrZero = option(0, "steps between comparisons of the ranks' weights (one at the start); 0: none")
    heartbeat_limit: Positive = option(30.0, "a rank that is silent for this long is given up; the run ends", "SECONDS")

    def __post_init__(self) -> None:
        Estimating.__post_init__(self)
        Trained.__post_init__(self)
        if self.batch_size % self.micro_batches:
            raise UsageError(f"--micro-batches {self.micro_batches} does not divide --batch-size {self.batch_size}")
        if self.batch_size % self.parts:
            text = f"--probes {self.probes} x --micro-batches {self.micro_batches}"
            raise UsageError(f"--probe-batches own: {text} does not divide --batch-size {self.batch_size}")
        if self.momentum_window is not None and self.momentum_window > self.steps:
            raise UsageError(
                f"--momentum-window {self.momentum_window} is longer than the run, of --steps {self.steps}"
            )
        if self.anchor and not self.adapts and (self.tune == "gain" or self.store in ("affine8", "affine16")):
            what = "--tune gain" if self.tune == "gain" else f"--store {self.store}"
            raise UsageError(f"--anchor with {what}: gains and codes keep no start; --weight-decay pulls to 0")
        if self.lr == "auto" and self.estimator != "fzoo":
            raise UsageError(f"--lr auto: its rule is for --estimator fzoo, not for {self.estimator}")
        if self.warmup > self.steps:
            raise UsageError(f"--warmup {self.warmup} is more than --steps {self.steps}")
        if self.fsync_every > 1 and self.weights == "disk":
            raise UsageError(
                f"--fsync-every {self.fsync_every} with --weights disk: a block is written back only after its step's "
                "line is on the disk, so every step is synced"
            )
        if self.slice == "on" and self.weights == "device":
            raise UsageError("--slice on: slices are of weights in host memory or on disk, and not of --weights device")
        if self.merge and not self.adapts:
            raise UsageError("--merge needs --peft lora or --adapter")
        if self.merge and self.peft in ("prefix", "prompt"):
            raise UsageError(f"--merge: a {self.peft} cannot be merged into weights; --peft lora can")
        if self.at_step is not None and not self.branch_from:
            raise UsageError("--at-step needs --branch-from")
        self.check_source(train=self.train, eval=self.eval)
        rewarded = self.objective == "reward"
        if rewarded and (not self.reward or self.task):
            raise UsageError(f"--objective reward needs --{'train' if self.reward else 'reward'}")
        if not rewarded and (self.reward or self.score == "reward"):
            raise UsageError(f"--{'reward' if self.reward else 'score reward'} needs --objective reward")
        if rewarded and self.score in ("loss", "accuracy"):
            raise UsageError(f"--score {self.score}: with --objective reward there is none")
        judges = {"save best": self.save == "best", "eval-every": self.eval_every}
        judges["score"] = self.score and not self.resume  # runs that an earlier version began may have it
        if not (self.eval or self.task) and any(judges.values()):
            raise UsageError(f"--{next(filter(judges.get, judges))} needs --eval")

    @property
    def parts(self) -> int:
        """Micro-batches of a step, of all probes."""
        return self.micro_batches * (self.probes if self.probe_batches == "own" else 1)

    @property
    def writes_model(self) -> bool:
        """Whether the run's result is a whole checkpoint, and not an adapter alone."""
        return self.merge or not self.adapts


# What a resumed run shares with the run so far: data order, noise and losses are functions of these.
TRAINED = tuple(f.name for f in fields(Trained))
FIXED = ("seed", "batch_size", "micro_batches", "probe_batches", "noise", "dtype", "store", "compute_dtype", "tf32",
         "objective", "truncate", "max_length", "train_mode", "split_special_tokens", "task", "task_seed", "num_train",
         "num_dev", "es_shape", "es_one_sided", "momentum", "momentum_window", "anchor", *TRAINED)  # fmt: skip
OF_REWARDS = ("reward", "max_new_tokens", "stop", "temperature", "top_k")  # with --objective reward these too
KEPT_BY_BRANCHES = ("seed", "dtype", "store", *TRAINED)


@dataclass(frozen=True, kw_only=True)
class SignalOptions(Trained, DataReading, Placement):
    """Options of `distzo2 signal`."""

    model: Name = option(MISSING, "directory of a Hugging Face checkpoint and its tokenizer, or a GGUF file", "DIR")
    train: Name = option(MISSING, "JSONL of lines as for finetune; the first batch of its order is taken", "FILE")
    batch_size: Count = option(16, "examples of the batch")
    probes: Annotated[int, Number, Range(ge=2, lt=2**20)] = option(8, "perturbations, each evaluated both ways", "K")
    noise: Noise = option("normal", "distribution of a perturbation's elements")
    seed: Seed = option(0, "of perturbations and data order")
    eps: str = option("1e-2,1e-3,1e-4,1e-5", "sizes of perturbations, with commas", "LIST")
    max_lanes: Count | None = option(None, "evaluations in a pass over the weights (default: all)")
    json: Switch = option(False, "print one line of JSON")


# What a branch that has another estimator, or momentum, does not take over from its parent.
OWNED = {"estimator": ("es_shape", "es_one_sided", "noise", "lr", "eps"), "momentum": ("momentum_window",)}

# Options that do nothing without another.
_NEEDS: Mapping[str, tuple[str, Callable[[FinetuneOptions], Any]]] = {
    "temperature": ("--objective reward", lambda o: o.objective == "reward"),
    "top_k": ("--temperature", lambda o: o.temperature),
    "reward_inline": ("--reward, or a --score of answers", lambda o: o.reward or o.score not in (None, *FIGURES)),
    "decay": ("--schedule wsd, or --eps-schedule wsd", lambda o: "wsd" in (o.schedule, o.eps_schedule)),
    "eps_final": ("--eps-schedule", lambda o: o.eps_schedule != "constant"),
}


def check_needs(options: FinetuneOptions, given: Mapping[str, Any]) -> FinetuneOptions:
    """Returns `options`.

    Raises:
        UsageError: one of the `given` does nothing without another. Those of an earlier run may.
    """
    for name, (what, is_met) in _NEEDS.items():
        if given.get(name, getattr(FinetuneOptions, name)) != getattr(FinetuneOptions, name) and not is_met(options):
            raise UsageError(f"--{name.replace('_', '-')} needs {what}")
    return options


# ---- the other commands ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Adapted, TaskReading, Placement, DataReading):
    """Options of `distzo2 eval`."""

    model: Name = option(MISSING, "directory of a Hugging Face checkpoint, or a GGUF file", "DIR")
    eval: Name | None = option(
        None, "JSONL of lines as for finetune, with --score of rows with a prompt too; or give --task", "FILE"
    )
    batch_size: Count = option(16, "examples in a micro-batch")
    score: Reward | None = option(
        None,
        "judge answers that the model writes: f1, em, number, regex:PATTERN, json:FILE or FILE.py:FUNCTION (default: "
        "as the task does)",
        "NAME",
    )
    shots: CountOrZero = option(0, "training examples of --task to put before each, as demonstrations")
    calibrate: Switch = option(False, "score options of --task against a prompt without content")
    json: Switch = option(False, "print one line of JSON")

    def __post_init__(self) -> None:
        self.check_source(eval=self.eval)
        if self.objective == "reward":
            raise UsageError("--objective reward: --score judges what a model writes")
        if not self.task and (self.shots or self.calibrate):
            raise UsageError(f"--{'shots' if self.shots else 'calibrate'} needs --task")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Adapted, Placement):
    """Options of `distzo2 generate`."""

    model: Name = option(MISSING, "directory of a Hugging Face checkpoint, or a GGUF file", "DIR")
    prompt: str | None = option(None, "how the text begins (default: read from standard input)", "TEXT")
    max_new_tokens: Count = option(64, "tokens to add at most")
    temperature: PositiveOrZero = option(0.0, "of sampling; 0: the likeliest token each time")
    top_k: CountOrZero = option(50, "sample among the K likeliest tokens; 0: all", "K")
    seed: Seed = option(0, "of sampling")


# ---- a resumed run -----------------------------------------------------------------------------------------------


def changed(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> list[str]:
    """Compares a resumed run's options with those so far; returns a line for each that changed and may.

    Raises:
        UsageError: one changed that the run's data or noise depend on.
    """
    for name in (*FIXED, *(OF_REWARDS if after.get("objective") == "reward" else ())):
        was = before.get(name, getattr(FinetuneOptions, name))
        if was != after.get(name):
            flag = "--" + name.replace("_", "-")
            change = f"{flag} was {was!r} and is {after.get(name)!r}"
            branch = "" if name in KEPT_BY_BRANCHES else ", or a branch of it (--branch-from)"
            raise UsageError(f"{where}: {change}: start a new run for that{branch}")
    return [
        f"{name.replace('_', '-')} {before.get(name)} -> {value}"
        for name, value in after.items()
        if name not in PLACES and before.get(name, getattr(FinetuneOptions, name, None)) != value
    ]
