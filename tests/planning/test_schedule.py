"""The played schedule: against ones made out by hand, and against what the runtime does."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distzo2
from distzo2.cli.options import PlanOptions
from distzo2.optim.selection import select
from distzo2.planning.machines import GPUS, Duplex, Host
from distzo2.planning.plan import Planner
from distzo2.planning.plan_model import ModelPlan, Part, plan_module
from distzo2.planning.report import read_trace
from distzo2.planning.schedule import Played, Slicing, Task, Work, play, play_steps
from distzo2.run.preflight import widens
from distzo2.streaming.lanes import Emission
from distzo2.streaming.runtime import StreamingRuntime
from distzo2.weights.units import ParamInfo, Unit
from distzo2_core import Term

BLOCKS = 6
NO_HOST = Host(0.0, 0.0, 0.0, 0.0, 0.0)
CLEAN = Emission()
PAIR = [Emission((Term(0, 0, 0, 0, sign),)) for sign in (1e-3, -1e-3)]


class FixedRates:
    """Every lane takes `compute` on a unit; noise `noise` a tensor and unit, of a share of it that share; copies
    `copied` a byte."""

    def __init__(self, compute: float, noise: float = 0.0, host: Host = NO_HOST, copied: float = 0.0) -> None:
        self._compute, self._noise, self.host, self._copied = compute, noise, host, copied

    def part_s(self, part: Part) -> float:
        return self._compute if part.units else 0.0

    def noise_s(self, numel: int, dtype, family, *, terms, emissions, out_bytes, write) -> float:
        return self._noise * (terms + emissions) * numel / 64 + self._copied * out_bytes * numel


def blocks(num: int = BLOCKS, trainable: bool = True) -> list[Unit]:
    """Units of 64 elements, which are 256 bytes."""
    shape = torch.Size([64]), torch.float32, (1,), trainable
    return [Unit(i, f"b{i}", [ParamInfo(i, f"b{i}.w", *shape, nn.Parameter())], [], False) for i in range(num)]


def played(
    compute: float, up: float, down: float = 0.0, *, shared: float = 1.0, lanes: Sequence[Emission] = (CLEAN,),
    trainable: bool = True, noise: float = 0.0, num_blocks: int = BLOCKS, host: Host = NO_HOST, slots: int = 3,
    on_host: bool = False, computed: torch.dtype = torch.float32, copied: float = 0.0, **more,
) -> Played:  # fmt: skip
    """Steps whose transfers take `up` and `down` a block, alone; both ways at once each has `shared` of its speed."""
    units = blocks(num_blocks, trainable)
    for unit in units:
        unit.compute_in({torch.float32: computed})
    parts = [Part((), (), 0, 0, 0, 0), *(Part((u.index,), (), 0, 0, 0, 0) for u in units)]
    rates = [256 / seconds if seconds else math.inf for seconds in (up, down)]
    work = Work(
        ModelPlan("made", torch.float32, units, parts), FixedRates(compute, noise, host, copied), on_host,
        units, slots, Duplex(*rates, 2 * shared * max(rates)), [list(lanes)], 1, "normal", **more,
    )  # fmt: skip
    return play_steps(work)


# ---- tasks ----------------------------------------------------------------------------------------------------------


def test_tasks_that_slow_each_other() -> None:
    up, down = Task("upload", "upload", "a", 4.0), Task("download", "download", "a", 2.0)
    last = Task("upload", "upload", "b", 1.0, (down,))
    play([up, down, last], duplex=(0.5, 0.5))
    assert down.end == pytest.approx(4.0)  # 2 s of work at half speed
    assert up.end == pytest.approx(6.0)  # 2 of 4 s done by then, the rest alone
    assert last.end == pytest.approx(7.0)
    # On a shared processor each of two runs at half speed.
    a, b = Task("compute", "compute", "a", 3.0), Task("side", "update", "b", 1.0)
    play([a, b], pool={"compute", "side"})
    assert (a.end, b.end) == pytest.approx((4.0, 2.0))


# ---- by hand --------------------------------------------------------------------------------------------------------

ONE, BLOCK_BYTES = {"lanes": PAIR[:1]}, 256
FROZEN: dict[str, Any] = {"trainable": False}
BOTH = [False, True]  # a device beside the host, and a host that computes
SLOW_END = Host(0.0, 0.0, 0.0, 0.0, step_s=100.0)
OTHER = [Emission((Term(0, 0, 1, 0, sign),)) for sign in (1e-3, -1e-3)]
BY_HAND = [
    # Two lanes of 4 s on each of 6 blocks; uploads of 1 s are behind them.
    (BOTH, (4.0, 1.0), FROZEN | {"noise": 1.0, "lanes": [CLEAN, CLEAN]},
     {"step_s": 48, "wait_s": 0, "compute": 48, "bytes_up": 6 * BLOCK_BYTES, "bytes_down": 0, "noise_s": 0}),
    # An upload of 3 s for 1 s of compute: the link never rests, and compute waits 2 of 3 s.
    (BOTH, (1.0, 3.0), FROZEN, {"step_s": 18, "upload": 18, "wait_s": 12}),
    # Blocks go back as well: at full speed both ways hide behind each other, at half speed they do not. A slot's round
    # is 3 + 1 + 3 (6 + 1 + 6) s, in which three blocks pass.
    ([False], (1.0, 3.0, 3.0), ONE, {"step_s": 18}),
    ([False], (1.0, 3.0, 3.0), ONE | {"shared": 0.5},
     {"step_s": 36, "bytes_down": 6 * BLOCK_BYTES, "bytes_up": 6 * BLOCK_BYTES}),
    # A slot is released before its block computes: two blocks pass in 3 + 3 s.
    (BOTH, (1.0, 3.0, 3.0), ONE | {"slots": 2}, {"step_s": 18}),
    (BOTH, (3.0, 3.0, 3.0), ONE | {"slots": 2}, {"step_s": 18}),
    # With 4 slots, 3 blocks come in while the host ends the step. In it: 0, 1, 2 at once, 3 when its upload (begun with
    # the step) has ended, 4 and 5 behind theirs, at 6 and 9 s.
    ([False], (1.0, 3.0), FROZEN | {"slots": 4, "host": SLOW_END}, {"step_s": 110}),
    # Gathers of 4 s, one after another; the first of a step waits for the last visit of the one before, 1 s, because
    # only then is the update known.
    ([False], (1.0, 1.0, 1.0), ONE | {"slicing": Slicing(2, 4.0 / BLOCK_BYTES)},
     {"step_s": 25, "gather": 24} | dict.fromkeys(("bytes_up", "bytes_down", "bytes_gathered"), 6 * BLOCK_BYTES / 2)),
    # Without NVLink a block's slice and the rest of it come the same way: 0.5 + 0.5 s a block.
    ([False], (0.1, 1.0), FROZEN | {"slicing": Slicing(2, 0.5 / BLOCK_BYTES, over_link=True)},
     {"step_s": 6, "upload": 6}),
    # A visit's noise: an update's tensor and one for both signs of a probe, whose copies are made by one call; lanes of
    # a sign share it. Two probes: two such tensors (and one of update, since `num_terms` is 1 here).
    ([False], (0.0, 0.0), {"lanes": PAIR, "noise": 1.0}, {"noise_s": 6 * 2}),
    ([False], (0.0, 0.0), {"lanes": [e for e in PAIR for _ in range(3)], "noise": 1.0}, {"noise_s": 6 * 2}),
    ([False], (0.0, 0.0), {"lanes": [*PAIR, *OTHER], "noise": 1.0}, {"noise_s": 6 * 3}),
    # Blocks that all fit stay; each goes back in 3 s, which its next reader waits for.
    ([False], (1.0, 3.0, 3.0), {"lanes": PAIR, "num_blocks": 3},
     {"bytes_up": 0, "bytes_down": 3 * BLOCK_BYTES, "step_s": 9}),
]  # fmt: skip


@pytest.mark.parametrize(("where", "seconds", "more", "expected"), BY_HAND)
def test_by_hand(where: list[bool], seconds: tuple[float, ...], more: dict[str, Any], expected: dict) -> None:
    for on_host in where:
        result = played(*seconds, on_host=on_host, **more)
        found = {key: result.busy_s[key] if key in result.busy_s else getattr(result, key) for key in expected}
        assert found == pytest.approx(expected)


def test_copies_of_two_probes_in_turn_are_not_made_twice() -> None:
    assert played(0.0, 0.0, lanes=[PAIR[0], OTHER[0], PAIR[1], OTHER[1]], noise=1.0).noise_s >= 6 * 3


@pytest.mark.parametrize("slicing", [None, Slicing(2, 1.0 / 256)])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_slot_is_filled_after_its_readers(slicing: Slicing | None, trainable: bool) -> None:
    """And read after it was filled, by what makes the perturbed copies where there are any; blocks are uploaded after
    their downloads."""
    result = played(5.0, 1.0, 1.0, lanes=PAIR, trainable=trainable, slicing=slicing)
    uploads = [t for t in result.tasks if t.kind == "upload"]
    readers = [t for t in result.tasks if t.kind == ("materialize" if trainable else "compute")]
    assert len(uploads) > 12
    for upload in uploads:
        later = [u for u in uploads if u.slot == upload.slot and u.start > upload.start]
        refilled = min((u.start for u in later), default=math.inf)
        mine = [t for t in readers if t.name == upload.name and upload.start < t.start]
        again = min((u.start for u in uploads if u.name == upload.name and u.start > upload.start), default=math.inf)
        for reader in (t for t in mine if t.start < again):
            assert upload.end <= reader.start and reader.end <= refilled
        for down in result.tasks:
            if down.kind == "download" and down.name == upload.name:
                assert down.end <= upload.start or upload.end <= down.start


def test_slices_hide_where_compute_is_long() -> None:
    """The slices' updates take the device from compute: 6 blocks x (10 s + 1/2 x 1 noise tensor of 1 s + 1 of the
    emission). What cannot hide is the first block's update and gather, the next one's update beside them."""
    result = played(10.0, 2.0, 2.0, lanes=PAIR[:1], noise=1.0, slicing=Slicing(2, 2.0 / 256))
    work = 6 * (10.0 + 0.5 + 1.0)
    assert work < result.step_s < work + 0.5 + 2.0 + 0.5
    assert result.noise_s >= 6 * 1.5 - 1e-9


def test_blocks_written_in_turn() -> None:
    every = played(1.0, 1.0, 1.0, lanes=PAIR, noise=0.1)
    third = played(1.0, 1.0, 1.0, lanes=PAIR, noise=0.1, write_every=3)
    assert third.bytes_down == pytest.approx(every.bytes_down / 3)
    # Between writes the updates are made again: (1 + 2 + 3) / 3 update tensors a visit instead of 1.
    assert every.noise_s == pytest.approx(6 * 0.2) and third.noise_s == pytest.approx(6 * 0.3)


@pytest.mark.parametrize("on_host", [False, True])
def test_units_that_convert(on_host: bool) -> None:
    """Modules see copies, clean ones too: a slot is free before its block computes, and the copies' bytes are those of
    their dtype. What nothing changes has one copy for all lanes, and scratch keeps 32 of them. Transfers are as
    without."""
    clean = {"compute": 3.0, "up": 3.0, "down": 3.0, "slots": 2, "on_host": on_host, "lanes": [CLEAN]}
    plain, half = (played(**clean, computed=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.step_s == pytest.approx(6 * 3.0) and plain.step_s > 1.2 * half.step_s
    assert half.bytes_up == pytest.approx(plain.bytes_up) and half.bytes_down == pytest.approx(plain.bytes_down)
    assert half.scratch_bytes > plain.scratch_bytes == 0
    more = {"computed": torch.bfloat16, "copied": 1.0, "on_host": on_host}
    for lanes, copies in (([CLEAN], 1), (PAIR, 2), ([CLEAN, *PAIR], 3)):
        assert played(1.0, 1.0, lanes=lanes, **more).noise_s == pytest.approx(6 * copies * 64 * 2)
    for num, copies in ((40, 40), (32, 0)):
        assert played(1.0, 1.0, lanes=PAIR, trainable=False, num_blocks=num, **more).noise_s == copies * 64 * 2


def test_the_host_may_be_the_slowest() -> None:
    slow = Host(visit_s=0.0, lane_s=2.0, materialize_s=0.0, op_s=0.0, step_s=0.0)
    result = played(1.0, 0.1, trainable=False, host=slow)
    assert result.step_s == pytest.approx(7 * 2.0, rel=0.1)  # 6 blocks and the part before the first
    on_cpu = played(1.0, 0.1, trainable=False, host=slow, on_host=True)
    assert on_cpu.step_s == pytest.approx(7 * 2.0 + 6 * 1.0)


@pytest.mark.parametrize("slicing", [None, Slicing(2, 1.0 / 256)])
def test_no_faster_part_makes_a_step_slower(slicing: Slicing | None) -> None:
    base = {"compute": 2.0, "up": 3.0, "down": 3.0, "noise": 0.5}
    whole = played(lanes=PAIR, slicing=slicing, **base).step_s
    for name in base:
        faster = played(lanes=PAIR, slicing=slicing, **{**base, name: 0.7 * base[name]}).step_s
        assert faster <= whole + 1e-9, name
    assert played(lanes=PAIR, slicing=slicing, slots=4, **base).step_s <= whole + 1e-9


# ---- as the runtime does it -----------------------------------------------------------------------------------------


def tiny(kind: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 131, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 32}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=7, intermediate_size=96))
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=5, ffn_dim=128, word_embed_proj_dim=64))


def partly_frozen(kind: str) -> nn.Module:
    """In bfloat16, with a frozen block, one of which a part is frozen, and two of which a small part is trained."""
    model = tiny(kind).bfloat16()
    for name, param in model.named_parameters():
        frozen = "layers.1." in name or "layers.2.self_attn.q" in name
        param.requires_grad_(not frozen and ("norm" in name or not ("layers.3." in name or "layers.4." in name)))
    return model


def store_at_once(runtime: StreamingRuntime) -> None:
    """Ends a download before the next slot is chosen: the engine passes over one that is still written for a clean one
    released later, so that on a slow disk other blocks stay."""
    ring, release = runtime.weights.ring, runtime.weights.ring.release

    def release_and_flush(*args: Any) -> None:
        release(*args)
        ring.flush()

    ring.release = release_and_flush


def settle(runtime: StreamingRuntime) -> None:
    """Waits for blocks that are prefetched across the end of a step."""
    ring, num_streamed = runtime.weights.ring, sum(copy.streams for copy in runtime.weights.copies)
    while num_streamed and len(ring.engine.present()) < min(ring.num_slots, num_streamed):
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("kind", "estimator", "probes", "batches", "every", "computed"),
    [
        ("llama", "spsa", 2, 2, 1, None),
        ("opt", "spsa", 1, 1, 1, None),
        ("opt", "fzoo", 3, 1, 1, None),
        ("opt", "spsa", 2, 1, 3, None),
        ("llama", "fzoo", 2, 2, 1, torch.float32),
        ("opt", "spsa", 2, 1, 3, torch.float32),
    ],
)
def test_the_runtime_does_the_same(
    kind: str, estimator: str, probes: int, batches: int, every: int, computed: torch.dtype | None, tmp_path: Path
) -> None:
    """Parts, noise and transfers come in the runtime's order; bytes of transfers and memory are equal."""
    make = partly_frozen if computed else tiny
    with torch.device("meta"):
        plan = plan_module(make(kind).eval(), kind, torch.float32, 2, 9, computed)
    request = {"batch": 2 * batches, "tokens": 9, "micro_batches": batches, "probes": probes, "estimator": estimator}
    planner = Planner(PlanOptions(model=kind, weights="disk", write_every=every, **request), GPUS["a100"])
    planner.models[2] = plan
    torch.manual_seed(0)
    model = distzo2.offload(make(kind), weights="disk", directory=tmp_path, write_every=every, compute_dtype=computed)
    assert_as_planned(model, planner, tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Q4_0", {"freeze": "model.norm.weight"}),  # all other norms are trained
        ("Q5_0", {"freeze": "model.norm.weight", "compute_dtype": "float32"}),  # widened: no block lies in the file
        ("raw", {"train_only": "*norm.weight", "store": "affine4"}),
        ("raw", {"store": "affine8", "write_every": 3}),
        ("raw", {"tune": "gain", "store": "affine4", "estimator": "fzoo"}),
        ("Q4_0", {"tune": "gain", "compute_dtype": "float32"}),
        ("raw", {"store": "affine16", "freeze": "*mlp*"}),
    ],
)
def test_packed_weights_are_planned_as_they_run(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny_gguf = pytest.importorskip("tiny_gguf")
    plain = tiny_gguf.make_model("llama", num_hidden_layers=5)
    if kind == "raw":
        plain.bfloat16().save_pretrained(path := tmp_path / "raw")
    else:
        path = tiny_gguf.write(tmp_path / "packed.gguf", "llama", plain, kind, quantized=True)
    asked = PlanOptions(model=str(path), weights="disk", batch=2, tokens=9, probes=2, **options)
    planner = Planner(asked, GPUS["a100"])

    def prepare(model: nn.Module, base: Any) -> tuple[nn.Module, Any]:
        if asked.tune == "gain":
            return distzo2.gains(model, base)
        if asked.train_only or asked.freeze:
            select(model, asked.train_only, asked.freeze)
        return model, base

    model = distzo2.from_pretrained(
        path, weights="disk", directory=tmp_path, store=asked.store, write_every=asked.write_every, prepare=prepare,
        compute_dtype=planner.compute_dtype, widen=widens(asked),
    )  # fmt: skip
    written = [
        c for c in distzo2.runtime_of(model).weights.copies if c.unit.trainable or (c.streams and not c.is_fixed)
    ]
    row = assert_as_planned(model, planner, tmp_path)
    assert row["disk_bytes"] == sum(copy.num_bytes for copy in written)
    assert written and (row["down_bytes"] > 0) == (asked.store == "affine8")  # others are trained in residents alone


def assert_as_planned(model: nn.Module, planner: Planner, tmp_path: Path) -> dict[str, Any]:
    """Holds the first prediction of a plan against steps of the model that was handed over; returns its row."""
    predicted, asked = planner.predict(), planner.request
    runtime, every = distzo2.runtime_of(model), asked.write_every
    opt = distzo2.ZOSGD(model, lr=1e-3, num_probes=asked.probes, estimator=asked.estimator, max_coef=None)
    ids = torch.randint(3, 60, (2, 9))
    closures = [lambda: model(input_ids=ids, labels=ids).loss.float()] * (asked.micro_batches or 1)
    store_at_once(runtime)
    for _ in range(2 * every + 2):
        opt.step(closures)
    settle(runtime)
    runtime.reset_stats()
    runtime.weights.enable_trace()
    steps = max(2, every)
    for _ in range(steps):
        opt.step(closures)
    settle(runtime)
    runtime.weights.ring.flush()
    stats = runtime.stats()
    runtime.weights.save_trace(tmp_path / "trace.json")
    runtime.close()

    for part, key in (("residents", "resident_bytes"), ("slots", "slot_bytes"), ("scratch", "scratch_bytes")):
        assert predicted.row["rank_bytes"][part] == stats[key]
    assert predicted.played.bytes_up == pytest.approx(stats["bytes_up"] / steps)
    assert predicted.played.bytes_down == pytest.approx(stats["bytes_down"] / steps)

    events = read_trace(tmp_path / "trace.json")
    begin, end = predicted.played.steps[-steps][0], predicted.played.steps[-1][1]
    for category in ("compute", "decode", "materialize", "upload"):
        real = [e["name"] for e in events if e["cat"] == category]
        mine = [t for t in predicted.played.tasks if t.kind == category and begin <= t.start < end]
        names = [t.name for t in sorted(mine, key=lambda t: t.start)]
        if category == "upload":  # which transfers a step's end cuts depends on time: compare the order alone
            length = min(len(names), len(real)) - 4
            assert any(real[i : i + length] == names[j : j + length] for i in range(4) for j in range(4))
        else:
            assert names == real, category
    return predicted.row
