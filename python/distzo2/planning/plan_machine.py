"""Machines to plan for: this one and others as `distzo2 measure` found them, and GPU nodes by name, from published and
measured figures whose source is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distzo2.errors import UsageError
from distzo2.planning.plan_rates import Curve, Host, Noise, Products, Rates, rates_from_rows

MEASURED = "distzo2-measure/2"


@dataclass(frozen=True)
class Duplex:
    """Bytes/s of a link or a disk: one way, the other, and of both ways together."""

    up: float
    down: float
    both: float


@dataclass(frozen=True)
class Machine:
    """One node: its devices are alike, and each has a link of its own unless switches are shared."""

    name: str
    device: str  # cpu or cuda
    num_devices: int
    device_bytes: int
    host_bytes: int
    rates: Rates
    link: Duplex | None  # host memory to device; None where the host computes
    disk: Duplex | None
    gather_bytes_per_s: float | None  # what a rank receives in an all-gather; None: not known
    gather_ranks: int = 0  # among how many that was measured
    host_bytes_per_s: float | None = None  # memory of the host, reads and writes together
    devices_per_switch: int = 1
    exchange_s: float = 1e-3  # of a step's scalars between ranks
    assumptions: tuple[str, ...] = ()

    @property
    def computes_on_host(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class _Gpu:
    """What is known of a kind of GPU. Rates are those that a program sees, not peaks."""

    title: str
    memory_bytes: int
    half_flop_per_s: float
    single_flop_per_s: float
    copy_bytes_per_s: float
    normals_per_s: float
    link: Duplex
    gather_bytes_per_s: float
    host_bytes_per_s: float
    sources: tuple[str, ...]


_GEN4 = Duplex(26e9, 26e9, 2 * 18.6e9)
_GEN5 = Duplex(55e9, 55e9, 55e9 * 2 * 18.6 / 26)
_GEN4_TEXT = "PCIe 4 x16: 26 GB/s one way, 18.6 each way in both at once, as measured on such links"
_GEN5_TEXT = "PCIe 5 x16: 55 GB/s one way as measured; both ways at once by the share that PCIe 4 keeps (39 each way)"
_SHARE_TEXT = "products at 80% of the peak without sparsity, as measured on an H200 for bf16 (790 TFLOP/s)"
_COPY_TEXT = "memory at 90% of its peak, as measured on an H200 (4.3 TB/s read and written)"
_NOISE_TEXT = "normals: 353 G/s as measured on an H20 (78 multiprocessors at 1.98 GHz), by multiprocessors and clock"
_H20 = 353e9 / (78 * 1.98)

GPUS = {
    "a100": _Gpu(
        "8 x A100 SXM 80 GB, PCIe 4, NVLink 3", 80 * 10**9, 0.8 * 312e12, 0.8 * 19.5e12, 0.9 * 2.039e12,
        _H20 * 108 * 1.41, _GEN4, 360e9 * 300 / 450, 2 * 8 * 25.6e9 * 0.8,
        (
            _SHARE_TEXT + "; A100: 312 TFLOP/s in 16 bits, 19.5 in fp32 (NVIDIA's data sheet)",
            _COPY_TEXT + "; A100: 2.039 TB/s (data sheet)",
            _NOISE_TEXT + ": 348 G/s", _GEN4_TEXT,
            "NVLink 3: 240 GB/s of an all-gather received, from 360 measured on H100's NVLink 4, by 300 / 450 one way",
            "host memory: 80% of two sockets of 8 channels of DDR4-3200, shared by the links",
        ),
    ),
    "h100": _Gpu(
        "8 x H100 SXM 80 GB, PCIe 5, NVLink 4", 80 * 10**9, 790e12, 0.8 * 67e12, 0.9 * 3.35e12,
        min(540e9, _H20 * 132 * 1.98), _GEN5, 360e9, 2 * 8 * 38.4e9 * 0.8,
        (
            _SHARE_TEXT + ", the same chip; fp32 67 TFLOP/s peak (data sheet)", _COPY_TEXT + "; H100: 3.35 TB/s",
            _NOISE_TEXT + ", at most 540 G/s by the count of instructions", _GEN5_TEXT,
            "NVLink 4: 360 GB/s of an all-gather received, as measured on H100",
            "host memory: 80% of two sockets of 8 channels of DDR5-4800, shared by the links",
        ),
    ),
}  # fmt: skip
GPUS["h200"] = replace(
    GPUS["h100"],
    title="8 x H200 SXM 141 GB, PCIe 5, NVLink 4",
    memory_bytes=141 * 10**9,
    copy_bytes_per_s=4.3e12,
    sources=(
        "bf16 products at 790 TFLOP/s, memory at 4.3 TB/s read and written, as measured; fp32 at 80% of 67 TFLOP/s",
        *GPUS["h100"].sources[2:],
    ),
)
# Of the host beside a GPU: lanes as measured on a Zen 3, an operation as PyTorch usually takes.
_GPU_HOST = Host(visit_s=100e-6, lane_s=150e-6, materialize_s=100e-6, op_s=10e-6, step_s=2e-3)
_NODE_HOST_BYTES = 2 * 2**40


def named_machine(name: str) -> Machine:
    """A node of 8 GPUs of that name.

    Raises:
        UsageError: no such name.
    """
    if name not in GPUS:
        raise UsageError(
            f"--machine {name}: expected {', '.join(GPUS)}, this (what distzo2 measure saved), or a file it wrote"
        )
    gpu = GPUS[name]
    stream = Curve(((1.0, 2.0 / gpu.copy_bytes_per_s),))
    result = Curve(((1.0, 1.0 / gpu.copy_bytes_per_s),))
    flop_per_s = {"bfloat16": gpu.half_flop_per_s, "float32": gpu.single_flop_per_s}
    per_pass = {"bfloat16": 2 / gpu.copy_bytes_per_s, "float32": 4 / gpu.copy_bytes_per_s}
    normal_s = 1.0 / gpu.normals_per_s
    rates = Rates(
        products={n: Products(1.0 / f, 1.0 / gpu.copy_bytes_per_s, result) for n, f in flop_per_s.items()},
        attention={n: Curve(((1.0, 1e12 / (0.5 * f)),)) for n, f in flop_per_s.items()},
        stream={n: stream for n in flop_per_s},
        softmax_s=3 * 4 / gpu.copy_bytes_per_s,
        noise={
            (family, n): Noise(normal_s * share, s)
            for family, share in (("normal", 1.0), ("rademacher", 17.75 / 38.0))
            for n, s in per_pass.items()
        },
        host=_GPU_HOST,
    )
    return Machine(
        name=gpu.title,
        device="cuda",
        num_devices=8,
        device_bytes=gpu.memory_bytes,
        host_bytes=_NODE_HOST_BYTES,
        rates=rates,
        link=gpu.link,
        disk=Duplex(6e9, 6e9, 8e9),
        gather_bytes_per_s=gpu.gather_bytes_per_s,
        gather_ranks=8,
        host_bytes_per_s=gpu.host_bytes_per_s,
        assumptions=(
            *gpu.sources,
            "attention at half the products' rate; everything else of a forward at the memory's",
            "a visit reads and writes its weights four times beside making its noise",
            "a sign takes 17.75 / 38 of a normal's time (instructions counted on sm_90)",
            "the host starts an operation in 10 us and hands a lane over in 150 us a unit (assumed)",
            f"host memory {_NODE_HOST_BYTES / 2**40:.0f} TiB; a disk of 6 GB/s each way, 8 in both at once (assumed)",
        ),
    )


def measured_machine(source: str) -> Machine:
    """The machine of a file that `distzo2 measure` wrote, or, of "this", of where it writes by default.

    Raises:
        UsageError: there is no such file, or it is no measurement.
    """
    from distzo2.planning.measure import default_path

    path = default_path() if source == "this" else Path(source)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = ": run distzo2 measure first, or name a machine" if source == "this" else ""
        raise UsageError(f"--machine {source}: {path}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise UsageError(f"--machine {source}: {path} is no measurement: {error}") from error
    if not isinstance(result, dict) or result.get("format") != MEASURED:
        found = result.get("format") if isinstance(result, dict) else type(result).__name__
        raise UsageError(
            f"--machine {source}: {path} is of format {found}; {MEASURED} was expected: run distzo2 measure again"
        )
    return machine_from(result)


def machine_from(result: Mapping[str, Any]) -> Machine:
    """The machine that a measurement describes, with its GPUs if it has any."""
    about, gpus = result["machine"], result["machine"]["gpus"]
    device = gpus[0]["device"] if gpus else "cpu"

    def duplex(up: Mapping[str, float], down: Mapping[str, float], both: Mapping[str, float]) -> Duplex:
        return Duplex(*(rate["engine_bytes_per_s"] for rate in (up, down, both)))

    copies = {row["device"]: duplex(row["up"], row["down"], row["both"]) for row in result["copies"]}
    disk, gather = result["disk"], result["gather"]
    host_bytes = min(about["memory_bytes"], about["allowed_bytes"] or about["memory_bytes"])
    rates = rates_from_rows(result, device)
    rough = ("the measurement was quick: its figures are rough",) if result["quick"] else ()
    received = None
    if gather is not None:
        received = gather["bytes_per_s"] * (gather["ranks"] - 1) / gather["ranks"]
    where = f"rates as measured through the copy engine, by distzo2 {result['versions']['distzo2']}"
    shared = () if gpus else ("ranks share the CPU's cores evenly, and their memory's rate with them",)
    return Machine(
        name=f"{gpus[0]['name']} x {len(gpus)}" if gpus else f"{about['cpu'] or 'CPU'}, {about['threads']} threads",
        device="cuda" if gpus else "cpu",
        num_devices=len(gpus) or max(1, about["threads"]),
        device_bytes=gpus[0]["memory_bytes"] if gpus else host_bytes,
        host_bytes=host_bytes,
        rates=rates,
        link=copies[device] if gpus else None,
        disk=duplex(disk["read"], disk["write"], disk["both"]),
        gather_bytes_per_s=received,
        gather_ranks=gather["ranks"] if gather else 0,
        assumptions=(where, *rough, *rates.notes, *shared),
    )


def find_machine(source: str, *, devices_per_switch: int = 1, nvlink: bool = True) -> Machine:
    """The machine called `source`, with what is known of its wiring.

    Args:
        source: a name of `GPUS`, "this", or the path of a measurement.
        devices_per_switch: GPUs that share one link to the host.
        nvlink: whether GPUs reach each other by a way of their own; without, gathers go over the host's links.

    Raises:
        UsageError: as `named_machine` and `measured_machine`.
    """
    is_file = source == "this" or "/" in source or source.endswith(".json")
    machine = measured_machine(source) if is_file else named_machine(source)
    if machine.num_devices % devices_per_switch:
        raise UsageError(f"--devices-per-switch {devices_per_switch} does not divide {machine.num_devices} devices")
    notes = list(machine.assumptions)
    if devices_per_switch > 1:
        notes.append(f"{devices_per_switch} devices share each link to the host")
    if not nvlink:
        notes.append("no NVLink: an all-gather goes over the links to the host, beside the uploads")
    return replace(
        machine,
        devices_per_switch=devices_per_switch,
        gather_bytes_per_s=machine.gather_bytes_per_s if nvlink else None,
        assumptions=tuple(notes),
    )
