"""Machines to plan for: a roofline of one device, its links, its disk and its host. One is this machine, as `distzo2
measure` found it; GPU nodes by name come from published and measured figures, whose source is given."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distzo2.errors import UsageError
from distzo2.planning.plan_model import Op, Part
from distzo2.weights.units import ParamInfo
from distzo2_core.packed import Kind
from distzo2_core.types import dense_family

MEASURED = "distzo2-measure/3"  # the format of its file
EXCHANGE_S = 1e-3  # of a step's scalars between ranks
ATTENTION_SHARE = 0.5  # of a product's rate
# Of a normal's time on a GPU, by instructions: in SASS for sm_90, and for low rank of the noise alone in its PTX, where
# dense normals are 71.0 an element.
NOISE_SHARES = {
    "normal": 1.0, "rademacher": 17.75 / 38.0,
    "sign-r1": 114.4 / 71.0, "sign-r4": 125.4 / 71.0, "normal-r1": 160.8 / 71.0, "normal-r4": 351.0 / 71.0,
}  # fmt: skip
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
        rate = self.noise_per_s.get(family) or self.noise_per_s[dense_family(family)]  # of one kind, if not measured
        made_s = (terms + emissions) / rate
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


# ---- nodes by name ------------------------------------------------------------------------------------------------


def _published() -> dict[str, Machine]:
    """The nodes of machines.toml, by name."""
    nodes = tomllib.loads(Path(__file__).with_name("machines.toml").read_text(encoding="utf-8"))
    every, machines = nodes.pop("every"), {}
    for name, row in nodes.items():
        normals, assumptions = row.pop("normals_per_s"), (*row.pop("assumptions"), *every["assumptions"])
        noise = {family: normals / share for family, share in NOISE_SHARES.items()}
        rates = Rates(row.pop("flop_per_s"), row.pop("bytes_per_s"), noise, GPU_HOST)
        links = {"link": Duplex(*row.pop("link")), "disk": Duplex(*every["disk"])}
        machines[name] = Machine(**every | row | links | {"rates": rates, "assumptions": assumptions})
    return machines


GPUS = _published()


# ---- measured machines --------------------------------------------------------------------------------------------


def default_path() -> Path:
    """Where `distzo2 measure` saves its figures by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distzo2" / "measure.json"


def machine_from(result: Mapping[str, Any]) -> Machine:
    """The machine that a measurement describes, with its GPUs if it has any."""
    about, gpus, gather = result["machine"], result["machine"]["gpus"], result["gather"]
    device = gpus[0]["device"] if gpus else "cpu"

    def rows(table: str) -> list[Mapping[str, Any]]:  # earlier versions did not measure "decode"
        return [row for row in result.get(table, ()) if row["device"] == device]

    def duplex(rates: Mapping[str, Any]) -> Duplex:
        return Duplex(*(rates[f"{way}_bytes_per_s"] for way in ("up", "down", "both")))

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
            {row["dtype"]: row["flop_per_s"] for row in rows("matmul")},
            rows("memory")[0]["bytes_per_s"],
            {row["family"]: row["elements_per_s"] for row in rows("noise")},
            GPU_HOST if gpus else CPU_HOST,
            decode_per_s={(row["codes"], row["dtype"]): row["weights_per_s"] for row in rows("decode")},
        ),
        link=duplex(rows("copies")[0]),
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
            if (found := result.get("format")) != MEASURED:
                expected = f"{MEASURED} was expected: run distzo2 measure again"
                raise UsageError(f"--machine {source}: {path} is of format {found}; {expected}")
        except OSError as error:
            hint = ": run distzo2 measure first, or name a machine" if source == "this" else ""
            raise UsageError(f"--machine {source}: {path}: {error.strerror}{hint}") from error
        except (ValueError, AttributeError) as error:
            raise UsageError(f"--machine {source}: {path} is no measurement: {error}") from error
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
