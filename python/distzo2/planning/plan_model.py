"""What a model's forward is made of, found by running it on the meta device: no weights, no arithmetic.

The module is cut into units as the runtime cuts it, and one lane's forward is cut where a lane is handed over: at the
entry of each unit. Each part between two hand-overs is a `Part`: its operations with their shapes, and how many bytes
of the lane's own tensors are alive when it begins, at most, and when it ends.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from distzo2.errors import DistZO2Error, UsageError
from distzo2.formats.gains import GAINED, add_gains
from distzo2.formats.gguf import is_gguf
from distzo2.formats.packed_checkpoint import is_quantized
from distzo2.formats.packing import pack_map, packable, packed_as
from distzo2.models.pretrained import meta_model, open_checkpoint
from distzo2.models.shapes import LARGE, SHAPES, shape_config
from distzo2.optim.selection import select
from distzo2.peft.adapters import NAME, keys_of, virtual_tokens, wrap
from distzo2.run.options import Trained
from distzo2.run.preflight import adapter_config, check_packed
from distzo2.streaming.hooks import Windows
from distzo2.tasks.kinds import model_kind
from distzo2.weights.units import HALVES, StoredAs, StoredBy, Unit, collect_params, dtypes_to_compute_in, find_units

# Reads rows of its first argument, not all of it.
_LOOKUPS = {"embedding", "index", "index_select", "gather", "nll_loss_forward"}
_EXPONENTIALS = {"_softmax", "_log_softmax"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_ALL = Trained()  # of the model is trained
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach"}


@dataclass(frozen=True)
class Op:
    """An operation of a forward.

    product: `size` is (rows, inner, columns), times `batch`; attention: (queries, keys, head width), times batch and
    heads, `causal` if the upper half is left out; stream, everything else: bytes read and written.
    """

    kind: Literal["product", "attention", "stream"]
    size: tuple[int, ...]
    dtype: torch.dtype
    batch: int = 1
    causal: bool = False

    @property
    def flop(self) -> float:
        """Arithmetic of a product or attention; a multiplication with its addition counts as two."""
        if self.kind == "product":
            return 2.0 * self.batch * math.prod(self.size)
        if self.kind == "attention":
            return 4.0 * self.batch * math.prod(self.size) * (0.5 if self.causal else 1.0)
        return 0.0

    @property
    def num_bytes(self) -> float:
        """Bytes that it reads and writes."""
        if self.kind == "stream":
            return float(self.size[0])
        a, b, c = self.size
        elements = a * b + b * c + a * c if self.kind == "product" else 2 * a * c + 2 * b * c
        return float(self.batch * elements * self.dtype.itemsize)


@dataclass(frozen=True)
class Part:
    """What a lane runs between two hand-overs.

    `units`: indices of the units whose windows are open, outermost first, the entered one last; none before the first.
    """

    units: tuple[int, ...]
    ops: tuple[tuple[Op, int], ...]  # with how often each occurs
    num_ops: int
    live_before: int  # bytes of the lane's own tensors
    peak: int
    live_after: int


@dataclass(frozen=True)
class ModelPlan:
    """A model at one shape of micro-batch. The units are those that the runtime would make."""

    name: str
    dtype: torch.dtype  # that is stored
    units: Sequence[Unit]
    parts: Sequence[Part]
    saved_bytes: int = 0  # of the tensors that a run writes at its end: the adapter's, or the model's

    def lane_bytes(self, num_lanes: int) -> int:
        """The most that the lanes of a pass hold together: one runs, the others are parked on either side of it."""
        return max(p.peak + (num_lanes - 1) * max(p.live_before, p.live_after) for p in self.parts)


def plan_model(
    source: str,
    dtype: torch.dtype | None,
    rows: int,
    tokens: int,
    compute_dtype: torch.dtype | None = None,
    trained: Trained = _ALL,
    store: str | None = None,
) -> ModelPlan:
    """The units of a model, and the parts of a forward with the loss of all its tokens, at [rows, tokens].

    Args:
        source: a published model's name, a checkpoint's directory, a config.json, or a GGUF file. Of packed weights
            only the files' headers are read.
        dtype: of the weights; None: the configuration's, float16 for a name.
        compute_dtype: of the forward, as of `offload`.
        trained: which part of it is trained, or which adapter.
        store: packs the matrices of blocks, as of `from_pretrained`.

    Raises:
        UsageError: `source` is none of these. CheckpointError: its configuration is not one that transformers knows.
        DistZO2Error: the part cannot be trained.
    """
    path, kind = Path(source), "causal"
    place = path.parent if path.is_file() and path.name == "config.json" else path
    stored: dict[int, StoredAs] = {}  # by the ids of parameters
    if source in SHAPES or source in LARGE:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(source), dtype=dtype or torch.float16)
        name = source
    elif place.is_dir() or is_gguf(place):
        name = place.resolve().name
        if is_gguf(place) or is_quantized(place):
            model, found = open_checkpoint(place, dtype=dtype)
            with closing(found):
                found = found if store is None else pack_map(model, found, store)[0]
                stored = {id(p): told for n, p in model.named_parameters() if (told := found.stored_as(n)) is not None}
        else:
            model = meta_model(place, dtype)
        kind = model_kind(place).name if trained.adapts else kind
    else:
        known = f"a checkpoint's directory, a config.json, a GGUF file, or one of {', '.join((*SHAPES, *LARGE))}"
        raise UsageError(f"--model {source}: expected {known}")
    if store is not None and not stored:
        names = packable(model)
        stored = {id(p): packed_as(p.shape, store) for name, p in model.named_parameters() if name in names}
    for p in model.parameters():
        if (told := stored.get(id(p))) is not None and told.layout is not None and told.code_dtype is None:
            p.requires_grad_(False)
    check_packed(trained, source, stored.values())
    declared = model.dtype
    if trained.adapts:
        model = wrap(model, adapter_config(trained, source, kind, model))
    if trained.tune == "gain":
        told = {name: each for name, p in model.named_parameters() if (each := stored.get(id(p))) and each.layout}
        layouts = add_gains(model, {name: each.layout for name, each in told.items()}, f"--model {source}")
        for name, layout in layouts.items():
            gained = replace(told[name], layout=layout, format=told[name].format + GAINED)
            stored[id(model.get_parameter(name))] = gained
    if trained.train_only or trained.freeze:
        select(model, trained.train_only, trained.freeze)
    by_name = {name: stored.get(id(p)) for name, p in model.named_parameters()}
    widen = not trained.adapts and bool(trained.train_only or trained.freeze)
    return plan_module(model.eval().to("meta"), name, declared, rows, tokens, compute_dtype, by_name.get, widen)


def plan_module(
    model: nn.Module,
    name: str,
    dtype: torch.dtype,
    rows: int,
    tokens: int,
    compute_dtype: torch.dtype | None = None,
    stored: StoredBy | None = None,
    widen: bool = False,
) -> ModelPlan:
    """Plans a language model that is on the meta device; see `plan_model`."""
    adapter = getattr(model, "peft_config", {}).get(NAME)
    taken = virtual_tokens(adapter)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and tokens + taken > limit:
        beside = f", of which the adapter takes {taken}" if taken else ""
        raise UsageError(f"--tokens {tokens}: {name} has {limit} positions{beside}")
    params = collect_params(model, stored)
    saved = keys_of(model) if adapter is not None else {p.name for p in params if not p.is_gain}
    units, dtypes = find_units(model, params, widen=widen), dtypes_to_compute_in(params, compute_dtype)
    for unit in units:
        unit.compute_in(dtypes)
        for p in unit.params:
            p.tensor.data = p.tensor.data.to(p.seen)
    for buffer in model.buffers():
        if buffer.dtype in HALVES:
            buffer.data = buffer.data.to(compute_dtype or buffer.dtype)
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    recorder = _Recorder(model)
    windows = Windows(model, units, recorder)
    try:
        with torch.no_grad(), recorder, _Functions(recorder):
            model(input_ids=ids, labels=ids, use_cache=False).loss.float()
    except (RuntimeError, NotImplementedError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DistZO2Error(f"the forward of {name} cannot be planned, it needs values: {why}") from error
    finally:
        windows.remove()
    recorder.finish()
    written = sum(p.numel * p.declared.itemsize for p in params if p.name in saved)  # codes are decoded
    return ModelPlan(name, dtype, units, recorder.parts, written)


# ---- following a forward ------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """The operations that reach the device, and the storages that they make."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts: list[Part] = []
        self._open: list[Unit] = []
        self._live = 0
        self._known = WeakIdKeyDictionary()  # storages; those of the model are not a lane's
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()] = None
        self._begin()

    def _begin(self) -> None:
        self._ops, self._before, self._peak = Counter(), self._live, self._live
        self._units = tuple(dict.fromkeys(u.index for u in self._open))

    def begin(self, module: nn.Module) -> None:
        """No-op: passes that are not of one forward are not planned."""

    def end(self) -> None:
        """No-op, as `begin`."""

    def enter(self, unit: Unit) -> None:
        """A window opens. The lane parks here, unless another window of the unit is open: the part so far ends."""
        parks = unit not in self._open
        if parks:
            self.finish()
        self._open.append(unit)
        if parks:
            self._begin()

    def exit(self, unit: Unit) -> None:
        self._open.pop()

    def finish(self) -> None:
        """Ends the last part."""
        ops = tuple(self._ops.items())
        self.parts.append(Part(self._units, ops, self._ops.total(), self._before, self._peak, self._live))

    def add(self, op: Op) -> None:
        self._ops[op] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs, inputs = ([t for t in tree_leaves(each) if isinstance(t, torch.Tensor)] for each in (out, args))
        made = [t for t in outputs if self._is_new(t)]
        name = func.overloadpacket.__name__
        in_place = name.endswith("_") and not name.startswith("_")
        if (made or in_place) and name not in _FREE:
            self.add(_op_of(name, inputs, made or outputs))
        return out

    def _is_new(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage was not there before; from now on it counts, until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known[storage] = None
        weakref.finalize(storage, self._freed, storage.nbytes())
        self._live += storage.nbytes()
        self._peak = max(self._peak, self._live)
        return True

    def _freed(self, num_bytes: int) -> None:
        self._live -= num_bytes


class _Functions(TorchFunctionMode):
    """Attention and a mixture's experts are one operation each, as their kernels are; questions about values are
    answered with yes."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is torch._grouped_mm:
            return self._experts(*args, **kwargs)
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True  # such as: are all positions of the mask 1, is no row packed
        return func(*args, **kwargs)

    def _attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **others):
        size = (q.shape[-2], k.shape[-2], v.shape[-1])
        self._recorder.add(Op("attention", size, q.dtype, math.prod(q.shape[:-2]), is_causal))
        return q.new_empty((*q.shape[:-1], v.shape[-1]))

    def _experts(self, x, weights, offs, **others):
        """Rows of `x` [rows, inner] in groups, each times an expert of [experts, inner, columns]: evenly dealt."""
        experts, inner, columns = weights.shape
        rows = -(-x.shape[0] // experts)
        self._recorder.add(Op("product", (rows, inner, columns), x.dtype, experts))
        return x.new_empty(x.shape[0], columns)


def _op_of(name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Op:
    """The operation `name` as one of our kinds."""
    dtype = outputs[0].dtype
    if name in _PRODUCTS:
        a, b = inputs[-2:]
        batch = a.shape[0] if a.dim() == 3 else 1
        return Op("product", (a.shape[-2], a.shape[-1], b.shape[-1]), a.dtype, batch)
    num_bytes = sum(t.numel() * t.dtype.itemsize for t in outputs)
    if name in _EXPONENTIALS:
        num_bytes *= 3  # read for the sum, then again for the result
    elif name in _LOOKUPS:
        num_bytes *= 2
    else:  # an expanded dimension counts once
        walks = [(t, zip(t.shape, t.stride(), strict=True)) for t in inputs]
        num_bytes += sum(math.prod(n for n, stride in walk if stride) * t.dtype.itemsize for t, walk in walks)
    return Op("stream", (num_bytes,), dtype)
