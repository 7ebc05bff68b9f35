"""`distzo2 plan`: what a forward is made of, rates, meshes, memory, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import finetune, one_line
from safetensors.torch import load_file
from torch import nn

from distzo2.cli.main import main, parse
from distzo2.cli.options import PlanOptions
from distzo2.errors import DistZO2Error, UsageError
from distzo2.parallel.mesh import MeshShape
from distzo2.planning.machines import GPUS, MEASURED, find_machine, machine_from
from distzo2.planning.plan import CONTEXT_BYTES, FORMAT, NOISE_TEXT, Planner, memory_table, significant, to_json
from distzo2.planning.plan_model import Op, plan_model, plan_module
from distzo2.planning.report import read_trace, step_figures
from distzo2.run.loop import TrainLoop
from distzo2.run.metrics import read_metrics
from distzo2.streaming.offload import runtime_of

SMALL = ["plan", "--model=opt-125m", "--machine=a100", "--batch=8", "--tokens=64"]


def request(*arguments: str) -> PlanOptions:
    return parse([*SMALL, *arguments])[1]


def planned(*arguments: str) -> list:
    asked = request(*arguments)
    machine = find_machine(asked.machine, devices_per_switch=asked.devices_per_switch, nvlink=not asked.no_nvlink)
    return Planner(asked, machine).plans()


def test_an_update_makes_the_noise_of_its_window(capsys) -> None:
    """Of 2 perturbations the one of the next step, and of the update one of each step of the window."""
    plain, four, default = (
        planned("--noise=rademacher", *more)[0].row["noise_s"]
        for more in ([], ["--momentum=0.9", "--momentum-window=4"], ["--momentum=0.9"])
    )
    term = (four - plain) / 3
    assert 0 < term < plain and default == pytest.approx(plain + 43 * term)
    with pytest.raises(SystemExit):
        main([*SMALL, "--momentum-window=4"])
    assert "--momentum-window needs --momentum" in one_line(capsys)


def test_an_anchor_needs_a_second_copy() -> None:
    for more in (["--weights=host"], ["--weights=disk"], ["--weights=host", "--nproc=2", "--slice=on"]):
        plain, anchored = (planned(*more, *option)[-1].row for option in ([], ["--anchor=1"]))
        where = "disk_bytes" if "--weights=disk" in more else "host_bytes"
        assert anchored[where] == pytest.approx(2 * plain[where], rel=0.01)
        assert anchored["up_bytes"] == pytest.approx(2 * plain["up_bytes"], rel=0.01)
        assert anchored["down_bytes"] == pytest.approx((1 + (where == "disk_bytes")) * plain["down_bytes"], rel=0.01)
        assert anchored["gather_bytes"] == plain["gather_bytes"]
        assert anchored["rank_bytes"]["residents"] == 2 * plain["rank_bytes"]["residents"]
        assert anchored["rank_bytes"]["scratch"] == plain["rank_bytes"]["scratch"]


def test_low_rank_noise_has_rates_of_its_own() -> None:
    """A node by name derives them; a measurement without them has those of dense noise, and the plan says so."""
    families = ("normal-r4", "normal-r1", "sign-r4", "sign-r1", "normal", "rademacher")
    rates = [GPUS["a100"].rates.noise_per_s[family] for family in families]
    assert rates == sorted(rates) and rates[4] / rates[0] == pytest.approx(4.94, abs=0.01)
    asked = request("--noise=sign-r1", "--weights=device")
    planner = Planner(asked, machine_from(measured_cpu()))
    assert NOISE_TEXT in to_json(planner, planner.plans())["machine"]["assumptions"]


def test_a_batch_for_each_probe() -> None:
    """Four probes have the forwards of one, and the noise of four; all ranks share the parts."""
    long = ["--batch=32", "--tokens=1024", "--weights=device"]
    one, shared = (planned(*long, f"--probes={k}")[0].row for k in (1, 4))
    own, mesh = (p.row for p in planned(*long, "--probes=4", "--probe-batches=own", "--parallel=pert=2,data=4"))
    assert own["micro_batches"] == 4 and own["noise_s"] == pytest.approx(shared["noise_s"], rel=0.01)
    assert one["step_s"] < own["step_s"] < 0.5 * shared["step_s"]
    assert own["rank_bytes"]["lanes"] < 0.5 * shared["rank_bytes"]["lanes"]
    assert mesh["micro_batches"] == 8 and mesh["step_s"] < 0.5 * own["step_s"]  # a rank has both signs of one part


def test_a_clean_evaluation_is_a_forward_without_noise() -> None:
    two, three = (planned(f"--estimator={name}", "--noise=normal")[0].row for name in ("spsa", "1.5spsa"))
    compute, other = (row["busy"]["compute"] * row["step_s"] - row["noise_s"] for row in (two, three))
    # The clean lane may come first: an update then reads the weights once more than perturbing does.
    assert three["noise_s"] == pytest.approx(two["noise_s"], rel=0.1) and other == pytest.approx(1.5 * compute, rel=0.1)


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
    flop = sum(op.flop * count for part in plan.parts for op, count in part.ops)
    assert flop == pytest.approx(2 * 512 * weights + attention)
    assert [plan.units[p.units[-1]].name for p in plan.parts[1:3]] == [
        "model.decoder.embed_tokens", "model.decoder.embed_positions"
    ]  # fmt: skip
    assert len(plan.parts) == 1 + 2 + 12 + 1 + 1  # before, embeddings, blocks, norm, the tied head
    # Parked in the blocks: hidden states. At the head: logits, and their logarithms beside them.
    hidden, logits = 512 * 768 * 4, 512 * 50272 * 4
    assert plan.parts[6].live_before == pytest.approx(3 * hidden, rel=0.01)  # the lookups' results are alive
    assert plan.parts[-1].peak == pytest.approx(2 * logits + hidden, rel=0.01)
    assert plan.lane_bytes(1) == max(p.peak for p in plan.parts)
    assert plan.lane_bytes(3) == plan.parts[-1].peak + 2 * plan.parts[-1].live_before


def test_models_and_their_files(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, intermediate_size=96, num_attention_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    plan = plan_model(str(tmp_path / "llama"), None, 2, 16)
    assert plan.name == "llama" and sum(not u.resident for u in plan.units) == 3
    half = plan_model(str(tmp_path / "llama/config.json"), torch.bfloat16, 2, 16)
    assert sum(u.num_bytes for u in half.units) < 0.51 * sum(u.num_bytes for u in plan.units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts(dtype: torch.dtype) -> None:
    """Two of four experts a token, evenly dealt; their weights are all read."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=100,
    )  # fmt: skip
    with torch.device("meta"):
        plan = plan_module(MixtralForCausalLM._from_config(config, dtype=dtype).eval(), "mixtral", dtype, 2, 16)
    ops = {op: count for part in plan.parts[2:3] for op, count in part.ops if op.batch == 4 and op.kind == "product"}
    assert ops == {Op("product", (16, 64, 192), dtype, 4): 1, Op("product", (16, 96, 64), dtype, 4): 1}


def test_a_forward_that_looks_at_values() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 16, bias=False) for _ in range(2))

        def forward(self, input_ids, labels, use_cache):
            return self.blocks[int(input_ids.sum().item())](input_ids.float())

    with torch.device("meta"), pytest.raises(DistZO2Error, match="of choosy cannot be planned, it needs values"):
        plan_module(Choosy(), "choosy", torch.float32, 2, 3)


# ---- rates ----------------------------------------------------------------------------------------------------------


def measured_cpu(scale: float = 1.0) -> dict[str, Any]:
    """A measurement of a made CPU; `scale` times as slow."""
    ways = {f"{way}_bytes_per_s": 4e9 / scale for way in ("up", "down", "both")}
    noise = {"normal": 1e9, "rademacher": 10e9}
    return {
        "format": MEASURED,
        "versions": {"distzo2": "0"},
        "quick": False,
        "machine": {"cpu": "made", "threads": 2, "memory_bytes": 8 * 2**30, "allowed_bytes": None, "gpus": []},
        "copies": [{"device": "cpu", **ways}],
        "disk": ways,
        "noise": [{"device": "cpu", "family": f, "elements_per_s": rate / scale} for f, rate in noise.items()],
        "matmul": [{"device": "cpu", "dtype": d, "flop_per_s": 1e11 / scale} for d in ("float32", "bfloat16")],
        "memory": [{"device": "cpu", "bytes_per_s": 8e9 / scale}],
        "gather": {"backend": "gloo", "ranks": 2, "block_bytes": 2**20, "bytes_per_s": 0.4e9},
    }


def test_a_measured_machine(tmp_path: Path) -> None:
    machine = machine_from(measured_cpu())
    assert machine.computes_on_host and machine.num_devices == 2
    assert machine.gather_bytes_per_s == pytest.approx(0.2e9)  # half of the block is the rank's own
    rates = machine.rates
    large, small = Op("product", (512, 768, 3072), torch.float32), Op("product", (1, 768, 3072), torch.float32)
    assert rates.op_s(large) == pytest.approx(large.flop / 1e11)
    assert rates.op_s(small) == pytest.approx(small.num_bytes / 8e9)  # bound by reading the weights
    attention = Op("attention", (512, 512, 64), torch.float32, 8, causal=True)
    assert rates.op_s(attention) == pytest.approx(attention.flop / 0.5e11)
    call = {"terms": 4, "emissions": 1, "out_bytes": 4, "write": True}
    assert rates.noise_s(10**9, torch.bfloat16, "normal", **call) == pytest.approx(5 * 1.0 + 4 * 0.25)
    assert rates.noise_s(10**9, torch.float32, "rademacher", **call) == pytest.approx(5 * 0.1 + 3 * 0.5)

    asked = request("--dtype=float32")
    whole = Planner(asked, machine).predict()
    assert whole.row["up_bytes"] == 0 and whole.row["rank_bytes"]["slots"] == 0  # a CPU uses memory in place
    slower = Planner(asked, machine_from(measured_cpu(2.0))).predict()
    assert slower.played.step_s == pytest.approx(2 * whole.played.step_s, rel=0.01)
    asked = request("--dtype=float32", "--weights=disk")
    streamed = Planner(asked, machine).predict()
    assert streamed.played.step_s >= 0.999 * whole.played.step_s and streamed.row["up_bytes"] > 0
    assert streamed.row["host_bytes"] < whole.row["host_bytes"] and streamed.row["disk_bytes"] > 0
    two = Planner(asked, machine).predict(MeshShape(2, 1)).row
    assert two["host_bytes"] == 2 * two["rank_bytes"]["total"]
    asked = request("--dtype=float32", "--weights=host")
    sliced = Planner(asked, machine).predict(MeshShape(2, 1), sliced=True).row
    assert sliced["up_bytes"] > 0 and sliced["gather_bytes"] > 0


def test_a_file_that_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"distzo2/measure\.json: No such file .*: run distzo2 measure first"):
        find_machine("this")
    path = tmp_path / "m.json"
    for text, message in (
        ("{", "is no measurement"),
        ("[]", "is no measurement"),
        ('{"format": "distzo2-measure/2"}', r"/2; distzo2-measure/3 was expected: run distzo2 measure again"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            find_machine(str(path))


# ---- meshes ---------------------------------------------------------------------------------------------------------


def test_possible_meshes() -> None:
    for options, meshes in (
        (["--nproc=8"], [(1, 8), (2, 4), (4, 2)]),
        (["--nproc=4", "--micro-batches=2"], [(2, 2), (4, 1)]),
    ):
        _, *rows = (plan.row for plan in planned("--probes=2", "--slice=off", "--tokens=8", *options))
        assert [(row["pert"], row["data"]) for row in rows] == meshes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel=pert=3"], "pert=3,data=1: 3 ranks share neither 1 perturbations nor their 2 evaluations evenly"),
        (["--parallel=data=4", "--micro-batches=2"], "2 micro-batches a step cannot be dealt to 4 data ranks"),
        (["--parallel=data=3"], "data=3 does not divide --batch 8"),
        (["--parallel=data=16", "--batch=16"], "is 16 ranks, and 8 x A100"),
        (["--nproc=16"], "is 16 ranks, and 8 x A100"),
        (["--nproc=7"], "no mesh of 7 ranks can share 2 evaluations and a batch of 8: more --probes"),
        (["--parallel=pert=2", "--nproc=4"], "--parallel pert=2 is 2 ranks, and --nproc says 4"),
        (["--parallel=pert=two"], "--parallel pert=two: expected pert=P,data=D"),
        (["--micro-batches=3"], "--micro-batches 3 does not divide --batch 8"),
        (["--probe-batches=own", "--probes=3"], "--probe-batches own: --probes 3 x 1 micro-batches do not divide"),
        (
            ["--probe-batches=own", "--probes=2", "--micro-batches=1", "--parallel=data=4", "--slice=off"],
            "--probe-batches own: 4 ranks cannot share 2 parts of a batch",
        ),
        (["--machine=v100"], "--machine v100: expected a100, h100, h200, this"),
        (["--device=cpu"], "--device cpu: 8 x A100 SXM 80 GB, PCIe 4, NVLink 3 computes on cuda"),
        (["--devices-per-switch=3"], "--devices-per-switch 3 does not divide 8 devices"),
        (
            ["--model=opt-9b"],
            "--model opt-9b: expected a checkpoint's directory, a config.json, a GGUF file, or one of",
        ),
        (["--tokens=4096"], "--tokens 4096: opt-125m has 2048 positions"),
        (["--json=/nowhere/x.json"], "--json /nowhere/x.json: expected a file in a directory that exists"),
        (["--memory-budget=1MiB"], "memory_budget of 1.00 MiB: streaming needs at least"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_slices_share_the_transfers() -> None:
    one, *rest = (plan.row for plan in planned("--nproc=4", "--probes=2"))
    meshes = ("pert=1,data=4", "pert=2,data=2", "pert=4,data=1")
    assert [(p["mesh"], p["slice"]) for p in rest] == [(mesh, sliced) for mesh in meshes for sliced in (False, True)]
    for plan in rest:
        blocks, sliced = one["up_bytes"], plan["slice"]
        assert plan["up_bytes"] == pytest.approx(blocks / 4 if sliced else blocks, rel=0.02)
        assert plan["gather_bytes"] == pytest.approx(0.75 * blocks if sliced else 0, rel=0.02)
        assert plan["host_bytes"] == (1 if sliced else 4) * one["host_bytes"]


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
    assert planned(*better)[-1].played.step_s <= 1.001 * planned(*worse)[-1].played.step_s


def test_a_switch_that_all_share_bounds() -> None:
    alone, shared = (
        planned("--parallel=data=8", "--slice=off", f"--devices-per-switch={n}", "--tokens=16")[-1] for n in (1, 8)
    )
    assert shared.played.step_s > 3 * alone.played.step_s and "transfers" in shared.row["bound"]


def test_memory_that_does_not_fit() -> None:
    machine = GPUS["a100"]
    fits = Planner(request("--model=opt-13b", "--batch=1"), machine).predict().row
    assert fits["fits"] and fits["rank_bytes"]["total"] < machine.device_bytes - CONTEXT_BYTES
    whole = Planner(request("--model=opt-66b", "--batch=1", "--weights=device"), machine).predict().row
    assert not whole["fits"] and "on a device" in whole["misfit"]
    short = Planner(request("--model=opt-13b", "--batch=1", "--host-memory=20GB"), machine).predict().row
    assert not short["fits"] and short["misfit"].endswith(" of 18.63 GiB on the host")


@pytest.mark.parametrize("options", [[], ["--probes=2", "--parallel=data=2", "--slice=on"]])
def test_computed_in_another_dtype(options: list[str]) -> None:
    """Copies and lanes are those of the compute dtype, what is stored and moved that of the stored one."""
    halves, whole = (planned(*options, f"--dtype={dtype}")[-1] for dtype in ("bfloat16", "float32"))
    both, fast = (
        planned(*options, "--dtype=bfloat16", "--compute-dtype=float32", *tf32)[-1] for tf32 in ([], ["--tf32"])
    )
    rank, stored, computed = (one.row["rank_bytes"] for one in (both, halves, whole))
    assert rank["residents"] == stored["residents"] and rank["slots"] == stored["slots"]
    assert rank["scratch"] == computed["scratch"] == 2 * stored["scratch"] and rank["lanes"] == computed["lanes"]
    for way in ("up_bytes", "down_bytes", "gather_bytes", "host_bytes"):
        assert both.row[way] == pytest.approx(halves.row[way], rel=0.02)
    assert halves.played.step_s <= fast.played.step_s < both.played.step_s


def test_what_auto_computes_in() -> None:
    """float32 where a CPU's products in 16 bits are no faster; TF32 is a GPU's."""
    slow, fast, half = measured_cpu(), measured_cpu(), request("--dtype=bfloat16")
    fast["matmul"][1]["flop_per_s"] *= 2
    assert Planner(half, machine_from(slow)).compute_dtype == torch.float32
    assert Planner(half, machine_from(fast)).compute_dtype is Planner(half, GPUS["a100"]).compute_dtype is None
    with pytest.raises(UsageError, match="--tf32: made, 2 threads computes on a CPU"):
        Planner(request("--tf32"), machine_from(slow))


# ---- a part is trained ----------------------------------------------------------------------------------------------

PARTS = [
    [], ["--peft=lora", "--lora-r=4"], ["--peft=prefix"], ["--train-only=last:2"], ["--train-only=*norm*"],
    ["--peft=lora", "--lora-targets=all-linear", "--lora-r=32"],  # not small beside its block
    ["--store=affine4", "--peft=lora", "--lora-r=4"], ["--store=affine8"], ["--store=table4", "--tune=gain"],
]  # fmt: skip


@pytest.mark.usefixtures("own_directory")
@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_a_run_measures_what_was_planned(files, part: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and what is written to the byte; transfers but for those that the first and last step cut."""
    sizes, run_to_end = {}, TrainLoop.run_to_end

    def run(loop: TrainLoop) -> None:
        run_to_end(loop)
        kept = runtime_of(loop.model).kept
        sizes.update(runtime_of(loop.model).stats(), disk_bytes=sum(copy.num_bytes for copy in kept.copies))

    monkeypatch.setattr(TrainLoop, "run_to_end", run)
    monkeypatch.setattr(TrainLoop, "_look_at_codes", lambda loop: None)  # which reads blocks between steps
    assert finetune(files, "--weights=disk", "--steps=20", *part) == 0
    made = Path(
        "out/adapter/adapter_model.safetensors" if "--peft" in str(part) else "out/checkpoint/model.safetensors"
    )
    planner = Planner(
        request(f"--model={files.model}", "--weights=disk", "--batch=4", "--tokens=9", *part), GPUS["a100"]
    )
    plan = planner.predict().row
    model = planner.models[4]
    for name, key in (("residents", "resident_bytes"), ("slots", "slot_bytes"), ("scratch", "scratch_bytes")):
        assert plan["rank_bytes"][name] == sizes[key], name
    assert plan["disk_bytes"] == sizes["disk_bytes"]
    assert model.saved_bytes == sum(tensor.nbytes for tensor in load_file(made).values())
    steps = [line for line in read_metrics("out/metrics.jsonl") if line["kind"] == "step"][2:]
    block = max(unit.num_bytes for unit in model.units if not unit.resident)
    for way in (
        "up",
        "down",
    ):  # a block in each of three slots may be on its way when counting begins, and when it ends
        assert abs(sum(step[f"bytes_{way}"] for step in steps) - len(steps) * plan[f"{way}_bytes"]) <= 3 * block
    if part and "--lora-r=32" not in part and part != ["--store=affine8"]:
        assert plan["down_bytes"] == (2 * block if "last" in part[0] else 0)


def test_a_frozen_base_is_only_read() -> None:
    """An adapter has the uploads of the whole model, and neither downloads nor noise; lanes share one clean copy."""
    whole, lora = (planned("--weights=disk", *part)[0].row for part in ([], ["--peft=lora"]))
    assert lora["up_bytes"] == pytest.approx(whole["up_bytes"], rel=0.01) and lora["down_bytes"] == 0
    assert lora["noise_s"] < 0.1 * whole["noise_s"] and lora["step_s"] < 0.8 * whole["step_s"]
    assert lora["rank_bytes"]["scratch"] < 0.1 * whole["rank_bytes"]["scratch"]


def test_a_packed_base_moves_a_quarter_and_is_decoded_once() -> None:
    """At the rates of memory, which is said, or at those that were measured."""
    plain, packed = (planned("--peft=lora", *store)[0] for store in ([], ["--store=affine4"]))
    assert 0.28 < packed.row["up_bytes"] / plain.row["up_bytes"] < 0.29 and packed.row["down_bytes"] == 0
    decoded = [t for t in packed.played.tasks if t.kind == "decode"]
    assert len(decoded) % 12 == 0 and packed.row["noise_s"] > plain.row["noise_s"]
    with_rates = measured_cpu() | {"decode": [
        {"device": "cpu", "codes": codes, "dtype": dtype, "weights_per_s": 1e9}
        for codes in ("nibbles", "int8", "int16") for dtype in ("float32", "bfloat16")
    ]}  # fmt: skip
    asked = request("--dtype=bfloat16", "--store=affine4", "--peft=lora", "--weights=disk")
    for result, words in ((measured_cpu(), "at the memory's rate"), (with_rates, "decoded as measured")):
        planner = Planner(asked, machine_from(result))
        prediction = planner.predict()
        assert any(words in text for text in to_json(planner, [prediction])["machine"]["assumptions"])
    block = next(t for t in prediction.played.tasks if t.kind == "decode")
    assert block.seconds == pytest.approx(12 * 768**2 / 1e9 + planner.machine.rates.host.materialize_s)


def test_slices_of_codes_keep_their_scales_twice() -> None:
    plans = planned("--nproc=2", "--store=affine8", "--write-every=3")
    one, whole, sliced, *_ = (plan.row["host_bytes"] for plan in plans)
    assert whole == 2 * one and 1.05 * one < sliced < 1.06 * one
    with pytest.raises(UsageError, match="--store affine4: codes of 4 bits are not trained"):
        PlanOptions(model="opt-125m", store="affine4")


def test_the_memory_table() -> None:
    asked = parse(["plan", "--table"])[1]
    head, _, *lines = memory_table(asked, ["opt-125m"])
    assert head.count("|") == lines[0].count("|") == 9 and len(lines) == 1
    with pytest.raises(UsageError, match="--model is missing"):
        PlanOptions()


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
        "name": "opt-125m", "dtype": "float16", "packed": [], "compute_dtype": "float16", "elements": 125239296,
        "bytes": result["model"]["bytes"], "seen_bytes": result["model"]["bytes"], "units": 15, "blocks": 12,
        "largest_copy": {"unit": "model.decoder.embed_tokens", "bytes": 50272 * 768 * 2},
        "trained": None, "trained_elements": 125239296, "saved_bytes": 2 * 125239296,
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


def test_the_command_says_what_it_computes_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--compute-dtype=float32"]) == 0
    lines = capsys.readouterr().out
    assert (
        "float16 computed in float32, 0.125 G" in lines and "MiB (float32: 2 x the stored; 147 MiB each, of " in lines
    )
    assert main([*SMALL]) == 0
    lines = capsys.readouterr().out
    assert "computed as stored; finetune" in lines and "float32: 2 x" not in lines


def test_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["mesh"] == "one device"
    numbers = {0.012345: "0.01235", 219.04: "219", 999.96: "1000", 74741.3: "74741", 1.5e6: "1500000"}
    assert [significant(n) for n in numbers] == list(numbers.values())
