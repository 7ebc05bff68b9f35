"""`distzo2 plan`: what a forward is made of, rates, meshes, memory, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distzo2.cli.main import main, parse
from distzo2.errors import DistZO2Error, UsageError
from distzo2.optim.estimator import make_estimator
from distzo2.planning.measure_forward import VISITS
from distzo2.planning.plan import CONTEXT_BYTES, FORMAT, Planner, count, significant
from distzo2.planning.plan_machine import GPUS, find_machine, machine_from, named_machine
from distzo2.planning.plan_mesh import Mesh, busiest_share, parse_mesh, perturbation_shares, possible_meshes
from distzo2.planning.plan_model import Op, plan_model, plan_module
from distzo2.planning.plan_rates import Curve, Products
from distzo2.planning.timeline import read_trace, step_figures
from distzo2.run.options import PlanOptions

SMALL = ["plan", "--model=opt-125m", "--machine=a100", "--batch=8", "--tokens=64"]


def request(*arguments: str) -> PlanOptions:
    return parse([*SMALL, *arguments])[1]


def planned(*arguments: str) -> list:
    asked = request(*arguments)
    machine = find_machine(asked.machine, devices_per_switch=asked.devices_per_switch, nvlink=not asked.no_nvlink)
    return Planner(asked, machine).plans()


def write_config(directory: Path, config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    return directory


# ---- models ---------------------------------------------------------------------------------------------------------


def test_products_of_a_forward() -> None:
    """OPT-125M: its matrices, once a token, and its head, once."""
    plan = plan_model("opt-125m", torch.float32, 4, 128)
    blocks = [p for p in plan.parts if p.units and plan.units[p.units[-1]].name.endswith("layers.5")]
    assert len(blocks) == 1
    ops = {op: count for op, count in blocks[0].ops if op.kind != "stream"}
    assert ops == {
        Op("product", (512, 768, 768), torch.float32): 4,
        Op("product", (512, 768, 3072), torch.float32): 1,
        Op("product", (512, 3072, 768), torch.float32): 1,
        Op("attention", (128, 128, 64), torch.float32, 48, True): 1,
    }
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072) + 50272 * 768
    attention = 12 * 2 * 48 * 128 * 128 * 64
    assert plan.flop == pytest.approx(2 * 512 * weights + attention)
    assert [plan.units[p.units[-1]].name for p in plan.parts[1:3]] == [
        "model.decoder.embed_tokens", "model.decoder.embed_positions"
    ]  # fmt: skip
    assert len(plan.parts) == 1 + 2 + 12 + 1 + 1  # before, embeddings, blocks, norm, the tied head


def test_what_lanes_hold() -> None:
    """Parked in the blocks: hidden states. At the head: logits, and their logarithms beside them."""
    plan = plan_model("opt-125m", torch.float32, 4, 128)
    hidden, logits = 512 * 768 * 4, 512 * 50272 * 4
    assert plan.parts[6].live_before == pytest.approx(3 * hidden, rel=0.01)  # the lookups' results are alive
    assert plan.parts[-1].peak == pytest.approx(2 * logits + hidden, rel=0.01)
    assert plan.lane_bytes(1) == max(p.peak for p in plan.parts)
    assert plan.lane_bytes(3) == plan.parts[-1].peak + 2 * plan.parts[-1].live_before
    assert plan.lane_bytes(0) == 0


def test_other_models_and_their_files(tmp_path: Path) -> None:
    from transformers import LlamaConfig, Qwen3Config

    for name, config in {
        "llama": LlamaConfig(num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=2),
        "qwen3": Qwen3Config(num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=2),
    }.items():
        config.architectures = ["LlamaForCausalLM" if name == "llama" else "Qwen3ForCausalLM"]
        directory = write_config(tmp_path / name, config)
        plan = plan_model(str(directory), None, 2, 16)
        assert plan.name == name and plan.notes == () and sum(not u.resident for u in plan.units) == 3
        assert plan_model(str(directory / "config.json"), torch.bfloat16, 2, 16).num_bytes < 0.51 * plan.num_bytes


def test_a_forward_that_looks_at_values() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 16, bias=False) for _ in range(2))

        def forward(self, input_ids, labels, use_cache):
            return self.blocks[int(input_ids.sum().item())](input_ids.float())

    with torch.device("meta"):
        plan = plan_module(Choosy(), "choosy", torch.float32, 2, 3)
    assert len(plan.notes) == 1 and "cannot be followed without values" in plan.notes[0]
    assert plan.flop == 2 * (2 * 6 * 8 * 16)


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_curves() -> None:
    curve = Curve(((10.0, 1.0), (1000.0, 100.0), (2000.0, 50.0)))
    assert curve(1.0) == pytest.approx(0.1) and curve(100.0) == pytest.approx(10.0) and curve(4000.0) == 100.0
    assert curve(1000.0 * math.sqrt(2)) == pytest.approx(100.0 / math.sqrt(2))


def test_products_are_fitted() -> None:
    """Costs of a flop and a byte are found again, also for shapes that were not measured; what was measured is kept."""
    result = Curve(((1.0, 1e-10),))
    true = Products(1e-11, 3e-10, result)
    shapes = [(64, 512, 512), (512, 512, 512), (512, 512, 2048), (2048, 1024, 256), (128, 1024, 8192)]
    fitted = Products.fit(shapes, [true(s, 4) for s in shapes], 4, result)
    assert fitted.largest_residual < 1e-6
    for shape in [(300, 700, 900), (8, 4096, 4096), (4096, 512, 512)]:
        assert fitted(shape, 4) == pytest.approx(true(shape, 4), rel=1e-4)
    odd = Products.fit(shapes, [true(s, 4) * (1.5 if s == shapes[2] else 1.0) for s in shapes], 4, result)
    for shape in shapes:
        assert odd(shape, 4) == pytest.approx(true(shape, 4) * (1.5 if shape == shapes[2] else 1.0), rel=1e-3)


def measured_cpu(scale: float = 1.0) -> dict[str, Any]:
    """A measurement of a made CPU; `scale` times as slow."""
    both = {"engine_bytes_per_s": 4e9 / scale, "raw_bytes_per_s": 5e9}
    about = {"device": "cpu", "threads": 2}
    forward = []
    for dtype in ("float32", "bfloat16"):
        for size in ((128, 768, 768), (512, 768, 3072), (512, 3072, 768), (256, 768, 32768)):
            forward.append({"what": "product", "dtype": dtype, "size": list(size), "seconds": 2e-11 * math.prod(size)})
        for size in (2**20, 2**26):
            forward.append({"what": "stream", "dtype": dtype, "size": [size], "seconds": 2e-10 * size})
        forward.append({"what": "attention", "dtype": dtype, "size": [128, 128, 64, 8], "seconds": 1e-3})
    forward.append({"what": "softmax", "dtype": "float32", "size": [256, 32768], "seconds": 2e-2})
    # A normal takes 1 ns an element and a sign 0.1, each pass over memory 0.25, rounding an update 0.5.
    visits = [
        {
            "backend": "native", "what": what, "family": family, "dtype": dtype,
            "elements_per_s": 1e9
            / (made * (updates + min(1, emits)) + 0.25 * (1 + updates + emits) + 0.5 * updates)
            / scale,
        }
        for what, (updates, emits) in VISITS.items()
        for family, made in (("normal", 1.0), ("rademacher", 0.1))
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    host = {"visit_s": 1e-4, "lane_s": 1e-4, "materialize_s": 1e-4, "op_s": 1e-6, "step_s": 1e-3}
    return {
        "format": "distzo2-measure/2",
        "versions": {"distzo2": "0"},
        "quick": False,
        "machine": {"cpu": "made", "threads": 2, "memory_bytes": 8 * 2**30, "allowed_bytes": None, "gpus": []},
        "copies": [{"device": "cpu", "up": both, "down": both, "both": both}],
        "disk": {"read": both, "write": both, "both": both},
        "forward": [about | row | {"seconds": row["seconds"] * scale} for row in forward],
        "visits": [about | row for row in visits],
        "steps": [
            {**about, "dtype": "float32", "rows": 1, "tokens": 16, "compute_s": 0.05 * scale, "noise_s": 0.4 * scale}
        ],
        "host": [{"device": "cpu", **{k: v * scale for k, v in host.items()}}],
        "gather": {"backend": "gloo", "ranks": 2, "block_bytes": 2**20, "bytes_per_s": 0.4e9},
    }


def test_a_measured_machine(tmp_path: Path) -> None:
    machine = machine_from(measured_cpu())
    assert machine.computes_on_host and machine.num_devices == 2
    assert machine.gather_bytes_per_s == pytest.approx(0.2e9)  # half of the block is the rank's own
    rates = machine.rates
    assert rates.op_s(Op("product", (512, 768, 3072), torch.float32)) == pytest.approx(2e-11 * 512 * 768 * 3072)
    assert rates.op_s(Op("softmax", (256 * 32768,), torch.float32)) == pytest.approx(2e-2)
    call = {"terms": 4, "emissions": 1, "outs": 1, "write": True}
    assert rates.noise_s(10**9, torch.bfloat16, "normal", **call) == pytest.approx(5 * 1.0 + 3 * 0.25 + 0.5)
    assert rates.noise_s(10**9, torch.float16, "rademacher", **call) == pytest.approx(5 * 0.1 + 3 * 0.25 + 0.5)
    assert rates.shared_by(2).noise_s(10**9, torch.bfloat16, "normal", **call) == pytest.approx(2 * 6.25)

    asked = request("--dtype=float32")
    whole = Planner(asked, machine).predict(Mesh())
    assert whole.played.bytes_up == 0 and whole.rank_bytes.slots == 0  # a CPU uses memory in place
    slower = Planner(asked, machine_from(measured_cpu(2.0))).predict(Mesh())
    assert slower.step_s == pytest.approx(2 * whole.step_s, rel=0.01)
    asked.weights = "disk"
    streamed = Planner(asked, machine).predict(Mesh())
    assert streamed.step_s >= whole.step_s and streamed.played.bytes_up > 0
    assert streamed.host_bytes < whole.host_bytes and streamed.disk_bytes > 0
    two = Planner(asked, machine).predict(Mesh(pert=2))
    assert two.host_bytes == 2 * two.rank_bytes.total


def test_a_file_that_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"distzo2/measure\.json: No such file or directory: run distzo2 measure first"
    ):
        find_machine("this")
    path = tmp_path / "m.json"
    for text, message in (
        ("{", "is no measurement"),
        ("[]", "format list"),
        ('{"format": "distzo2-measure/1"}', "/1;"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            find_machine(str(path))
    result = measured_cpu()
    result["forward"] = [row for row in result["forward"] if row["what"] != "attention"]
    path.write_text(json.dumps(result))
    with pytest.raises(DistZO2Error, match=r"holds no forward of cpu, .*attention.*: run distzo2 measure there"):
        find_machine(str(path))


def test_named_machines() -> None:
    for name in GPUS:
        machine = named_machine(name)
        assert machine.num_devices == 8 and machine.assumptions
    a100, h100, h200 = (named_machine(name) for name in ("a100", "h100", "h200"))
    assert a100.link.up == 26e9 and h100.link.up == h200.link.up == 55e9
    assert a100.device_bytes == h100.device_bytes < h200.device_bytes
    with pytest.raises(UsageError, match="--machine b52: expected a100, h100, h200, this"):
        find_machine("b52")


# ---- meshes ---------------------------------------------------------------------------------------------------------


def test_dealing() -> None:
    two = make_estimator("spsa").evaluations(2)
    assert perturbation_shares(two, 1) == [two]
    assert perturbation_shares(two, 2) == [[(0, 1), (0, -1)], [(1, 1), (1, -1)]]
    assert perturbation_shares(two, 4) == [[(0, 1)], [(0, -1)], [(1, 1)], [(1, -1)]]
    assert perturbation_shares(two, 3) is None and perturbation_shares(two, 8) is None
    one_sided = make_estimator("fzoo").evaluations(3)
    assert perturbation_shares(one_sided, 2) == [[(0, 0), (0, 1)], [(1, 1), (2, 1)]]
    assert perturbation_shares(one_sided, 3) == [[(0, 0), (0, 1)], [(1, 1)], [(2, 1)]]
    assert busiest_share(Mesh(2, 3), two, 7) == ([(0, 1), (0, -1)], 3)
    assert possible_meshes(8, two, None, 8) == [Mesh(1, 8), Mesh(2, 4), Mesh(4, 2)]
    assert possible_meshes(4, two, 2, 8) == [Mesh(2, 2), Mesh(4, 1)]
    assert parse_mesh("data=4,pert=2") == Mesh(2, 4)
    assert str(Mesh(2, 4)) == "pert=2,data=4" and str(Mesh()) == "one device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel=pert=3"], "pert=3 does not divide the step's 2 perturbations: pert=1, 2 would"),
        (["--parallel=data=4", "--micro-batches=2"], "data=4 needs as many micro-batches, and there are 2"),
        (["--parallel=data=3"], "data=3 does not divide --batch 8"),
        (["--parallel=data=16", "--batch=16"], "is 16 ranks, and 8 x A100"),
        (["--nproc=16"], "--nproc 16: 8 x A100"),
        (["--nproc=7"], "no mesh of 7 ranks can share 2 perturbations and a batch of 8: more --probes"),
        (["--parallel=pert=2", "--nproc=4"], "--parallel pert=2 is 2 ranks, and --nproc says 4"),
        (["--parallel=pert=two"], "--parallel pert=two: expected pert=P,data=D"),
        (["--parallel=2x4"], "expected pert=P,data=D"),
        (["--micro-batches=3"], "--micro-batches 3 does not divide --batch 8"),
        (["--slots=1"], "--slots 1: at least 2 were expected"),
        (["--machine=v100"], "--machine v100: expected a100, h100, h200, this"),
        (["--device=cpu"], "--device cpu: 8 x A100 SXM 80 GB, PCIe 4, NVLink 3 computes on cuda"),
        (["--devices-per-switch=3"], "--devices-per-switch 3 does not divide 8 devices"),
        (["--model=opt-9b"], "--model opt-9b: expected a checkpoint's directory, a config.json, or one of opt-125m"),
        (["--tokens=4096"], "--tokens 4096: opt-125m has 2048 positions"),
        (["--json=/nowhere/x.json"], "--json /nowhere/x.json: its directory is not there"),
        (["--memory-budget=1MiB"], "memory_budget of 1.00 MiB: streaming needs at least"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_slices_share_the_transfers() -> None:
    one, *rest = planned("--nproc=4", "--probes=2")
    assert [(p.mesh, p.sliced) for p in rest] == [
        (mesh, sliced) for mesh in (Mesh(1, 4), Mesh(2, 2), Mesh(4, 1)) for sliced in (False, True)
    ]
    for plan in rest:
        blocks = one.played.bytes_up
        assert plan.played.bytes_up == pytest.approx(blocks / 4 if plan.sliced else blocks, rel=0.02)
        assert plan.played.bytes_gathered == pytest.approx(0.75 * blocks if plan.sliced else 0, rel=0.02)
        assert plan.host_bytes == (1 if plan.sliced else 4) * one.host_bytes


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (["--machine=h100"], ["--machine=a100"]),
        (["--tokens=64"], ["--tokens=128"]),
        (["--weights=device"], ["--weights=host"]),
        (["--weights=host"], ["--weights=disk"]),
        (["--memory-budget=2GiB"], []),
        (["--probes=1"], ["--probes=2"]),
        (["--parallel=data=2", "--slice=on", "--tokens=1024"], ["--tokens=1024"]),
        (["--parallel=data=4", "--slice=off"], ["--parallel=data=4", "--slice=off", "--devices-per-switch=4"]),
        (["--parallel=data=4", "--slice=on"], ["--parallel=data=4", "--slice=on", "--no-nvlink"]),
        (["--max-lanes=2"], ["--max-lanes=1"]),
    ],
)
def test_what_is_better_is_not_slower(better: list[str], worse: list[str]) -> None:
    assert planned(*better)[-1].step_s <= 1.001 * planned(*worse)[-1].step_s


def test_a_switch_that_all_share_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    alone, shared = (
        planned("--parallel=data=8", "--slice=off", f"--devices-per-switch={n}", "--tokens=16")[-1] for n in (1, 8)
    )
    assert shared.step_s > 3 * alone.step_s and "transfers" in shared.bound


def test_memory_that_does_not_fit() -> None:
    machine = named_machine("a100")
    fits = Planner(request("--model=opt-13b", "--batch=1"), machine).predict(Mesh())
    assert fits.misfit is None and fits.rank_bytes.total < machine.device_bytes - CONTEXT_BYTES
    whole = Planner(request("--model=opt-66b", "--batch=1", "--weights=device"), machine).predict(Mesh())
    assert "on a device" in whole.misfit


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"plan.{name}" for name in ("json", "png", "trace")}
    arguments = [f"--json={files['json']}", f"--picture={files['png']}", f"--trace={files['trace']}", "--nproc=2"]
    assert main([*SMALL, *arguments]) == 0
    lines = capsys.readouterr().out
    assert "<- best" in lines and "assumed:" in lines and "one device" in lines and "nan" not in lines
    result = json.loads(files["json"].read_text())
    assert result.keys() == {"format", "version", "model", "request", "machine", "rows", "best"}
    assert result["format"] == FORMAT
    assert result["model"] == {
        "name": "opt-125m", "dtype": "float16", "elements": 125239296, "bytes": result["model"]["bytes"], "units": 15,
        "blocks": 12,
    }  # fmt: skip
    rows = result["rows"]
    assert len(rows) == 5 and rows[0]["speedup"] == 1.0 and rows[0]["ranks"] == 1
    assert rows[result["best"]]["tokens_per_s"] == max(row["tokens_per_s"] for row in rows if row["fits"])
    documented = {
        "mesh", "pert", "data", "ranks", "slice", "micro_batches", "step_s", "tokens_per_s", "speedup", "bound", "busy",
        "wait_s", "noise_s", "up_bytes", "down_bytes", "gather_bytes", "rank_bytes", "host_bytes", "disk_bytes", "fits",
        "misfit",
    }  # fmt: skip
    for row in rows:
        assert row.keys() == documented
        assert row["tokens_per_s"] == pytest.approx(8 * 64 / row["step_s"])
        assert all(0 <= share <= 1.0 + 1e-9 for share in row["busy"].values())
        parts = row["rank_bytes"]
        assert parts["total"] == sum(parts[k] for k in ("residents", "slots", "scratch", "lanes")) > 0
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    figures = step_figures(read_trace(files["trace"]))
    best = rows[result["best"]]
    assert figures.seconds == pytest.approx(best["step_s"], rel=0.01)
    assert figures.bytes_up == pytest.approx(best["up_bytes"], rel=0.05)
    json.dumps(result, allow_nan=False)


def test_numbers_for_people() -> None:
    assert [significant(n) for n in (0.012345, 219.04, 999.96, 74741.3, 1.5e6)] == [
        *("0.01235", "219", "1000", "74741", "1500000"),
    ]
    assert [count(n) for n in (63_200, 6_320_000, 125_239_296, 175e9)] == ["63200", "6.32 M", "0.125 G", "175 G"]


def test_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["mesh"] == "one device"
