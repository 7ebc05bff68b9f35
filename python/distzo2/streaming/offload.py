"""Handing a model over: `offload`, and what the model can still do afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distzo2.adapter_types import check_adapters
from distzo2.errors import DistZO2Error, UsageError
from distzo2.parallel.group import current, joined
from distzo2.parallel.node import choose_slices, memory_share
from distzo2.parallel.sliced_store import SlicedStore, slices_of
from distzo2.record.weight_file import KeptWeights, RunSoFar, WeightFile
from distzo2.streaming.isolation import RandomStream
from distzo2.streaming.lanes import Lane
from distzo2.streaming.runtime import StreamingRuntime
from distzo2.streaming.state_dict import StateHooks
from distzo2.weights.access import WeightAccess
from distzo2.weights.residency import DEFAULT_SLOTS, MemoryBudget, blocks_to_stream, slots_of_use
from distzo2.weights.store import MemoryStore, Store, StoredCopy, core_errors, streaming_store
from distzo2.weights.unit_weights import UnitWeights
from distzo2.weights.units import TRAINABLE_DTYPES, StoredBy, Unit, collect_params, dtypes_to_compute_in, find_units
from distzo2.weights.updates import CLEAN
from distzo2_core import RangeFiles, cuda_available

WEIGHTS = ("device", "host", "disk")


def offload(
    model: nn.Module,
    device: str | torch.device = "cpu",
    weights: str = "host",
    *,
    units: Iterable[str] | None = None,
    directory: str | os.PathLike | None = None,
    slots: int = DEFAULT_SLOTS,
    memory_budget: MemoryBudget = None,
    host_memory: MemoryBudget = None,
    write_every: int = 1,
    weight_file: WeightFile | None = None,
    compute_dtype: torch.dtype | None = None,
    train: bool = False,
    stored: StoredBy | None = None,
    widen: bool = False,
    keep_start: bool = False,
) -> nn.Module:
    """Hands over a model's weights, which stream through `device` unit by unit from then on.

    The model stays a model: calling it, `generate`, `state_dict` and `load_state_dict` work and see every update.
    Between forwards its parameters are placeholders; `distzo2.edit(model)` makes them real for other changes.

    Args:
        model: any module. Parameters may be on the meta device, to be filled through `runtime_of(model).access`. A
            parameter with `requires_grad=False` is frozen: read, never perturbed, never written back. Where at most an
            eighth of a block is trained, as by adapters, that part stays on the device, and the rest is only read. One
            that is frozen later is left out by optimizers made after that.
        device: where it computes: "cpu", "cuda", "cuda:1".
        weights: where the streamed weights live: "device", "host" (pinned memory), "disk" (a block file).
        units: names of the modules to stream, with shell wildcards; None: the blocks of the model's block lists, or
            groups by bytes where it has none. Other parameters stay on the device.
        directory: where the block file is made (weights="disk" without weight_file); it is a working file, and goes
            with the model. On a CPU, glibc then gives freed memory of 1 MiB and more back at once, unless
            MALLOC_MMAP_THRESHOLD_ is set.
        slots: blocks that are on the device at once, at least 2; by default 2 where all that streams is packed.
        memory_budget: bytes of the device that weights may take (resident units, perturbed copies, slots): as many
            blocks as fit stay there, spread among those that stream. "auto": 70% of what is free now. None: all blocks
            stream. Activations are not in it. The bits are the same.
        host_memory: bytes of its machine's memory that the pools of all ranks may take together, even if fewer are
            available now. More than a control group leaves is refused. None, "auto": nine tenths of what is available.
        write_every: a streamed block's stored copy is written at every `write_every`-th update, blocks in turn, and the
            updates in between are made again at each visit. 1 writes every block at every step; more spares a disk, at
            the cost of (write_every - 1) / 2 more noise tensors a visit. The bits are the same.
        weight_file: keeps weights that survive a crash: with weights="disk" the streamed blocks live in it, and what
            else is trained is copied there. If its journal exists, weights come from the file as far as they can be
            used, and `ZOSGD` must then resume that journal.
        compute_dtype: float32, bfloat16 or float16: what modules compute with, whatever is stored; their parameters are
            copies in it, which are not rounded to what is stored. A difference of two losses often needs float32
            where 16 bits are stored (docs/precision.md). Parameters stored in float32 beside narrower ones, and other
            dtypes, stay as they are; buffers of 16 bits follow. None: as stored.
        train: leave the model's training mode as it is. By default it is set to eval(): dropout adds noise to the
            difference of two losses.
        stored: how the bytes of a parameter on meta are stored, by its name, or None. Frozen parameters then stay as
            they are in files, packed ones among them. With weights="disk", frozen blocks that lie in files stream from
            there: they are not copied, and nothing may change the files meanwhile. What little of a block is not as
            they have it stays on the device. `distzo2.from_pretrained` gives it.
        widen: store in float32 what is trained in 16 bits and is small beside a frozen block, or is a vector outside of
            blocks. Modules compute with it as they declare it; `state_dict` and checkpoints have it in float32.
        keep_start: keep a second copy of what is trained, as it is now, behind the first one, with which it streams:
            `ZOSGD(anchor=)` needs it. Weights that are replaced later are kept anew.

    Returns:
        The same module.

    Raises:
        DistZO2Error: the device is not there, an argument is not one of those named, or the model cannot be streamed,
            or has an adapter that no forward can train.
    """
    if not isinstance(model, nn.Module):
        raise DistZO2Error(f"offload expects a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_distzo2_runtime"):
        raise DistZO2Error(f"this {type(model).__name__} was handed over already")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise DistZO2Error("hand over the plain model; compile its blocks with block.compile() instead of the whole")
    if weights not in WEIGHTS:
        raise DistZO2Error(f"weights={weights!r}: expected one of {', '.join(WEIGHTS)}")
    if weights == "disk" and directory is None and weight_file is None:
        raise DistZO2Error("weights='disk' needs directory=, where the block file is made, or weight_file=")
    if slots < 2:
        raise DistZO2Error(f"slots={slots}: at least 2 were expected")
    if type(write_every) is not int or write_every < 1:
        raise DistZO2Error(f"write_every={write_every!r}: an integer of at least 1 was expected")
    for name, num_bytes in (("memory_budget", memory_budget), ("host_memory", host_memory)):
        if not (num_bytes in (None, "auto") or (type(num_bytes) is int and 0 < num_bytes < 2**63)):
            raise DistZO2Error(f'{name}={num_bytes!r}: expected a positive number of bytes, "auto" or None')
    usable = usable_device(device)
    check_computes(usable, compute_dtype)
    if not train:
        model.eval()
    _take(
        model,
        usable,
        weights,
        compute_dtype=compute_dtype,
        units=None if units is None else [units] if isinstance(units, str) else list(units),
        directory=directory if weights == "disk" else None,
        slots=slots,
        memory_budget=memory_budget,
        host_memory=host_memory,
        write_every=write_every,
        weight_file=weight_file,
        stored=stored,
        widen=widen,
        keep_start=keep_start,
    )
    return model


def check_computes(device: torch.device, dtype: torch.dtype | None) -> None:
    """
    Raises:
        DistZO2Error: `dtype` is not one that weights may have, or the device has no products in it.
    """
    if dtype is None:
        return
    if dtype not in TRAINABLE_DTYPES:
        raise DistZO2Error(
            f"compute_dtype={dtype!r}: torch.float32, torch.bfloat16, torch.float16 or None was expected"
        )
    try:
        torch.nn.functional.linear(*torch.ones(2, 8, 8, dtype=dtype, device=device))
    except RuntimeError as error:
        raise DistZO2Error(f"compute_dtype: {device} does not compute in {dtype}: {error}") from error


def _take(model: nn.Module, device: torch.device, weights: str, **options: Any) -> None:
    """Hands a model over; `edit` does so again where its body changed which parameters there are."""
    check_adapters(model)
    # What is made in inference mode cannot be changed outside of it.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        make_meta_buffers(model)
        runtime = _hand_over(model, device, weights, undo.callback, **options)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        runtime.compute_in(options["compute_dtype"])
        undo.pop_all()
    runtime.options = {"device": device, "weights": weights, **options}
    object.__setattr__(model, "_distzo2_runtime", runtime)
    object.__setattr__(model, "_distzo2_state", StateHooks(runtime))


def make_meta_buffers(model: nn.Module) -> None:
    """Makes buffers that are on the meta device as the model's class makes them (`_init_weights` of transformers).

    Raises:
        DistZO2Error: it does not make one of them; names the buffer.
    """
    for prefix, module in model.named_modules():
        absent = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in absent:
            module._buffers[name] = torch.full_like(module._buffers[name], _unset(module._buffers[name]), device="cpu")
        made = set()
        if absent and hasattr(model, "_init_weights"):
            model._init_weights(module)
            made = {name for name in absent if not (module._buffers[name] == _unset(module._buffers[name])).any()}
            made -= {name for name in made if module._buffers[name].isnan().any()}
        for name in absent:
            if name not in made:
                raise DistZO2Error(
                    f"buffer {f'{prefix}.{name}'.lstrip('.')} is on the meta device, and {type(model).__name__} does "
                    "not say what it holds: build the model with real buffers (only parameters may be on meta), or "
                    "load it with distzo2.from_pretrained"
                )


def _unset(buffer: torch.Tensor) -> float | int | bool:
    if buffer.dtype == torch.bool:
        return True
    return float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min


def _hand_over(
    model: nn.Module,
    device: torch.device,
    weights: str,
    undo: Callable[[Callable[[], None]], Any],
    *,
    compute_dtype: torch.dtype | None,
    units: Iterable[str] | None,
    directory: str | os.PathLike | None,
    slots: int,
    memory_budget: MemoryBudget,
    host_memory: MemoryBudget,
    write_every: int,
    weight_file: WeightFile | None,
    stored: StoredBy | None,
    widen: bool,
    keep_start: bool,
) -> StreamingRuntime:
    """Cuts the model into units, decides where each lives, makes the stores, and moves the weights there.

    Where the ranks of a node share blocks in slices, they do so together: an error of one is an error of all. `undo`
    gets what closes memory and files after an error.
    """
    params = collect_params(model, stored)
    found = find_units(model, params, units, widen)
    for unit in found:
        unit.compute_in(dtypes_to_compute_in(params, compute_dtype))
        unit.keeps_start = keep_start
    slots = slots_of_use(found, slots)
    on_disk = weights == "disk"
    if on_disk and weight_file is not None:
        directory = Path(weight_file.path).parent
    slices = choose_slices(current(), found, device, weights, directory, host_memory)
    together = slices.node.exchange if slices is not None else None
    streams = on_disk or (weights == "host" and (device.type != "cpu" or slices is not None))
    with nullcontext({}) if together is None else together.together("handing over a model") as agreed:
        share = memory_share(joined(), host_memory)

        def free_bytes() -> int:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else share.num_bytes
            return free if together is None else min(n[0] for n in together.agree("memory_budget", numbers=(free,)))

        streamed = blocks_to_stream(found, device, memory_budget, slots, free_bytes) if streams else []
        agreed["the blocks that stream (memory_budget=)"] = [u.name for u in streamed]
        shares, index = ([1.0], 0) if slices is None else (slices.shares, slices.node.index)
        places = {u: place for u in streamed if on_disk and (place := _places_of(u)) is not None}
        streamed.sort(key=lambda unit: unit in places)  # what lives in files of others comes last
        moving = slices_of(streamed, shares, index)  # a whole block is a slice of one
        for copy in moving:
            copy.is_fixed = copy.unit in places
        written = [copy for copy in moving if not copy.is_fixed]
        staying = [StoredCopy.whole(u) for u in found if u not in streamed]
        options = share.pool_options()
        memory = MemoryStore(staying, device, **options)
        undo(memory.close)
        run, kept = None, None
        if weight_file is not None:
            run = _run_so_far(weight_file)
            if on_disk and written:
                rows = [*written, *(copy for copy in staying if copy.unit.trainable)]
                kept = KeptWeights(weight_file, rows, len(written), rank=_rank(), run=run)
                undo(kept.close)
        if not moving:
            ring = Store()
        elif device.type == "cpu" and directory is None:  # slices are in the memory that computes
            ring = MemoryStore(moving, device, **options)
        else:
            file, fixed = None if kept is None else kept.file, _range_files(moving[len(written) :], places)
            ring = streaming_store(moving, device, directory=directory, file=file, fixed=fixed, slots=slots, **options)
        undo(ring.close)
        if moving and slices is not None:
            node, backend = slices.node, slices.backend
            ring = SlicedStore(ring, moving, device, slots=slots, node=node, shares=shares, backend=backend)
    copies = sorted([*staying, *moving], key=lambda copy: copy.unit.index)
    unit_weights = UnitWeights(
        found, copies, memory, ring, device=device, write_every=write_every, host_memory=share.host_memory
    )
    access = WeightAccess(unit_weights, together)
    if kept is not None:
        kept.load(unit_weights)
    elif weight_file is not None:
        kept = _load_in_turn(weight_file, unit_weights, run)
        undo(kept.close)
    if isinstance(ring, SlicedStore):
        ring.serve(unit_weights, slices.number)
    runtime = StreamingRuntime(model, unit_weights, access, weights, kept)
    if kept is not None:
        access.before_replacing = kept.replaced
    return runtime


def _places_of(unit: Unit) -> list[tuple[Path, int, int, int]] | None:
    """Ranges (file, offset, bytes, place in the unit) that hold a frozen unit, or None."""
    found = []
    for param in unit.params:
        if param.trainable or param.stored is None or param.stored.ranges is None:
            return None
        for path, offset, num_bytes, place in param.stored.ranges:
            found.append((path, offset, num_bytes, param.byte_offset + place))
    return found


@core_errors
def _range_files(
    copies: Sequence[StoredCopy], places: Mapping[Unit, Sequence[tuple[Path, int, int, int]]]
) -> RangeFiles | None:
    """The files that hold `copies`, a block each; None if there are none."""
    number: dict[str, int] = {}
    blocks = []
    for copy in copies:
        rows = []
        for path, offset, num_bytes, place in places[copy.unit]:
            first, last = max(place, copy.begin), min(place + num_bytes, copy.end)  # of the slice
            if first < last:
                file = number.setdefault(str(path), len(number))
                rows.append((file, offset + first - place, last - first, first - copy.begin))
        blocks.append(rows)
    return RangeFiles(list(number), [copy.num_bytes for copy in copies], blocks) if copies else None


def _rank() -> int:
    mesh = current()
    return 0 if mesh is None else mesh.rank


def _run_so_far(weight_file: WeightFile) -> RunSoFar | None:
    """What rank 0 reads in the journal, on all ranks; None if there is no journal yet."""
    mesh = current()
    if mesh is None:
        return RunSoFar.of(weight_file.journal)
    said = mesh.exchange.from_rank_0("the run so far", lambda: json.dumps(RunSoFar.of(weight_file.journal)).encode())
    return None if said == b"null" else RunSoFar(*json.loads(said))


def _load_in_turn(weight_file: WeightFile, weights: UnitWeights, run: RunSoFar | None) -> KeptWeights:
    """Fills whole units that live in memory from the file of rank 0, which keeps it. A file is open in one process at a
    time, so that ranks read one after another; one that does not see the file fills nothing."""
    gathered = [copy.unit for copy in weights.copies if copy.starts and weights.store_of(copy).gathers]
    rows = [StoredCopy.whole(u) for u in weights.units if u.trainable and u not in gathered]  # whole, with the start
    if gathered and not rows:
        raise DistZO2Error(f"{weight_file.path}: nothing to copy: with keep_start, units in slices are left out")
    mesh, rank, kept = current(), _rank(), None
    for turn in reversed(range(1 if mesh is None else mesh.world_size)):
        with nullcontext() if mesh is None else mesh.together("reading the weight file"):
            if turn == rank:
                kept = KeptWeights(weight_file, rows, run=run, owns=rank == 0)
                kept.load(weights)
    return kept


def usable_device(name: str | torch.device) -> torch.device:
    """The device called `name`: "cpu", "cuda" (the current one) or "cuda:N".

    Raises:
        UsageError: not a name of such a device.
        DistZO2Error: this machine does not have it; the message says what is missing.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name}: expected cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"device {name}: expected cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        usable, reason = cuda_available()
        raise DistZO2Error(f"device {name} cannot be used: {built}" + ("" if usable else f" ({reason})"))
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise DistZO2Error(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def runtime_of(model: nn.Module) -> StreamingRuntime:
    """Returns the runtime of a model that was handed over.

    Raises:
        DistZO2Error: the model was not handed over.
    """
    runtime = getattr(model, "_distzo2_runtime", None)
    if runtime is None:
        raise DistZO2Error(
            f"this {type(model).__name__} was not handed over: call distzo2.offload or distzo2.from_pretrained first"
        )
    return runtime


@torch.no_grad()
def evaluate(model: nn.Module, closures: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs every closure on the clean, up-to-date weights, all in one pass over them, under no_grad.

    Args:
        model: a model that was handed over.
        closures: functions without arguments that call the model; they must enter the same units in the same order,
            and may end behind different numbers of passes over them, as texts that `generate` makes.

    Returns:
        The closures' results, in order.

    Raises:
        DistZO2Error: the model was not handed over, or the closures entered different units.
        Exception: whatever a closure raises.
    """
    runtime = runtime_of(model)
    lanes = [Lane(CLEAN, i, c, RandomStream.seeded(runtime.device, 0, 0, i)) for i, c in enumerate(closures)]
    if lanes:
        runtime.run(lanes)
    return [lane.result for lane in lanes]


def state_dict(model: nn.Module, *, trainable_only: bool = False) -> dict[str, torch.Tensor]:
    """Up-to-date weights in host memory, by name, as `model.state_dict()` gives them.

    Args:
        model: a model that was handed over.
        trainable_only: only parameters that are trained or may be: those of a block that is frozen are not read.
    """
    runtime = runtime_of(model)
    if not trainable_only:
        return model.state_dict()
    found: dict[int, torch.Tensor] = {}
    for unit in runtime.units:
        params = [p for p in unit.params if p.trainable and p.requires_grad]
        if params:
            with runtime.access.reading(unit) as views:
                found |= {id(p.tensor): views[p.name].clone() for p in params}
    return {name: found[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in found}


@contextmanager
def present(module: nn.Module | nn.Parameter) -> Iterator[nn.Module | nn.Parameter]:
    """Makes the parameters of a module real for code that reads them outside of its forward, as in `x @ head.weight.T`.

    Inside a step they are those of the evaluation that runs, perturbed; elsewhere they are clean and up to date. They
    are read-only, and valid in the body alone. A unit is opened whole: with a parameter of a block comes the block, and
    units that stream stay on the device together. What is no part of a model that was handed over is real already.

    Args:
        module: a model, any module in it or around it, or a parameter.

    Raises:
        DistZO2Error: the body wrote a parameter, or the lanes of a step do not enter the same units in the same order.
    """
    modules = module.modules() if isinstance(module, nn.Module) else ()
    params = [p for m in modules for p in m._parameters.values()] if modules else [module]
    found = [p._distzo2 for p in params if hasattr(p, "_distzo2")]
    units_of: dict[StreamingRuntime, set[int]] = {}
    for param, runtime in found:
        units_of.setdefault(runtime, set()).add(runtime.unit_of[param.index].index)
    with ExitStack() as stack:
        for runtime, indices in units_of.items():
            stack.enter_context(runtime.presenting([runtime.units[index] for index in sorted(indices)]))
        yield module


@contextmanager
def edit(model: nn.Module) -> Iterator[nn.Module]:
    """Makes parameters real tensors in host memory, with every update made so far, that may be changed.

    Afterwards the changed weights are the model's, and no journal leads to them: one that is being written ends. If the
    body raises, the weights stay as they were. No forward may run in the body. With weights on disk the whole model is
    in memory meanwhile. Where the body adds, replaces, resizes, freezes or thaws parameters, the model is handed over
    anew, as it was, without its weight file; the optimizers made for it before can step no more.

    Raises:
        DistZO2Error: a parameter that is still the same object has another shape, dtype or device afterwards; nothing
            is changed then.
    """
    runtime = runtime_of(model)
    access, parameters = runtime.access, runtime.parameters
    before = _structure(model)
    failure: BaseException | None = None
    restructured = False
    try:
        try:
            with access.replacing("edit"):  # no rank is in a forward
                runtime.weights.flush()
            for unit in runtime.units:
                with access.reading(unit) as views:
                    parameters.show(unit, [views[param.name].clone() for param in unit.params])
            for param in runtime.params:
                param.tensor.requires_grad_(param.requires_grad)
            with runtime.editing(), torch.no_grad():
                model._distzo2_state.guard(False)
                yield model
            thawed = any(p.tensor.requires_grad and not p.trainable for p in runtime.params)
            restructured = thawed or _structure(model) != before
            edited = {param.index: param.tensor.data for param in runtime.params}
            for param in runtime.params if not restructured else ():
                found = edited[param.index]
                if (found.shape, found.dtype, found.device.type) != (param.shape, param.declared, "cpu"):
                    raise DistZO2Error(
                        f"parameter {param.name} is {found.dtype} {tuple(found.shape)} on {found.device} after the "
                        f"edit; {param.declared} {tuple(param.shape)} on cpu was expected"
                    )
            for unit in runtime.units if not restructured else ():
                if not access.is_replaceable(unit):  # if it changes, all become weights of their own
                    restructured |= not access.holds(unit, {p.name: edited[p.index] for p in unit.params})
        except BaseException as error:
            failure = error
        with access.replacing("edit", error=failure) as note:
            for unit in runtime.units if not restructured else ():
                note(unit.name, [edited[param.index] for param in unit.params])
                if not access.is_replaceable(unit):
                    continue
                with access.writing(unit) as views:
                    for param in unit.params:
                        views[param.name].copy_(edited[param.index])
            runtime.weights.restart()
        if restructured:
            _take_again(model, runtime)
    finally:
        if not restructured:
            model._distzo2_state.guard(True)
            parameters.hide_each(runtime.params)


def _structure(model: nn.Module) -> list[tuple[str, int, bool]]:
    return [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def _take_again(model: nn.Module, runtime: StreamingRuntime) -> None:
    """Hands a model over whose parameters are real and no longer those that it was cut into. What was stored in float32
    keeps its values where it is stored so again."""
    runtime.close()
    wide = {id(param.tensor): param.tensor.data for param in runtime.params if param.narrow is not None}
    for param in runtime.params:  # weights are real with their gains applied
        for owner in param.owners if param.is_gain else ():
            owner._parameters = {name: p for name, p in owner._parameters.items() if p is not param.tensor}
        if param.narrow is not None:
            param.tensor.data = param.tensor.data.to(param.narrow)
    runtime.cast_buffers(None)
    model._distzo2_state.remove()
    del model._distzo2_state, model._distzo2_runtime  # if it cannot be handed over, it is a plain model again
    _take(model, **runtime.options | {"weight_file": None, "stored": None, "compute_dtype": runtime.compute_dtype})
    again = runtime_of(model)
    for unit in again.units:
        if held := [param for param in unit.params if param.narrow is not None and id(param.tensor) in wide]:
            with again.access.writing(unit, keep=True) as views:
                for param in held:
                    views[param.name].copy_(wide[id(param.tensor)])
