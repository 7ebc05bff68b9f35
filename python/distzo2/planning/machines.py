"""Machines to plan for: a roofline of one device, its links, its disk and its host. One is this machine, as `distzo2
measure` found it; GPU nodes by name come from published and measured figures, whose source is given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distzo2.errors import UsageError
from distzo2.planning.plan_model import Op, Part
from distzo2.weights.units import ParamInfo
from distzo2_core.packed import Kind

MEASURED = "distzo2-measure/3"  # the format of its file
EXCHANGE_S = 1e-3  # of a step's scalars between ranks
ATTENTION_SHARE = 0.5  # of a product's rate
TF32_SHARE = 0.5  # of bf16's rate: without sparsity 156 of 312 TFLOP/s on A100, 494.5 of 989 on H100 (data sheets)
_BYTES = (Kind.UINT8, Kind.INT8, Kind.FLOAT8_E4M3, Kind.FLOAT8_E5M2)  # decoded at the rate of int8


@dataclass(frozen=True)
class Duplex:
    """Bytes/s of a link or a disk: one way, the other, and of both ways together."""

    up: float
    down: float
    both: float


@dataclass(frozen=True)
class Host:
    """Seconds that the host needs to issue: a unit of a pass, a lane on it, a call that perturbs, an operation, and
    what a step does once."""

    visit_s: float
    lane_s: float
    materialize_s: float
    op_s: float
    step_s: float


# Lanes as steps of blocks of next to no work took on a Zen 3; beside a GPU an operation as PyTorch usually takes.
CPU_HOST = Host(visit_s=100e-6, lane_s=150e-6, materialize_s=100e-6, op_s=2e-6, step_s=2e-3)
GPU_HOST = replace(CPU_HOST, op_s=10e-6)


@dataclass(frozen=True)
class Rates:
    """A roofline of one device: an operation takes the longer of its arithmetic and its memory traffic."""

    flop_per_s: Mapping[str, float]  # of products: float32, bfloat16 (which stands for float16)
    bytes_per_s: float  # of memory, reads and writes together
    noise_per_s: Mapping[str, float]  # elements, by family
    host: Host
    slowdown: float = 1  # ranks that share the device divide it evenly
    decode_per_s: Mapping[tuple[str, str], float] = field(default_factory=dict)  # weights, by codes and float dtype

    def op_s(self, op: Op) -> float:
        """Seconds of an operation."""
        seconds = op.num_bytes / self.bytes_per_s
        if op.flop:
            rate = self.flop_per_s["bfloat16" if op.dtype.itemsize == 2 else "float32"]
            seconds = max(seconds, op.flop / (rate * (ATTENTION_SHARE if op.kind == "attention" else 1.0)))
        return seconds * self.slowdown

    def part_s(self, part: Part) -> float:
        """Seconds of a lane's part."""
        return sum(self.op_s(op) * count for op, count in part.ops)

    def noise_s(
        self, numel: int, dtype: torch.dtype, family: str, *, terms: int, emissions: int, out_bytes: int, write: bool
    ) -> float:
        """Seconds of a visit of `numel` weights: it makes noise for an update of `terms` and for `emissions`, reads
        the weights, writes copies of `out_bytes` a weight together, and the weights themselves if `write`."""
        made_s = (terms + emissions) / self.noise_per_s[family]
        moved_s = ((1 + write) * dtype.itemsize + out_bytes) / self.bytes_per_s
        return self.slowdown * numel * (made_s + moved_s)

    def decode_s(self, param: ParamInfo) -> float:
        """Seconds to decode a packed parameter: as measured, else at the rate of memory."""
        kind, moved = param.layout.codes.kind, param.num_bytes + param.numel * param.seen.itemsize
        codes = "int16" if kind == Kind.INT16 else "int8" if kind in _BYTES else "nibbles"
        rate = self.decode_per_s.get((codes, "bfloat16" if param.seen.itemsize == 2 else "float32"))
        return self.slowdown * (param.numel / rate if rate else moved / self.bytes_per_s)


@dataclass(frozen=True)
class Machine:
    """One node: its devices are alike, and each has its own link unless switches are shared."""

    name: str
    device: str  # cpu or cuda
    num_devices: int
    device_bytes: int
    host_bytes: int
    rates: Rates
    link: Duplex  # host memory to device
    disk: Duplex
    gather_bytes_per_s: float | None  # what a rank receives in an all-gather; None: not known
    host_bytes_per_s: float | None = None  # memory of the host, reads and writes together
    devices_per_switch: int = 1
    assumptions: tuple[str, ...] = ()

    @property
    def computes_on_host(self) -> bool:
        return self.device == "cpu"

    def with_tf32(self) -> Machine:
        """This machine, with float32 products in TF32."""
        flop = {**self.rates.flop_per_s, "float32": TF32_SHARE * self.rates.flop_per_s["bfloat16"]}
        note = "float32 products in TF32, at half of bf16's rate (NVIDIA's data sheets)"
        return replace(self, rates=replace(self.rates, flop_per_s=flop), assumptions=(*self.assumptions, note))


# ---- nodes by name ------------------------------------------------------------------------------------------------

_GEN4 = Duplex(26e9, 26e9, 2 * 18.6e9)
_GEN5 = Duplex(55e9, 55e9, 55e9 * 2 * 18.6 / 26)
_GEN4_TEXT = "PCIe 4 x16: 26 GB/s one way, 18.6 each way in both at once, as measured on such links"
_GEN5_TEXT = "PCIe 5 x16: 55 GB/s one way as measured; both ways at once by the share that PCIe 4 keeps (39 each way)"
_SHARE_TEXT = "products at 80% of the peak without sparsity, as measured on an H200 for bf16 (790 TFLOP/s)"
_COPY_TEXT = "memory at 90% of its peak, as measured on an H200 (4.3 TB/s read and written)"
_NOISE_TEXT = "normals: 353 G/s as measured on an H20 (78 multiprocessors at 1.98 GHz), by multiprocessors and clock"
_H20 = 353e9 / (78 * 1.98)
_NODE_HOST_BYTES = 2 * 2**40
_NODE_TEXTS = (
    "attention at half the products' rate; everything else of a forward at the memory's",
    "a visit makes its noise, then reads and writes its weights: four passes for an update and two copies",
    "a sign takes 17.75 / 38 of a normal's time (instructions counted on sm_90)",
    "the host starts an operation in 10 us and hands a lane over in 150 us a unit (assumed)",
    f"host memory {_NODE_HOST_BYTES / 2**40:.0f} TiB; a disk of 6 GB/s each way, 8 in both at once (assumed)",
)


def _node(
    name: str, gigabytes: int, half: float, single: float, copies: float, normals: float, link: Duplex, gather: float,
    host_bytes_per_s: float, *sources: str,
) -> Machine:  # fmt: skip
    """A node of 8 GPUs. Rates (flop/s, bytes/s, elements/s) are those that a program sees, not peaks."""
    noise = {"normal": normals, "rademacher": normals * 38.0 / 17.75}
    return Machine(
        name=name,
        device="cuda",
        num_devices=8,
        device_bytes=gigabytes * 10**9,
        host_bytes=_NODE_HOST_BYTES,
        rates=Rates({"bfloat16": half, "float32": single}, copies, noise, GPU_HOST),
        link=link,
        disk=Duplex(6e9, 6e9, 8e9),
        gather_bytes_per_s=gather,
        host_bytes_per_s=host_bytes_per_s,
        assumptions=(*sources, *_NODE_TEXTS),
    )


_H100_TEXTS = (
    _NOISE_TEXT + ", at most 540 G/s by the count of instructions", _GEN5_TEXT,
    "NVLink 4: 360 GB/s of an all-gather received, as measured on H100",
    "host memory: 80% of two sockets of 8 channels of DDR5-4800, shared by the links",
)  # fmt: skip
_H100_NORMALS = min(540e9, _H20 * 132 * 1.98)

GPUS = {
    "a100": _node(
        "8 x A100 SXM 80 GB, PCIe 4, NVLink 3", 80, 0.8 * 312e12, 0.8 * 19.5e12, 0.9 * 2.039e12, _H20 * 108 * 1.41,
        _GEN4, 360e9 * 300 / 450, 2 * 8 * 25.6e9 * 0.8,
        _SHARE_TEXT + "; A100: 312 TFLOP/s in 16 bits, 19.5 in fp32 (NVIDIA's data sheet)",
        _COPY_TEXT + "; A100: 2.039 TB/s (data sheet)",
        _NOISE_TEXT + ": 348 G/s", _GEN4_TEXT,
        "NVLink 3: 240 GB/s of an all-gather received, from 360 measured on H100's NVLink 4, by 300 / 450 one way",
        "host memory: 80% of two sockets of 8 channels of DDR4-3200, shared by the links",
    ),
    "h100": _node(
        "8 x H100 SXM 80 GB, PCIe 5, NVLink 4", 80, 790e12, 0.8 * 67e12, 0.9 * 3.35e12, _H100_NORMALS, _GEN5, 360e9,
        2 * 8 * 38.4e9 * 0.8,
        _SHARE_TEXT + ", the same chip; fp32 67 TFLOP/s peak (data sheet)", _COPY_TEXT + "; H100: 3.35 TB/s",
        *_H100_TEXTS,
    ),
    "h200": _node(
        "8 x H200 SXM 141 GB, PCIe 5, NVLink 4", 141, 790e12, 0.8 * 67e12, 4.3e12, _H100_NORMALS, _GEN5, 360e9,
        2 * 8 * 38.4e9 * 0.8,
        "bf16 products at 790 TFLOP/s, memory at 4.3 TB/s read and written, as measured; fp32 at 80% of 67 TFLOP/s",
        *_H100_TEXTS,
    ),
}  # fmt: skip


# ---- measured machines --------------------------------------------------------------------------------------------


def default_path() -> Path:
    """Where `distzo2 measure` saves its figures by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distzo2" / "measure.json"


def machine_from(result: Mapping[str, Any]) -> Machine:
    """The machine that a measurement describes, with its GPUs if it has any."""
    about, gpus = result["machine"], result["machine"]["gpus"]
    device = gpus[0]["device"] if gpus else "cpu"

    def row(table: str, **wanted: str) -> Mapping[str, Any]:
        return next(r for r in result[table] if r["device"] == device and wanted.items() <= r.items())

    def duplex(rates: Mapping[str, Any]) -> Duplex:
        return Duplex(*(rates[f"{way}_bytes_per_s"] for way in ("up", "down", "both")))

    gather = result["gather"]
    decoded = [r for r in result.get("decode", ()) if r["device"] == device]  # earlier versions did not measure it
    host_bytes = min(about["memory_bytes"], about["allowed_bytes"] or about["memory_bytes"])
    notes = (
        f"rates as measured through the copy engine, by distzo2 {result['versions']['distzo2']}",
        *(("the measurement was quick: its figures are rough",) if result["quick"] else ()),
        "products at the rate of a large square one, attention at half of it, everything else at the memory's; "
        "float16 at bfloat16's",
        *(() if gpus else ("ranks share the CPU's cores evenly, and their memory's rate with them",)),
    )
    return Machine(
        name=f"{gpus[0]['name']} x {len(gpus)}" if gpus else f"{about['cpu']}, {about['threads']} threads",
        device=device.partition(":")[0],
        num_devices=len(gpus) or max(1, about["threads"]),
        device_bytes=gpus[0]["memory_bytes"] if gpus else host_bytes,
        host_bytes=host_bytes,
        rates=Rates(
            {dtype: row("matmul", dtype=dtype)["flop_per_s"] for dtype in ("float32", "bfloat16")},
            row("memory")["bytes_per_s"],
            {family: row("noise", family=family)["elements_per_s"] for family in ("normal", "rademacher")},
            GPU_HOST if gpus else CPU_HOST,
            decode_per_s={(r["codes"], r["dtype"]): r["weights_per_s"] for r in decoded},
        ),
        link=duplex(row("copies")),
        disk=duplex(result["disk"]),
        gather_bytes_per_s=gather and gather["bytes_per_s"] * (gather["ranks"] - 1) / gather["ranks"],
        assumptions=notes,
    )


def find_machine(source: str, *, devices_per_switch: int = 1, nvlink: bool = True) -> Machine:
    """The machine called `source`, with what is known of its wiring.

    Args:
        source: a name of `GPUS`, the path of a file that `distzo2 measure` wrote, or "this": of the file that it
            writes by default.
        devices_per_switch: GPUs that share one link to the host.
        nvlink: whether GPUs reach each other over NVLink; without it, gathers use the links to the host.

    Raises:
        UsageError: there is no such machine or file, or it is no measurement of this version's format.
    """
    if source in GPUS:
        machine = GPUS[source]
    elif source == "this" or "/" in source or source.endswith(".json"):
        path = default_path() if source == "this" else Path(source)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found = result.get("format")
        except OSError as error:
            hint = ": run distzo2 measure first, or name a machine" if source == "this" else ""
            raise UsageError(f"--machine {source}: {path}: {error.strerror}{hint}") from error
        except (ValueError, AttributeError) as error:
            raise UsageError(f"--machine {source}: {path} is no measurement: {error}") from error
        if found != MEASURED:
            expected = f"{MEASURED} was expected: run distzo2 measure again"
            raise UsageError(f"--machine {source}: {path} is of format {found}; {expected}")
        machine = machine_from(result)
    else:
        raise UsageError(
            f"--machine {source}: expected {', '.join(GPUS)}, this (what distzo2 measure saved), or a file it wrote"
        )
    if machine.num_devices % devices_per_switch:
        raise UsageError(f"--devices-per-switch {devices_per_switch} does not divide {machine.num_devices} devices")
    notes, gather = machine.assumptions, machine.gather_bytes_per_s if nvlink else None
    if devices_per_switch > 1:
        notes += (f"{devices_per_switch} devices share each link to the host",)
    if not nvlink:
        notes += ("no NVLink: an all-gather goes over the links to the host, beside the uploads",)
    return replace(machine, devices_per_switch=devices_per_switch, gather_bytes_per_s=gather, assumptions=notes)
