"""`distzo2 plan`: memory, step time and tokens/s of a run before it is started, and what would bound it.

Units, parts and bytes are those of the model's configuration (`plan_model`), the rates a machine's (`machines`), the
schedule the runtime's, played event by event (`schedule`). What is assumed is listed with the figures.

The JSON file, `distzo2-plan/1`:

    model        name, dtype, packed (formats), compute_dtype, elements, bytes, seen_bytes (in the dtypes that modules
                 compute with), largest_copy (of a unit, in them), units, blocks, trained (a line; null: all is),
                 trained_elements, saved_bytes (of the checkpoint or adapter at the end)
    request      the options
    machine      name; assumptions: lines of text
    rows         the first is one device; each: mesh, pert, data, ranks, slice, micro_batches, step_s, tokens_per_s,
                 speedup, bound, busy (share of the step by resource), wait_s, noise_s, up_bytes, down_bytes,
                 gather_bytes (a rank and step), rank_bytes (residents, slots, scratch, lanes, total), host_bytes and
                 disk_bytes (of the node's weight files, whose spare slots come on top; frozen blocks stay in the
                 checkpoint's own files), fits, misfit
    best         index of the row with the most tokens/s among those that fit; null: none does
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distzo2.errors import DistZO2Error, UsageError
from distzo2.estimators.registry import make_estimator
from distzo2.models.shapes import LARGE
from distzo2.optim.moments import default_window
from distzo2.optim.selection import trained
from distzo2.parallel.mesh import GLOBAL, MeshShape, check_step, deal_lanes, parse_mesh, pert_fits
from distzo2.planning.machines import EXCHANGE_S, GPUS, TF32_SHARE, Duplex, Machine, find_machine
from distzo2.planning.plan_model import ModelPlan, plan_model
from distzo2.planning.report import draw_plan, plan_events
from distzo2.planning.schedule import Played, Slicing, Work, play_steps
from distzo2.run.preflight import DTYPES, check_output
from distzo2.streaming.lanes import Emission
from distzo2.text import dtype_name, gib
from distzo2.version import __version__
from distzo2.weights.residency import AUTO_SHARE, blocks_to_stream, slots_of_use
from distzo2.weights.store import num_slots_of, slot_bytes_of
from distzo2.weights.units import Unit
from distzo2_core import FAMILIES, Term

FORMAT = "distzo2-plan/1"
CONTEXT_BYTES = 10**9  # of a GPU, taken by its driver and libraries, the workspace of cuBLAS among them
STAGING_BYTES = 6 * 4 * 2**20  # pinned, between a disk and a GPU
ONE_DEVICE = MeshShape(pert=1, data=1)
AUTO_TEXTS = {  # what --compute-dtype auto comes to, for weights of 16 bits
    torch.float32: "computed in float32: products in 16 bits are no faster on this CPU",
    None: "computed as stored; finetune takes float32 where that loses the signal, which --compute-dtype float32 plans",
}
DECODE_TEXTS = (  # without measured rates, and with them
    "packed weights are decoded at the memory's rate, as they are read and a copy is written: theirs was not measured",
    "packed weights are decoded as measured: Q5_K and Q6_K at the rate of nibbles, float8 at that of int8",
)
NOISE_TEXT = "low-rank noise at the rate of dense noise of its kind: its own was not measured"
OFFLOADED_BYTES = 12  # a parameter, of backpropagation with weights, gradients and Adam on the host (arXiv 2604.05091)
TABLE_COLUMNS = {"bf16": {}} | {store: {"store": store} for store in ("affine16", "affine8")}
TABLE_COLUMNS["affine4, LoRA"] = {"store": "affine4", "peft": "lora"}


class Prediction(NamedTuple):
    """One mesh, sliced or not: a row of the file, and the schedule behind it."""

    row: dict[str, Any]
    played: Played


class Planner:
    """Predictions of one request: the options of `distzo2 plan`."""

    def __init__(self, request: Any, machine: Machine) -> None:
        if request.host_memory not in (None, "auto"):
            device_bytes = request.host_memory if machine.computes_on_host else machine.device_bytes
            machine = replace(machine, host_bytes=request.host_memory, device_bytes=device_bytes)
        if request.tf32:
            if machine.computes_on_host:
                raise UsageError(f"--tf32: {machine.name} computes on a CPU, and TF32 is a GPU's")
            flop = {**machine.rates.flop_per_s, "float32": TF32_SHARE * machine.rates.flop_per_s["bfloat16"]}
            notes = (*machine.assumptions, "float32 products in TF32, at half of bf16's rate (NVIDIA's data sheets)")
            machine = replace(machine, rates=replace(machine.rates, flop_per_s=flop), assumptions=notes)
        self.request, self.machine = request, machine
        self.evaluations = make_estimator(request.estimator, **request.estimator_options).evaluations(request.probes)
        self.window = request.momentum_window or default_window(request.momentum)  # steps whose noise an update makes
        slow = machine.computes_on_host and machine.rates.flop_per_s["bfloat16"] <= machine.rates.flop_per_s["float32"]
        asked = "float32" if request.compute_dtype == "auto" and slow else request.compute_dtype
        self.compute_dtype = DTYPES.get(asked)  # None: as stored
        self.models: dict[int, ModelPlan] = {}  # by sequences of a micro-batch
        if request.micro_batches is not None and request.batch % request.micro_batches:
            raise UsageError(f"--micro-batches {request.micro_batches} does not divide --batch {request.batch}")

    def predict(self, mesh: MeshShape = ONE_DEVICE, sliced: bool = False) -> Prediction:
        """What a step on `mesh` takes.

        Raises:
            UsageError: the mesh is impossible. DistZO2Error: a budget is too small, or a rate is not known.
        """
        r, machine, ranks = self.request, self.machine, mesh.size
        if ranks > machine.num_devices:
            raise UsageError(f"{mesh} is {ranks} ranks, and {machine.name} has {machine.num_devices} devices")
        num_batches = self._num_batches(mesh)
        check_step(mesh, self.evaluations, num_batches)
        rows = r.batch // num_batches
        if rows not in self.models:
            self.models[rows] = plan_model(r.model, DTYPES.get(r.dtype), rows, r.tokens, self.compute_dtype, r, r.store)
        model = self.models[rows]
        for unit in model.units:
            unit.keeps_start = r.anchor > 0
        streamed = self._place(model, sliced)
        family = FAMILIES[r.noise]
        emissions = [Emission((Term(family, 0, k, 0, float(s)),)) if s else Emission() for k, s in self.evaluations]
        dealt = deal_lanes(mesh, self.evaluations, [num_batches] * ranks, GLOBAL, r.probe_batches == "own").lanes
        busiest = max(dealt, key=lambda places: (len(places), len({e for e, _ in places})))  # sets the pace
        lanes = [emissions[e] for e, _ in busiest]
        wave = r.max_lanes or len(lanes)
        work = Work(
            model=model,
            rates=replace(machine.rates, slowdown=ranks) if machine.computes_on_host else machine.rates,
            on_host=machine.computes_on_host,
            streamed=streamed,
            slots=num_slots_of(slots_of_use(model.units, r.slots), len(streamed)),
            link=self._link(ranks) if streamed else None,
            passes=[lanes[i : i + wave] for i in range(0, len(lanes), wave)],
            num_terms=r.probes * self.window,
            family=r.noise,
            write_every=r.write_every,
            slicing=self._slicing(ranks) if sliced and streamed else None,
            exchange_s=EXCHANGE_S if ranks > 1 else 0.0,
            on_disk=r.weights == "disk",
        )
        played = play_steps(work)
        rank = {  # of the device; of the host, where it computes
            "residents": sum(u.stored_bytes for u in model.units if u not in streamed),
            "slots": slot_bytes_of((u.num_bytes if sliced else u.stored_bytes) for u in streamed) * work.slots
            if streamed
            else 0,
            "scratch": played.scratch_bytes,
            "lanes": model.lane_bytes(min(wave, len(lanes))),
        }
        rank["total"] = sum(rank.values())

        def stored(unit: Unit) -> int:  # bytes, on all ranks
            return unit.stored_bytes + unit.scale_bytes if sliced and unit in streamed else unit.stored_bytes * ranks

        host, disk = sum(stored(u) for u in streamed), 0
        if r.weights == "disk":  # frozen blocks stay in the checkpoint's files; residents that are trained are copied
            written = [u for u in model.units if u.trainable or (u in streamed and not _lies_in_files(u))]
            host, disk = 0, sum(stored(u) for u in written)
        if machine.computes_on_host:
            host += ranks * rank["total"]
        elif r.weights == "disk" and streamed:
            host += ranks * STAGING_BYTES
        misfit = None
        if not machine.computes_on_host and rank["total"] > machine.device_bytes - CONTEXT_BYTES:
            misfit = f"{gib(rank['total'])} of {gib(machine.device_bytes)} on a device"
        elif host > machine.host_bytes:
            misfit = f"{gib(host)} of {gib(machine.host_bytes)} on the host"
        row = {
            "mesh": str(mesh) if ranks > 1 else "one device",
            "pert": mesh.pert,
            "data": mesh.data,
            "ranks": ranks,
            "slice": sliced,
            "micro_batches": num_batches,
            "step_s": played.step_s,
            "tokens_per_s": r.batch * r.tokens / played.step_s,
            "bound": _bound(played),
            "busy": {resource: seconds / played.step_s for resource, seconds in played.busy_s.items()},
            "wait_s": played.wait_s,
            "noise_s": played.noise_s,
            "up_bytes": played.bytes_up,
            "down_bytes": played.bytes_down,
            "gather_bytes": played.bytes_gathered,
            "rank_bytes": rank,
            "host_bytes": host,
            "disk_bytes": disk,
            "fits": misfit is None,
            "misfit": misfit,
        }
        return Prediction(row, played)

    def _num_batches(self, mesh: MeshShape) -> int:
        """Micro-batches of a step, of all probes: as many as the request names, or as the mesh needs.

        Raises:
            UsageError: they do not divide the batch, or there are fewer than ranks that share them.
        """
        r = self.request
        if r.probe_batches == "shared":
            if r.micro_batches is None and r.batch % mesh.data:
                raise UsageError(
                    f"data={mesh.data} does not divide --batch {r.batch}, and --micro-batches is not given"
                )
            return r.micro_batches or mesh.data
        each = r.micro_batches or -(-mesh.size // r.probes)
        parts = r.probes * each
        if r.batch % parts:
            text = f"--probes {r.probes} x {each} micro-batches"
            raise UsageError(f"--probe-batches own: {text} do not divide --batch {r.batch}")
        if parts < mesh.size:
            raise UsageError(f"--probe-batches own: {mesh.size} ranks cannot share {parts} parts of a batch")
        return parts

    def _place(self, model: ModelPlan, sliced: bool) -> list[Unit]:
        """The units that stream, in the order of their blocks: those that lie in files of others come last."""
        r, machine = self.request, self.machine
        streams = r.weights == "disk" or (r.weights == "host" and (not machine.computes_on_host or sliced))
        if not streams:
            return []
        budget = int(AUTO_SHARE * machine.device_bytes) if r.memory_budget == "auto" else r.memory_budget
        slots = slots_of_use(model.units, r.slots)
        streamed = blocks_to_stream(model.units, torch.device(machine.device), budget, slots, lambda: 0)
        return sorted(streamed, key=lambda unit: r.weights == "disk" and _lies_in_files(unit))

    def _link(self, ranks: int) -> Duplex:
        """The link of one rank, which the other ranks keep as busy."""
        machine = self.machine
        rates, sharers = machine.link, ranks if machine.computes_on_host else min(ranks, machine.devices_per_switch)
        if self.request.weights == "disk":
            rates, sharers = machine.disk, ranks
        most = float("inf") if machine.host_bytes_per_s is None else machine.host_bytes_per_s / ranks
        return Duplex(*(min(rate / sharers, most) for rate in (rates.up, rates.down, rates.both)))

    def _slicing(self, ranks: int) -> Slicing:
        machine = self.machine
        received = (ranks - 1) / ranks
        if machine.gather_bytes_per_s is None and machine.computes_on_host:
            raise DistZO2Error(f"the rate of a gather on {machine.name} was not measured")
        rate = machine.gather_bytes_per_s or self._link(ranks).up
        return Slicing(ranks, received / rate, over_link=machine.gather_bytes_per_s is None)

    def plans(self) -> list[Prediction]:
        """One device first, then what the request names: a mesh, or all meshes of a number of ranks.

        Raises:
            UsageError: the request is impossible.
        """
        r, machine = self.request, self.machine
        ways = {"on": [True], "off": [False], "auto": [False, True]}[r.slice]
        no_gather = machine.computes_on_host and machine.gather_bytes_per_s is None
        if r.weights == "device" or (r.slice == "auto" and no_gather):
            ways = [False]
        meshes = [mesh for mesh in self._meshes() if mesh.size > 1]
        first = self.predict()
        return [first, *(self.predict(mesh, sliced) for mesh in meshes for sliced in ways)]

    def _meshes(self) -> list[MeshShape]:
        """The mesh that the request names, or all of its number of ranks that can share a step."""
        r = self.request
        if r.nproc and not r.parallel:
            meshes = (MeshShape(pert, r.nproc // pert) for pert in range(1, r.nproc + 1) if r.nproc % pert == 0)
            what = f"a batch of {r.batch}" if r.micro_batches is None else f"{r.micro_batches} micro-batches"

            def fits(mesh: MeshShape) -> bool:
                try:
                    return pert_fits(self.evaluations, mesh.pert) and self._num_batches(mesh) >= mesh.data
                except UsageError:
                    return False

            if found := list(filter(fits, meshes)):
                return found
            raise UsageError(
                f"no mesh of {r.nproc} ranks can share {len(self.evaluations)} evaluations and "
                f"{what}: more --probes, or a --batch that more ranks divide"
            )
        if not r.parallel:
            return []
        try:
            mesh = MeshShape(**{"pert": 1, "data": 1, **parse_mesh(r.parallel)})
        except ValueError:
            raise UsageError(f"--parallel {r.parallel}: expected pert=P,data=D with numbers of at least 1") from None
        if r.nproc not in (None, mesh.size):
            raise UsageError(f"--parallel {r.parallel} is {mesh.size} ranks, and --nproc says {r.nproc}")
        return [mesh]


def _lies_in_files(unit: Unit) -> bool:
    """Whether a block streams from the files of its checkpoint: what nothing changes does, as far as files have it."""
    return not unit.trainable and not any(p.stored is not None and p.stored.ranges is None for p in unit.params)


def _bound(played: Played) -> str:
    """The busiest resource, with its share of the step."""
    busy = played.busy_s
    resource = max(busy, key=busy.get)
    name = "updates" if resource == "side" else resource
    if resource in ("upload", "download") and min(busy["upload"], busy.get("download", 0)) > 0.9 * played.step_s:
        name = "transfers both ways"
    if resource == "compute" and played.noise_s > 0.5 * busy["compute"]:
        name = "noise"
    return f"{name} {busy[resource] / played.step_s:.0%}"


# ---- what is written ----------------------------------------------------------------------------------------------


def to_json(planner: Planner, plans: Sequence[Prediction]) -> dict[str, Any]:
    """The content of the JSON file, as the module's docstring lists it."""
    model, rows = next(iter(planner.models.values())), [plan.row for plan in plans]
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    r, machine = planner.request, planner.machine
    assumptions = [
        f"every sequence has {r.tokens} tokens and the loss is that of all of them; attention and loss as "
        "transformers runs them here",
        *machine.assumptions,
        *([AUTO_TEXTS[planner.compute_dtype]] if r.compute_dtype == "auto" and model.dtype != torch.float32 else ()),
        *((f"an update makes the noise of {planner.window} steps (--momentum)",) if planner.window > 1 else ()),
        *((NOISE_TEXT,) if r.noise not in machine.rates.noise_per_s else ()),
        *((DECODE_TEXTS[bool(machine.rates.decode_per_s)],) if any(u.packed for u in model.units) else ()),
        *(() if machine.computes_on_host else (f"{gib(CONTEXT_BYTES)} of a GPU are its driver's",)),
        f"ranks start each step together; their scalars take {1e3 * EXCHANGE_S:g} ms"
        if r.parallel or r.nproc
        else "nothing else runs on the machine",
    ]
    params = [p for u in model.units for p in u.params]
    largest = max((u for u in model.units if u.trainable or u.converts), key=lambda u: u.seen_bytes)
    fitting = [i for i, row in enumerate(rows) if row["fits"]]
    return {
        "format": FORMAT,
        "version": __version__,
        "model": {
            "name": model.name,
            "dtype": dtype_name(model.dtype),
            "packed": sorted({p.stored.format for p in params if p.layout is not None}),
            "compute_dtype": dtype_name(planner.compute_dtype or model.dtype),
            "elements": sum(p.numel for p in params),
            "bytes": sum(u.num_bytes for u in model.units),
            "seen_bytes": sum(u.seen_bytes for u in model.units),
            "largest_copy": {"unit": largest.name, "bytes": largest.seen_bytes},
            "units": len(model.units),
            "blocks": sum(not u.resident for u in model.units),
            "trained": trained(params),
            "trained_elements": sum(p.numel for p in params if p.trainable),
            "saved_bytes": model.saved_bytes,
        },
        "request": {k: v for k, v in vars(r).items() if k not in ("json", "picture", "trace")},
        "machine": {"name": machine.name, "assumptions": assumptions},
        "rows": rows,
        "best": max(fitting, key=lambda i: rows[i]["tokens_per_s"], default=None),
    }


def significant(number: float) -> str:
    """Four digits of a number, or all of those before the point, never as a power of ten."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.4g}"


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    r, model, rows, best = result["request"], result["model"], result["rows"], result["best"]
    converts = model["seen_bytes"] != model["bytes"] or model["compute_dtype"] != model["dtype"]
    computed = f" packed as {', '.join(model['packed'])}" if model["packed"] else ""
    computed += f" computed in {model['compute_dtype']}" if converts else ""
    lines = [
        f"{model['name']}, {model['dtype']}{computed}, {model['elements'] / 1e9:.3g} G weights, {gib(model['bytes'])}; "
        f"{r['batch']} x {r['tokens']} tokens a step, {r['estimator']}, {r['probes']} probe{'s' * (r['probes'] > 1)}"
        f"{', each with a part of them' * (r['probe_batches'] == 'own')}; "
        f"weights on {r['weights']}",
        *([f"{model['trained']}; it writes {gib(model['saved_bytes'])} at its end"] if model["trained"] else ()),
        result["machine"]["name"],
        "",
        f"{'mesh':<16}{'slices':>7}{'step s':>10}{'tokens/s':>10}{'x one':>7}  {'bound by':<25}{'a rank':>10}"
        f"{'host':>10}{'up':>9}{'down':>9}{'gather':>9}",
    ]
    for i, row in enumerate(rows):
        sizes = (row["up_bytes"], row["down_bytes"], row["gather_bytes"])
        moved = "".join(f"{size / 1e9:>7.3g}GB" if size else f"{'-':>9}" for size in sizes)
        slices = ("on" if row["slice"] else "off") if row["ranks"] > 1 else "-"
        lines.append(
            f"{row['mesh']:<16}{slices:>7}{row['step_s']:>10.4g}{significant(row['tokens_per_s']):>10}"
            f"{row['speedup']:>7.2f}  {row['bound']:<25}{gib(row['rank_bytes']['total']):>10}"
            f"{gib(row['host_bytes']):>10}{moved}" + ("  <- best" if i == best and len(rows) > 1 else "")
        )
        if row["misfit"]:
            lines.append(f"{'':<16}  does not fit: {row['misfit']}")
    chosen = rows[best or 0]
    parts = {name: gib(size) for name, size in chosen["rank_bytes"].items()}
    if converts:
        times, largest = model["seen_bytes"] / model["bytes"], model["largest_copy"]
        parts["scratch"] += f" ({model['compute_dtype']}: {times:.3g} x the stored; {gib(largest['bytes'])} each, "
        parts["scratch"] += f"of {largest['unit']}, the largest)"
    lines += [
        "",
        f"memory of a rank, {chosen['mesh']}: residents {parts['residents']}, slots {parts['slots']}, perturbed "
        f"copies {parts['scratch']}, lanes {parts['lanes']}",
        "",
        "assumed:",
        *(f"  - {text}" for text in result["machine"]["assumptions"]),
    ]
    return lines


def memory_table(request: Any, names: Iterable[str] = tuple(LARGE)) -> list[str]:
    """The memory of the README as lines of Markdown, in GB: of a node's host for one device, weights in host memory,
    and of that device in a step of one sequence of 2048 tokens."""
    columns = list(TABLE_COLUMNS)
    head = ["GB", *columns, *(f"on the device: {columns[i]}" for i in (0, -1)), "offloaded backpropagation"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in names:
        rows, num = [], 0
        for options in TABLE_COLUMNS.values():
            asked = {"model": name, "dtype": "bfloat16", "weights": "host", "batch": 1, "tokens": 2048, **options}
            planner = Planner(replace(request, **asked), GPUS["h200"])
            rows.append(planner.predict().row)
            num = num or sum(p.numel for u in planner.models[1].units for p in u.params)
        sizes = [*(row["host_bytes"] for row in rows), *(row["rank_bytes"]["total"] for row in (rows[0], rows[-1]))]
        cells = [f"{size / 1e9:.0f}" for size in (*sizes, OFFLOADED_BYTES * num)]
        lines.append(f"| {name}, {num / 1e9:.3g} G | {' | '.join(cells)} |")
    return lines


def run_plan(request: Any, log: Callable[[str], None]) -> int:
    """The command; `request` has its options as attributes."""
    check_output(picture=request.picture, trace=request.trace, json=request.json)
    if request.table:
        log("\n".join(memory_table(request)))
        return 0
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
        log("\n".join(table(result)))
        if request.json:
            Path(request.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    chosen = plans[result["best"] or 0]
    if request.trace:
        Path(request.trace).write_text(json.dumps({"traceEvents": plan_events(chosen.played)}), encoding="utf-8")
    if request.picture:
        title = f"{result['model']['name']} on {machine.name}: {chosen.row['mesh']}{', sliced' * chosen.row['slice']}"
        draw_plan(chosen.played, request.picture, title)
    written = [path for path in (request.json, request.trace, request.picture) if path]
    if written and request.json != "-":
        log(f"\nwrote {', '.join(written)}")
    return 0
