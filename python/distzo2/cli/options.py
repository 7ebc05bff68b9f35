"""The options of the commands that load no model to run it: replay, report, measure, plan, and the list of tasks.

They are dataclasses as those of `distzo2.run.options`, which checks them.
"""

# ruff: noqa: RUF009  (`option` calls `dataclasses.field`)

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Annotated, Literal

from pydantic import Field as Range

from distzo2.errors import UsageError
from distzo2.option_groups import Estimating
from distzo2.option_types import (
    Bytes,
    ComputeDtype,
    Count,
    CountOrZero,
    Dtype,
    Name,
    PositiveOrZero,
    Store,
    Switch,
    Weights,
    option,
)
from distzo2.run.options import Trained


@dataclass(frozen=True, kw_only=True)
class TasksOptions:
    """Options of `distzo2 tasks`."""

    task_file: str | None = option(None, "TOML with tasks of your own", "FILE")


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Options of `distzo2 replay`."""

    adapter: str | None = option(
        None, "the adapter that the run began with (default: adapter_start beside its journal)", "DIR"
    )
    merge: Switch = option(False, "of a run that trains an adapter, write the model with the adapter merged into it")
    packed: Switch = option(
        False,
        "of a run with --tune gain, write the packed files of its base with the gains in their scales, where the type "
        "of these holds them exactly (docs/packed.md)",
    )
    run_dir: str | None = option(
        None,
        "directory of a run; its base checkpoint is the one it names. Or BASE, a base checkpoint, with JOURNAL after "
        "it",
        "RUN",
        positional=True,
    )
    journal_file: str | None = option(None, "journal, or run, of a run on BASE", "JOURNAL", positional=True)
    base: str | None = option(None, "base checkpoint (default: the one that RUN names)", "DIR")
    journal: str | None = option(None, "journal (default: RUN/journal.jsonl)", "FILE")
    out: Name = option(MISSING, "where the checkpoint is written; it must not hold one", "DIR", short="-o")
    to_step: CountOrZero | None = option(None, "updates to apply (default: all)")
    quiet: Switch = option(False, "no progress bar")

    def __post_init__(self) -> None:
        if self.journal_file is not None and (self.base is not None or self.journal is not None):
            raise UsageError("replay BASE JOURNAL takes neither --base nor --journal")
        if self.run_dir is None and (self.base is None or self.journal is None):
            raise UsageError("replay needs RUN, or BASE and JOURNAL, or both --base and --journal")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `distzo2 report`."""

    run_dir: Name = option(MISSING, "directory of a run", "RUN", positional=True)
    out: str | None = option(None, "PNG to write (default: RUN/report.png)", "FILE")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Options of `distzo2 measure`."""

    directory: Name = option(".", "directory on the disk to measure, where weights would be kept", "DIR")
    json: str | None = option(None, "where the figures go (default: measure.json in ~/.cache/distzo2)", "FILE")
    quick: Switch = option(False, "a few seconds, and rough figures")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Estimating, Trained):
    """Options of `distzo2 plan`."""

    model: Name | None = option(
        None,
        "a checkpoint, a GGUF file or a configuration (no weights are read), or opt-125m, opt-1.3b, ... opt-175b",
        "DIR|FILE|NAME",
        group="what",
    )
    table: Switch = option(False, "the memory that models of known sizes need, by how they are stored, and no more")
    store: Store | None = option(None, "pack the blocks' matrices at load, as finetune does (default: as they are)")
    dtype: Dtype = option("auto", "dtype of the weights; auto: the configuration's, float16 for a name")
    compute_dtype: ComputeDtype = option(
        "auto", "what modules compute with; auto: float32 on a CPU whose 16-bit products are no faster, else stored"
    )
    tf32: Switch = option(False, "float32 products in TF32, on a GPU")
    batch: Count = option(8, "sequences a step, of all ranks")
    tokens: Count = option(512, "tokens of a sequence")
    micro_batches: Count | None = option(None, "parts of the batch; must divide --batch (default: one a data rank)")

    machine: Name = option(
        "this",
        "this: what distzo2 measure saved; a node of 8 GPUs by name; or a file that distzo2 measure wrote",
        "this|a100|h100|h200|FILE",
        group="where",
    )
    parallel: str | None = option(None, "the mesh (default: one device)", "pert=P,data=D")
    nproc: Count | None = option(None, "try every mesh of N ranks, and name the best")
    slice: Literal["on", "off", "auto"] = option("auto", "whether ranks share each block's transfer; auto: plan both")
    weights: Weights = option("host", "where blocks live")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: the machine's GPUs")
    slots: Annotated[Count, Range(ge=2)] = option(3, "blocks on the device at once")
    write_every: Count = option(1, "write a block back at every N-th step")
    anchor: PositiveOrZero = option(0.0, "above 0: with a second copy of what is trained, as finetune keeps it")
    memory_budget: Bytes = option(None, "bytes of the device for weights, as for finetune", "BYTES|auto")
    host_memory: Bytes = option("auto", "bytes of the host that weights may take; auto: the machine's", "BYTES|auto")
    max_lanes: Count | None = option(None, "evaluations that share a pass, on a rank")
    devices_per_switch: Count = option(1, "GPUs that share a link to the host")
    no_nvlink: Switch = option(False, "all-gathers go over the links to the host")

    picture: str | None = option(None, "the best plan's timeline as a PNG", "FILE", group="what is written")
    trace: str | None = option(None, "the same as a Chrome trace, which opens in Perfetto", "FILE")
    json: str | None = option(None, "all of it as JSON; - for standard output, and nothing else", "FILE")

    def __post_init__(self) -> None:
        Estimating.__post_init__(self)
        Trained.__post_init__(self)
        if self.model is None and not self.table:
            raise UsageError("--model is missing")
