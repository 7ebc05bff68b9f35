"""`distzo2 plan`: memory, step time and tokens/s of a run before it is started, and what would bound it.

Units, parts and bytes are those of the model's configuration (`plan_model`), the rates a machine's (`plan_machine`),
the schedule the runtime's own, played event by event (`plan_schedule`). What is assumed is listed with the figures.

The JSON file, `distzo2-plan/1`:

    model        name, dtype, elements, bytes, units, blocks
    request      the options
    machine      name; assumptions: lines of text
    rows         the first is one device; each: mesh, pert, data, ranks, slice, micro_batches, step_s, tokens_per_s,
                 speedup, bound, busy (share of the step by resource), wait_s, noise_s, up_bytes, down_bytes,
                 gather_bytes (a rank and step), rank_bytes (residents, slots, scratch, lanes, total), host_bytes and
                 disk_bytes (of the node), fits, misfit
    best         index of the row with the most tokens/s among those that fit; null: none does
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distzo2.errors import DistZO2Error, UsageError
from distzo2.optim.estimator import make_estimator
from distzo2.planning.plan_machine import Duplex, Machine, find_machine
from distzo2.planning.plan_mesh import Mesh, busiest_share, parse_mesh, possible_meshes
from distzo2.planning.plan_model import ModelPlan, plan_model
from distzo2.planning.plan_steady import Played, play_steps
from distzo2.planning.schedule import Slicing, Transfers, Work
from distzo2.run.preflight import DTYPES
from distzo2.streaming.lanes import Emission
from distzo2.text import gib
from distzo2.version import __version__
from distzo2.weights.residency import AUTO_SHARE, keep_blocks
from distzo2.weights.store import slot_bytes_of
from distzo2_core import FAMILIES, Term

FORMAT = "distzo2-plan/1"
CONTEXT_BYTES = 10**9  # of a GPU, that its driver and libraries take
STAGING_BYTES = 6 * 4 * 2**20  # pinned, between a disk and a GPU
_NAMES = {
    "compute": "compute", "host": "host", "upload": "upload", "download": "download", "gather": "gather",
    "side": "updates",
}  # fmt: skip


@dataclass(frozen=True)
class RankBytes:
    """Memory of the device (of the host, where it computes) that one rank takes."""

    residents: int
    slots: int
    scratch: int
    lanes: int  # hidden states, workspaces, logits

    @property
    def total(self) -> int:
        return self.residents + self.slots + self.scratch + self.lanes


@dataclass(frozen=True)
class Prediction:
    """One mesh, sliced or not."""

    mesh: Mesh
    sliced: bool
    micro_batches: int
    tokens: int  # of a step
    played: Played = field(repr=False)
    rank_bytes: RankBytes
    host_bytes: int
    disk_bytes: int
    misfit: str | None

    @property
    def step_s(self) -> float:
        return self.played.step_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.played.step_s

    @property
    def busy(self) -> dict[str, float]:
        """Share of the step, by resource."""
        return {r: s / self.played.step_s for r, s in self.played.busy_s.items()}

    @property
    def bound(self) -> str:
        """The busiest resource, with its share of the step."""
        busy = self.busy
        resource = max(busy, key=busy.get)
        name = _NAMES[resource]
        if resource in ("upload", "download") and min(busy.get("upload", 0), busy.get("download", 0)) > 0.9:
            name = "transfers both ways"
        if resource == "compute" and self.played.noise_s > 0.5 * self.played.busy_s["compute"]:
            name = "noise"
        return f"{name} {busy[resource]:.0%}"


class Planner:
    """Predictions of one request."""

    def __init__(self, request: Namespace, machine: Machine) -> None:
        self.request, self.machine = request, machine
        self.estimator = make_estimator(request.estimator)
        self.evaluations = self.estimator.evaluations(request.probes)
        self._models: dict[int, ModelPlan] = {}
        if request.micro_batches is not None and request.batch % request.micro_batches:
            raise UsageError(f"--micro-batches {request.micro_batches} does not divide --batch {request.batch}")
        if request.slots < 2:
            raise UsageError(f"--slots {request.slots}: at least 2 were expected")

    def model(self, rows: int) -> ModelPlan:
        """The model at micro-batches of so many sequences."""
        if rows not in self._models:
            r = self.request
            self._models[rows] = plan_model(r.model, DTYPES.get(r.dtype), rows, r.tokens)
        return self._models[rows]

    def predict(self, mesh: Mesh, sliced: bool = False) -> Prediction:
        """What a step on `mesh` takes.

        Raises:
            UsageError: the mesh is impossible. DistZO2Error: a budget is too small, or a rate is not known.
        """
        r, machine = self.request, self.machine
        ranks = mesh.num_ranks
        if ranks > machine.num_devices:
            raise UsageError(f"{mesh} is {ranks} ranks, and {machine.name} has {machine.num_devices} devices")
        if sliced and ranks == 1:
            raise UsageError("--slice on needs more than one rank")
        if r.micro_batches is None and r.batch % mesh.data:
            raise UsageError(f"data={mesh.data} does not divide --batch {r.batch}, and --micro-batches is not given")
        num_batches = r.micro_batches or mesh.data
        evaluations, batches = busiest_share(mesh, self.evaluations, num_batches)
        model = self.model(r.batch // num_batches)
        streamed = self._place(model, sliced)
        family = FAMILIES[r.noise]
        emissions = [Emission((Term(family, 0, k, 0, float(s)),)) if s else Emission() for k, s in evaluations]
        lanes = [e for e in emissions for _ in range(batches)]
        wave = r.max_lanes or len(lanes)
        work = Work(
            model=model,
            rates=machine.rates.shared_by(ranks) if machine.computes_on_host else machine.rates,
            on_host=machine.computes_on_host,
            streamed={u.index for u in streamed},
            slots=max(2, min(r.slots, len(streamed) + 1)),
            transfers=self._transfers(ranks) if streamed else None,
            passes=[lanes[i : i + wave] for i in range(0, len(lanes), wave)],
            num_terms=r.probes,
            family=r.noise,
            write_every=r.write_every,
            slicing=self._slicing(ranks) if sliced and streamed else None,
            exchange_s=machine.exchange_s if ranks > 1 else 0.0,
        )
        played = play_steps(work)
        rank_bytes = RankBytes(
            residents=sum(u.num_bytes for u in model.units if u.block < 0),
            slots=slot_bytes_of(streamed) * work.slots if streamed else 0,
            scratch=played.scratch_bytes,
            lanes=model.lane_bytes(min(wave, len(lanes))),
        )
        kept = sum(u.num_bytes for u in streamed) * (1 if sliced else ranks)
        on_disk = r.weights == "disk"
        host = 0 if on_disk else kept
        if machine.computes_on_host:
            host += ranks * rank_bytes.total
        elif on_disk and streamed:
            host += ranks * STAGING_BYTES
        return Prediction(
            mesh, sliced, num_batches, r.batch * r.tokens, played, rank_bytes, host, kept if on_disk else 0,
            self._misfit(rank_bytes, host),
        )  # fmt: skip

    def _place(self, model: ModelPlan, sliced: bool) -> list[Any]:
        """The units that stream, marked as the runtime marks them."""
        r, machine = self.request, self.machine
        on_cpu = machine.computes_on_host
        streams = r.weights == "disk" or (r.weights == "host" and (not on_cpu or sliced))
        for unit in model.units:
            unit.kept, unit.block = False, -1
        if not streams:
            return []
        budget = int(AUTO_SHARE * machine.device_bytes) if r.memory_budget == "auto" else r.memory_budget
        keep_blocks(model.units, torch.device(machine.device), budget, r.slots)
        streamed = [u for u in model.units if not u.resident and not u.kept]
        for block, unit in enumerate(streamed):
            unit.block = block
        return streamed

    def _transfers(self, ranks: int) -> Transfers:
        """Of one rank, the others being as busy."""
        machine = self.machine
        if self.request.weights == "disk":
            if machine.disk is None:
                raise DistZO2Error(f"the disk of {machine.name} is not known")
            rates, sharers = machine.disk, ranks
        else:
            if machine.link is None:
                raise DistZO2Error(f"the link to the host of {machine.name} is not known")
            rates, sharers = machine.link, min(ranks, machine.devices_per_switch)
        rates = Duplex(rates.up / sharers, rates.down / sharers, rates.both / sharers)
        if machine.host_bytes_per_s is not None:
            most = machine.host_bytes_per_s / ranks
            rates = Duplex(min(rates.up, most), min(rates.down, most), min(rates.both, most))
        half = rates.both / 2
        return Transfers(1 / rates.up, 1 / rates.down, min(1.0, half / rates.up), min(1.0, half / rates.down))

    def _slicing(self, ranks: int) -> Slicing:
        machine = self.machine
        received = (ranks - 1) / ranks
        if machine.gather_bytes_per_s is not None:
            return Slicing(ranks, received / machine.gather_bytes_per_s)
        if machine.computes_on_host:
            raise DistZO2Error(f"the rate of a gather on {machine.name} was not measured")
        return Slicing(ranks, received * self._transfers(ranks).up_s, over_link=True)

    def _misfit(self, rank_bytes: RankBytes, host: int) -> str | None:
        machine = self.machine
        if not machine.computes_on_host and rank_bytes.total > machine.device_bytes - CONTEXT_BYTES:
            return f"{gib(rank_bytes.total)} of {gib(machine.device_bytes)} on a device"
        if host > machine.host_bytes:
            return f"{gib(host)} of {gib(machine.host_bytes)} on the host"
        return None

    def plans(self) -> list[Prediction]:
        """One device first, then what was asked for.

        Raises:
            UsageError: what was asked for is impossible.
        """
        r = self.request
        if r.parallel and r.nproc:
            mesh = parse_mesh(r.parallel)
            if mesh.num_ranks != r.nproc:
                raise UsageError(f"--parallel {r.parallel} is {mesh.num_ranks} ranks, and --nproc says {r.nproc}")
        if r.parallel:
            meshes = [parse_mesh(r.parallel)]
        elif r.nproc and r.nproc > 1:
            if r.nproc > self.machine.num_devices:
                raise UsageError(f"--nproc {r.nproc}: {self.machine.name} has {self.machine.num_devices} devices")
            meshes = possible_meshes(r.nproc, self.evaluations, r.micro_batches, r.batch)
        else:
            meshes = []
        result = [self.predict(Mesh())]
        for mesh in meshes:
            if mesh.num_ranks == 1:
                continue
            ways = {"on": [True], "off": [False], "auto": [False, True]}[r.slice]
            if r.weights == "device":
                ways = [False]  # nothing is transferred
            if r.slice == "auto" and self.machine.computes_on_host and self.machine.gather_bytes_per_s is None:
                ways = [False]
            result += [self.predict(mesh, sliced) for sliced in ways]
        return result

    def assumptions(self) -> list[str]:
        """What the figures rest on."""
        r, model = self.request, next(iter(self._models.values()))
        return [
            *model.notes,
            f"every sequence has {r.tokens} tokens and the loss is that of all of them; attention and loss as "
            "transformers runs them here",
            *self.machine.assumptions,
            *(() if self.machine.computes_on_host else (f"{gib(CONTEXT_BYTES)} of a GPU are its driver's",)),
            f"ranks start each step together; their scalars take {1e3 * self.machine.exchange_s:g} ms"
            if r.parallel or r.nproc
            else "nothing else runs on the machine",
        ]


def best_of(plans: Sequence[Prediction]) -> int | None:
    """Index of the one with the most tokens/s among those that fit."""
    fitting = [i for i, p in enumerate(plans) if p.misfit is None]
    return max(fitting, key=lambda i: plans[i].tokens_per_s, default=None)


def to_json(planner: Planner, plans: Sequence[Prediction]) -> dict[str, Any]:
    """See the module."""
    r, model = planner.request, next(iter(planner._models.values()))
    request = {k: v for k, v in vars(r).items() if k not in ("run", "command", "json", "picture", "trace")}
    return {
        "format": FORMAT,
        "version": __version__,
        "model": {
            "name": model.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "elements": model.num_elements,
            "bytes": model.num_bytes,
            "units": len(model.units),
            "blocks": sum(not u.resident for u in model.units),
        },
        "request": request,
        "machine": {"name": planner.machine.name, "assumptions": planner.assumptions()},
        "rows": [_row(p, plans[0]) for p in plans],
        "best": best_of(plans),
    }


def _row(plan: Prediction, first: Prediction) -> dict[str, Any]:
    return {
        "mesh": str(plan.mesh),
        "pert": plan.mesh.pert,
        "data": plan.mesh.data,
        "ranks": plan.mesh.num_ranks,
        "slice": plan.sliced,
        "micro_batches": plan.micro_batches,
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "speedup": plan.tokens_per_s / first.tokens_per_s,
        "bound": plan.bound,
        "busy": plan.busy,
        "wait_s": plan.played.wait_s,
        "noise_s": plan.played.noise_s,
        "up_bytes": plan.played.bytes_up,
        "down_bytes": plan.played.bytes_down,
        "gather_bytes": plan.played.bytes_gathered,
        "rank_bytes": {**asdict(plan.rank_bytes), "total": plan.rank_bytes.total},
        "host_bytes": plan.host_bytes,
        "disk_bytes": plan.disk_bytes,
        "fits": plan.misfit is None,
        "misfit": plan.misfit,
    }


def significant(number: float) -> str:
    """Four digits of a number, or all of those before the point, never as a power of ten."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.4g}"


def count(number: int) -> str:
    """A number of elements for people."""
    for unit, scale in ((" G", 1e9), (" M", 1e6)):
        if number >= scale / 10:
            return f"{number / scale:.3g}{unit}"
    return str(number)


def table(planner: Planner, plans: Sequence[Prediction]) -> list[str]:
    """The predictions as lines of text."""
    r, model = planner.request, next(iter(planner._models.values()))
    best = best_of(plans)
    dtype = str(model.dtype).removeprefix("torch.")
    forwards = len(planner.evaluations)
    lines = [
        f"{model.name}, {dtype}, {count(model.num_elements)} weights, {gib(model.num_bytes)}; {r.batch} x "
        f"{r.tokens} tokens, {forwards} forwards a step ({r.estimator}, {r.probes} probe{'s' * (r.probes > 1)}); "
        f"weights on {r.weights}",
        planner.machine.name,
        "",
        f"{'mesh':<16}{'slices':>7}{'step s':>10}{'tokens/s':>10}{'x one':>7}  {'bound by':<25}{'a rank':>10}"
        f"{'host':>10}{'up':>9}{'down':>9}{'gather':>9}",
    ]
    for i, plan in enumerate(plans):
        sizes = (plan.played.bytes_up, plan.played.bytes_down, plan.played.bytes_gathered)
        moved = "".join(f"{size / 1e9:>7.3g}GB" if size else f"{'-':>9}" for size in sizes)
        lines.append(
            f"{plan.mesh!s:<16}{('on' if plan.sliced else 'off') if plan.mesh.num_ranks > 1 else '-':>7}"
            f"{plan.step_s:>10.4g}{significant(plan.tokens_per_s):>10}"
            f"{plan.tokens_per_s / plans[0].tokens_per_s:>7.2f}  "
            f"{plan.bound:<25}{gib(plan.rank_bytes.total):>10}{gib(plan.host_bytes):>10}{moved}"
            + ("  <- best" if i == best and len(plans) > 1 else "")
        )
        if plan.misfit:
            lines.append(f"{'':<16}  does not fit: {plan.misfit}")
    chosen = plans[best if best is not None else 0]
    parts = chosen.rank_bytes
    lines += [
        "",
        f"memory of a rank, {chosen.mesh}: residents {gib(parts.residents)}, slots {gib(parts.slots)}, perturbed "
        f"copies {gib(parts.scratch)}, lanes {gib(parts.lanes)}",
        "",
        "assumed:",
        *(f"  - {text}" for text in planner.assumptions()),
    ]
    return lines


def run_plan(request: Namespace, log: Callable[[str], None]) -> int:
    """The command."""
    for name in ("picture", "trace", "json"):
        path = getattr(request, name)
        if path and path != "-" and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"--{name} {path}: its directory is not there")
    machine = find_machine(request.machine, devices_per_switch=request.devices_per_switch, nvlink=not request.no_nvlink)
    if request.device not in ("auto", machine.device):
        raise UsageError(f"--device {request.device}: {machine.name} computes on {machine.device}")
    planner = Planner(request, machine)
    plans = planner.plans()
    result = to_json(planner, plans)
    if request.json == "-":
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        for line in table(planner, plans):
            log(line)
    written = []
    if request.json and request.json != "-":
        Path(request.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        written.append(request.json)
    chosen = plans[result["best"] or 0]
    if request.trace or request.picture:
        from distzo2.planning.plan_picture import draw_plan, save_plan_trace

        if request.trace:
            save_plan_trace(chosen.played, request.trace)
            written.append(request.trace)
        if request.picture:
            title = f"{result['model']['name']} on {machine.name}: {chosen.mesh}" + (", sliced" * chosen.sliced)
            draw_plan(chosen.played, request.picture, title)
            written.append(request.picture)
    if written and request.json != "-":
        log("")
        log(f"wrote {', '.join(written)}")
    return 0
