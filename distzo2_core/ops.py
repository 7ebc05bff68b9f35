"""The public functions: noise, in-place perturb, restore and update, `materialize`, `decode`, and `checksum`.

Each checks its arguments, once for all backends, does nothing for an empty problem, and hands over to a backend (see
`backends`). All backends give the same bits. Noise is a pure function of (seed, step, probe, parameter, element):
`param` is the parameter's index in the model, and `offset` is the row-major index, within the whole parameter, of the
first element asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import FunctionType

import torch

from .backends import implementation, resolve_backend
from .packed import PackedTable
from .reference_ops import checksum as checksum_by_torch
from .types import (
    DTYPE_CODES,
    FAMILIES,
    MAX_ELEMENTS,
    MAX_PARAM,
    MAX_PROBE,
    MAX_STEP,
    Emit,
    Program,
    SegmentTable,
    Update,
    check_float,
    check_int,
    check_matrix,
    check_seed,
    dtype_code,
    encode_program,
    family_code,
    matrix_shape,
)


def normal(
    numel: int,
    *,
    seed: int,
    step: int,
    param: int,
    probe: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Standard normals of the elements [offset, offset + numel) of a parameter.

    Philox4x32-10 words through Box-Muller, in float32 within 2e-6 of the exact value, then rounded to nearest even.

    Args:
        numel: number of elements.
        seed: the run's seed, in [0, 2^64).
        step: in [0, 2^32).
        param: index of the parameter, in [0, 2^32).
        probe: index of the perturbation within the step, in [0, 2^20).
        offset: first element; offset + numel is at most 2^38.
        dtype: float32 (the default), bfloat16 or float16.
        device: where the result is made; the default is the CPU.
        out: a contiguous tensor of numel elements, of any shape, that the result is written to; `dtype` and `device`
            are its own and need not be given. Large results pay more for fresh memory than for their elements.
        backend: "native", "triton", "reference", or None for the default of the device.

    Returns:
        A tensor [numel] of `dtype` on `device`, or `out`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        BackendError: the backend is not there or cannot run on the device.
    """
    return _noise("normal", numel, (seed, step, param, probe, offset), dtype, device, out, backend)


def rademacher(
    numel: int,
    *,
    seed: int,
    step: int,
    param: int,
    probe: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Signs +1 and -1 with equal probability; arguments, result and errors are those of `normal`."""
    return _noise("rademacher", numel, (seed, step, param, probe, offset), dtype, device, out, backend)


def low_rank(
    shape: Sequence[int],
    *,
    family: str,
    seed: int,
    step: int,
    param: int,
    probe: int = 0,
    offset: int = 0,
    numel: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Low-rank noise z = A B^T / sqrt(r) of a matrix, or of each expert's matrix: mean 0, variance 1, uncorrelated.

    A [rows, r] and B [cols, r] are normals or signs of Philox purposes 4 and 5, under the same key and counter as dense
    noise; of experts, A has the rows of all and B the columns of all. In float32, z = a_0 * b_0, then
    fma(a_s, b_s, z) for s = 1 .. r - 1, then z / sqrt(r), which is exact; then rounded to nearest even.

    Args:
        shape: (rows, cols), or (experts, rows, cols), of the whole parameter as it is stored.
        family: "sign-r1", "sign-r4", "normal-r1" or "normal-r4": what A and B are made of, and r.
        offset, numel: elements [offset, offset + numel) alone, in row-major order; None: all.
        seed, step, param, probe, dtype, device, out, backend: as for `normal`.

    Returns:
        A tensor of `shape`, or where `numel` is given [numel]; or `out`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; shape has not two or three sizes.
        BackendError: the backend is not there or cannot run on the device.
    """
    if FAMILIES.get(family, 0) < 16:
        known = ", ".join(name for name, code in FAMILIES.items() if code >= 16)
        raise ValueError(f"family must be one of {known}, got {family!r}")
    if len(shape) not in (2, 3):
        raise ValueError(f"shape must be (rows, cols) or (experts, rows, cols), got {tuple(shape)}")
    matrix = check_matrix(*matrix_shape([check_int("shape", size, 0, MAX_ELEMENTS) for size in shape]))
    whole, words = math.prod(shape), (seed, step, param, probe, offset)
    if numel is None:
        z = _noise(family, whole - check_int("offset", offset, 0, 0), words, dtype, device, out, backend, matrix)
        return z.view(*shape) if out is None else z
    if check_int("offset", offset, 0, whole) + check_int("numel", numel, 0, whole) > whole:
        raise ValueError(f"elements {offset} to {offset + numel} do not lie in a parameter of {whole} elements")
    return _noise(family, numel, words, dtype, device, out, backend, matrix)


def perturb_(
    w: torch.Tensor,
    scale: float,
    *,
    seed: int,
    step: int,
    param: int,
    probe: int = 0,
    offset: int = 0,
    family: str = "normal",
    matrix: tuple[int, int] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """w <- rne(w + scale * z), in place, one fused multiply-add in float32 an element.

    Autograd records nothing, as under torch.no_grad: `w` may be a leaf that requires grad, and z is a constant. The
    version counter of `w` is raised, so that a backward pass that has saved `w` is refused.

    Args:
        w: contiguous tensor of float32, bfloat16 or float16, holding elements [offset, offset + w.numel()) of the
            parameter in row-major order.
        scale: epsilon with its sign, rounded to float32.
        seed, step, param, probe, offset, backend: as for `normal`.
        family: "normal" or "rademacher", or one of `low_rank`.
        matrix: (rows, cols) of the parameter, or of each expert's matrix, which low-rank noise depends on; cols is 0
            where it has none, which gives it dense noise of the same kind. None: the shape of `w` says it, which is the
            whole parameter; a vector, and what has more than three dimensions, as a convolution's weight, has no cols.

    Returns:
        `w`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, out of range or not finite in float32; `w` is not
            contiguous; there is an offset, but no `matrix` for low-rank noise.
        BackendError: the backend is not there or cannot run on the device of `w`.
    """
    place = *_check_place(w, seed, step, param, probe, offset, family), *_check_matrix(w, offset, family, matrix)
    return _in_place("perturb_", w, (check_float("scale", scale),), place, backend)


def restore_(
    w: torch.Tensor,
    scale: float,
    *,
    seed: int,
    step: int,
    param: int,
    probe: int = 0,
    offset: int = 0,
    family: str = "normal",
    matrix: tuple[int, int] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """w <- rne(w - scale * z), in place; arguments, result and errors are those of `perturb_`.

    It does not bring back the bits that `perturb_` found: each of the two rounds. About 45% of fp16 weights differ
    after a perturbation and its restoration, and the error grows with the steps. Where the clean weights matter,
    perturb out of place with `materialize`.
    """
    place = *_check_place(w, seed, step, param, probe, offset, family), *_check_matrix(w, offset, family, matrix)
    return _in_place("perturb_", w, (-check_float("scale", scale),), place, backend)


def update_(
    w: torch.Tensor,
    lr: float,
    coef: float,
    *,
    seed: int,
    step: int,
    param: int,
    probe: int = 0,
    offset: int = 0,
    weight_decay: float = 0.0,
    family: str = "normal",
    matrix: tuple[int, int] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """w <- round(w - lr * (weight_decay * w + coef * z)), in place: an update of one term.

    Rounding is stochastic for bfloat16 and float16, with bits that are a function of (seed, step, param, element), and
    to nearest for float32. A second call for the same step and parameter would round with the same bits again; an
    update of several terms is one `materialize`. With lr = 0, or weight_decay = 0 and coef = 0, nothing is changed.

    Args:
        lr, coef, weight_decay: rounded to float32.
        w and the others: as for `perturb_`.

    Returns:
        `w`.

    Raises:
        TypeError, ValueError, BackendError: as for `perturb_`.
    """
    place = *_check_place(w, seed, step, param, probe, offset, family), *_check_matrix(w, offset, family, matrix)
    scalars = check_float("lr", lr), check_float("coef", coef), check_float("weight_decay", weight_decay)
    return _in_place("update_", w, scalars, place, backend)


def embedding(
    weight: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    *,
    seed: int,
    step: int,
    param: int,
    probe: int = 0,
    offset: int = 0,
    family: str = "normal",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Rows of the table rne(weight + scale * z), made as they are read: the table itself is neither changed nor copied.

    Equal bit for bit to looking up in the perturbed table, at the cost of the rows asked for. With scale = 0 the rows
    are those of `weight`, but for NaN, which becomes the canonical one.

    Args:
        weight: contiguous [rows, cols] of float32, bfloat16 or float16, holding elements [offset, offset + rows * cols)
            of the parameter.
        ids: int64 of any shape, on the device of `weight`: indices of rows, in [0, rows).
        scale: epsilon with its sign, rounded to float32.
        seed, step, param, probe, offset, family, backend: as for `perturb_`; the parameter is a matrix of cols columns.
        out_dtype: what the rows are rounded to, float32 being exact; None: the dtype of `weight`.

    Returns:
        A tensor [*ids.shape, cols] of `out_dtype`, on the device of `weight`; it takes no part in autograd.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or device, or out of range.
        IndexError: an id is out of range, and `weight` is on a CPU. Other devices cannot raise: its row is NaN.
        BackendError: the backend is not there or cannot run on the device of `weight`.
    """
    place = _check_place(weight, seed, step, param, probe, offset, family, name="weight")
    if weight.dim() != 2:
        raise ValueError(f"weight must have the shape [rows, cols], got {tuple(weight.shape)}")
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a tensor of torch.int64, got {got}")
    if ids.device != weight.device:
        raise ValueError(f"ids must be on {weight.device} as weight is, got {ids.device}")
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    dtype_code(out_dtype)
    run = implementation(backend, weight.device).embedding
    return run(weight.detach(), ids, check_float("scale", scale), *place, out_dtype)


def materialize(
    weights: torch.Tensor,
    segments: SegmentTable,
    *,
    seed: int,
    updates: Sequence[Update] = (),
    emits: Sequence[Emit] = (),
    outs: Sequence[torch.Tensor] = (),
    write_back: bool = False,
    backend: str | None = None,
    program: Program | None = None,
) -> None:
    """Reads packed weights once, applies the updates they have missed, and writes perturbed copies.

    For each element: w is read; for each update in order, a = weight_decay * w (+0 if weight_decay = 0), then, with an
    anchor and w0 the weight at the start, a = fma(anchor, w - w0, a), then a = fma(c * update_scale, z, a) for each
    term, then w = round(fma(-lr, a, w)), stochastic for 16-bit dtypes; for
    each emit, a = w, then a = fma(c * perturb_scale, z, a) for each term, and rne(a), in the segment's out_dtype, is
    written to the emit's buffer at the segment's out_offset. All in float32. A term whose scaled coefficient is 0 is
    left out. An update with lr = 0, or with weight_decay = anchor = 0 and no term left, changes no bit. Every NaN that
    rounding stores is the canonical one.

    Args:
        weights: uint8 [num_bytes], contiguous: a packed buffer laid out as `segments` says.
        segments: where the tensors lie and which elements of which parameters they hold.
        seed: the run's seed, in [0, 2^64).
        updates: in the order in which they were made.
        emits: perturbations, each of the weights after all updates.
        outs: for each emit a buffer of uint8 on the device of `weights`, all of one size of at least
            `segments.out_bytes`; bytes outside the segments are not touched.
        write_back: whether the updated weights are stored in `weights`; if not, they are left as they are.
        backend: "native", "triton", "reference", or None for the default of the device.
        program: what `encode_program(updates, emits, num_groups)` has made, in their place: encoded once, a visit of
            each of many buffers costs less.

    Raises:
        TypeError, ValueError: a buffer is not a contiguous uint8 vector, too small, of another device than `weights` or
            of another size than the other outs, misaligned, or overlaps another; a number is out of range or not finite
            in float32; groups are missing; a group with an anchor has a segment without weights at the start.
        BackendError: the backend is not there or cannot run on the device.
    """
    if not isinstance(segments, SegmentTable):
        raise TypeError(f"segments must be a SegmentTable, got {type(segments).__name__}")
    seed = check_seed(seed)
    if program is None:
        program = encode_program(updates, emits, segments.num_groups)
    elif updates or emits:
        raise ValueError("updates and emits are given twice: in program, and beside it")
    elif program.num_groups < segments.num_groups:
        raise ValueError(
            f"program gives scalars for {program.num_groups} groups, the segments use {segments.num_groups}"
        )
    compiles = torch.compiler.is_compiling()  # the program's values are not known then
    if program.num_updates and not compiles and (lacking := program.anchored & segments.unanchored):
        raise ValueError(f"group {min(lacking)} has an anchor, and a segment without start_offset")
    if len(outs) != program.num_emits:
        raise ValueError(f"there must be one buffer in outs for each emit: {program.num_emits} emits, {len(outs)} outs")
    buffers = [(f"outs[{index}]", out, segments.out_bytes) for index, out in enumerate(outs)]
    buffers = [("weights", weights, segments.num_bytes), *buffers]
    _check_buffers(buffers, aligned=[name for name, *_ in buffers] if segments.num_bytes else [])
    for index, out in enumerate(outs):
        if out.numel() != outs[0].numel():
            raise ValueError(f"outs[{index}] must have {outs[0].numel()} bytes as outs[0] has, got {out.numel()}")
    materialize_again(weights, segments, seed, program, list(outs), write_back, backend)


def materialize_again(
    weights: torch.Tensor,
    segments: SegmentTable,
    seed: int,
    program: Program,
    outs: list[torch.Tensor],
    write_back: bool,
    backend: str | None = None,
) -> None:
    """`materialize` of buffers that it has checked once, in the place of checking them at each visit."""
    run = implementation(backend, weights.device).materialize
    writes = write_back and program.num_updates > 0
    if segments.num_bytes and (outs or writes):
        run(weights, segments.tensor, seed, *program, outs, write_back)
        _mark_changed(run, *outs, *([weights] if writes else []))


def decode(
    stored: torch.Tensor,
    table: PackedTable,
    out: torch.Tensor,
    gains: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Decodes quantized weights to float32, bfloat16 or float16: all matrices of a buffer in one call.

    A weight's value is computed in float32 as packed.py says, and rounded once, to nearest even, to its segment's
    out_dtype; nothing is flushed to zero, and every NaN is the canonical one. With gains, what is rounded is
    fl32(gain * value); a gain of 1 changes no bit.

    Args:
        stored: uint8 [num_bytes], contiguous: the bytes as the checkpoint has them, laid out as `table` says.
        table: where each matrix lies, and where in `out` it goes.
        out: uint8, contiguous, on the device of `stored`, of at least `table.out_bytes`; bytes outside the matrices are
            not touched.
        gains: float32, or its bytes as uint8, contiguous, on the device of `stored`, of at least `table.gain_bytes`.
            Given exactly if that is not 0.
        backend: "native", "triton", "reference", or None for the default of the device.

    Raises:
        TypeError, ValueError: a buffer is not contiguous, of another dtype, too small, or of another device; `out` is
            not aligned to 4 bytes, or overlaps another; there are gains without a use, or none where they are needed.
        BackendError: the backend is not there or cannot run on the device.
    """
    if not isinstance(table, PackedTable):
        raise TypeError(f"table must be a PackedTable, got {type(table).__name__}")
    if (gains is None) != (table.gain_bytes == 0):
        raise ValueError(f"the table needs {table.gain_bytes} bytes of gains, got {None if gains is None else 'some'}")
    if isinstance(gains, torch.Tensor) and gains.dtype == torch.float32:
        gains = gains.detach().reshape(-1).view(torch.uint8)
    read = [("stored", stored, table.num_bytes)] + ([] if gains is None else [("gains", gains, table.gain_bytes)])
    _check_buffers([*read, ("out", out, table.out_bytes)], aligned=["out"] if table.out_bytes else [])
    run = implementation(backend, stored.device).decode
    if table.out_bytes:
        run(stored, table.tensor, table.levels, out, gains)
        _mark_changed(run, out)


def checksum(tensors: Sequence[torch.Tensor], *, backend: str | None = None) -> int:
    """64 bits of the tensors' bytes: equal on every device and backend, and different after any change of one word.

    A tensor's bytes, in row-major order of its elements, are cut into 8-byte words w_i. The tensor's sum is that of
    w_i * m_i, of 3 * tail (what remains, as a little-endian number) and of its number of bytes, with
    m_i = (i * 0x9E3779B97F4A7C15) | 1; the checksum of what came before is multiplied by that constant and added. All
    modulo 2^64. Dtypes and shapes do not matter, the cut into tensors does.

    Args:
        tensors: of any dtypes, shapes and devices, in an order that matters; one that is not contiguous is copied.
        backend: as for `normal`. Native on the CPU is compiled; the others sum with torch's operations.

    Returns:
        An integer of [-2^63, 2^63), 0 for no tensors.

    Raises:
        TypeError: not a tensor.
        BackendError: the backend is not there.
    """
    result = 0
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensors[{index}] must be a tensor, got {type(tensor).__name__}")
        data = tensor.detach().reshape(-1).view(torch.uint8)
        name = resolve_backend(backend, tensor.device)
        run = torch.ops.distzo2.checksum if (name, data.device.type) == ("native", "cpu") else checksum_by_torch
        result = run(data, result)
    return result


def _mark_changed(run: object, *changed: torch.Tensor) -> None:
    """Raises the version counters, as the native ops do themselves, so that a backward over a saved tensor notices."""
    if isinstance(run, FunctionType):
        for tensor in changed:
            torch.autograd.graph.increment_version(tensor)


def _noise(
    family: str,
    numel: int,
    words: tuple[int, int, int, int, int],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    backend: str | None,
    matrix: tuple[int, ...] = (),
) -> torch.Tensor:
    numel = check_int("numel", numel, 0, MAX_ELEMENTS)
    words = _check_words(numel, *words)
    if out is None:
        dtype, device = dtype or torch.float32, torch.device(device or "cpu")
        dtype_code(dtype)
        implementation(backend, device)  # says what is missing before memory is asked for
        out = torch.empty(numel, dtype=dtype, device=device)
    else:
        _check_out(out, numel, dtype, device)
    return _in_place("noise_", out, (), (*words, FAMILIES[family], *matrix[:2]), backend)


def _check_matrix(
    w: torch.Tensor, offset: int, family: str, matrix: tuple[int, int] | None
) -> tuple[int, int] | tuple[()]:
    """rows and cols for an op that changes `w`; nothing for dense noise."""
    if family_code(family) < 16:
        return ()
    if matrix is None and offset:
        raise ValueError(f"matrix must be given for noise of {family!r} at offset {offset}: (rows, cols) of the whole")
    rows, cols, _ = check_matrix(*(matrix_shape(w.shape) if matrix is None else matrix))
    return check_int("rows", rows, 1 if cols and w.numel() else 0, rows), cols


def _in_place(
    name: str, w: torch.Tensor, scalars: tuple[float, ...], place: tuple[int, ...], backend: str | None
) -> torch.Tensor:
    """Calls the op that changes `w`, if it has elements; returns `w`."""
    run = getattr(implementation(backend, w.device), name)
    if w.numel():
        run(w.detach(), *scalars, *place)
        _mark_changed(run, w)
    return w


def _check_out(out: torch.Tensor, numel: int, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    _check_tensor("out", out)
    if out.numel() != numel:
        raise ValueError(f"out must have {numel} elements, got shape {tuple(out.shape)}")
    if dtype is not None and dtype != out.dtype:
        raise TypeError(f"out must be of {dtype}, got {out.dtype}")
    if device is not None and torch.device(device) not in (out.device, torch.device(out.device.type)):
        raise ValueError(f"out must be on {device}, got {out.device}")


def _check_words(
    numel: int, seed: int, step: int, param: int, probe: int, offset: int
) -> tuple[int, int, int, int, int]:
    return (
        check_seed(seed),
        check_int("step", step, 0, MAX_STEP),
        check_int("param", param, 0, MAX_PARAM),
        check_int("probe", probe, 0, MAX_PROBE),
        check_int("offset", offset, 0, MAX_ELEMENTS - numel),
    )


def _check_place(
    w: torch.Tensor, seed: int, step: int, param: int, probe: int, offset: int, family: str, name: str = "w"
) -> tuple[int, int, int, int, int, int]:
    _check_tensor(name, w)
    return *_check_words(w.numel(), seed, step, param, probe, offset), family_code(family)


def _check_tensor(name: str, w: torch.Tensor) -> None:
    if not isinstance(w, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(w).__name__}")
    if w.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} must be of torch.float32, torch.bfloat16 or torch.float16, got {w.dtype}")
    if not w.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(w.shape)} with strides {w.stride()}")


def _check_buffers(buffers: Sequence[tuple[str, torch.Tensor, int]], aligned: Sequence[str]) -> None:
    """Checks buffers, given as names, tensors and the bytes that they need: on one device, and apart in memory; those
    that are `aligned` at multiples of 4."""
    first, weights, _ = buffers[0]
    for name, buffer, needed in buffers:
        size = _check_buffer(name, buffer)
        if size < needed:
            raise ValueError(f"{name} has {size} bytes, {needed} are needed")
        if buffer.device != weights.device:
            raise ValueError(f"{name} must be on {weights.device} as {first} is, got {buffer.device}")
    if torch.compiler.is_compiling() or weights.is_meta:
        return  # there are no addresses to compare
    spans = sorted((buffer.data_ptr(), buffer.numel(), name) for name, buffer, _ in buffers)
    for start, _, name in spans:
        if start % 4 and name in aligned:
            raise ValueError(f"{name} must begin at an address that is a multiple of 4")
    for (start, length, first), (following, _, second) in itertools.pairwise(spans):
        if following < start + length:
            raise ValueError(f"{first} and {second} overlap in memory")


def _check_buffer(name: str, buffer: torch.Tensor) -> int:
    """The buffer's bytes, if it is one."""
    if not isinstance(buffer, torch.Tensor) or buffer.dtype != torch.uint8:
        got = buffer.dtype if isinstance(buffer, torch.Tensor) else type(buffer).__name__
        raise TypeError(f"{name} must be a tensor of torch.uint8, got {got}")
    if buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous vector, got shape {tuple(buffer.shape)}, strides {buffer.stride()}"
        )
    return buffer.numel()
