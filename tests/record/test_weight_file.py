"""The weight file: usable blocks lead to the same bits as the whole journal, others are reported and never used."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import random
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import fake_streams
import pytest
import torch
from same_bits import assert_same_tensors
from torch import nn

import distzo2
from distzo2.record import weight_file
from distzo2.record.line import decode_line, encode_line
from distzo2.record.weight_file import MAX_RECORD_BYTES, Copier
from distzo2.record.writer import JournalWriter
from distzo2.weights.units import Unit
from distzo2_core import BlockFile

IDS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """Blocks of two dtypes, one that no forward enters, one that is frozen, and a weight without elements."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embedding = nn.Embedding(32, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5))
            self.head = nn.Linear(8, 32, bias=False)
            self.unused = nn.Linear(8, 8)
        self.embedding.empty = nn.Parameter(torch.zeros(0))
        self.blocks[1].to(torch.bfloat16)
        self.blocks[2].requires_grad_(False)
        self.blocks[3][0].scale = nn.Parameter(torch.ones(3, dtype=torch.float16))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x.to(block[0].weight.dtype)).float()
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def place(run: Path, weights: str, device: str = "cpu", log=None, every=3, pace=1.0, **options) -> nn.Module:
    run.mkdir(exist_ok=True)
    kept = distzo2.WeightFile(run / "weights.dzo2", run / "journal", every, pace=pace, log=log or (lambda line: None))
    return distzo2.offload(Mixed(), device=device, weights=weights, weight_file=kept, **options)


def optimizer(model: nn.Module, run: Path, resume: bool = False, fsync_every: int = 1) -> distzo2.ZOSGD:
    return distzo2.ZOSGD(
        model, lr=1e-2, seed=3, journal=run / "journal", resume=resume, weight_decay=0.1, fsync_every=fsync_every
    )


def copier_of(model: nn.Module) -> Copier:
    return distzo2.runtime_of(model).kept._copier


def train(model: nn.Module, opt: distzo2.ZOSGD, until: int) -> None:
    ids = IDS.to(distzo2.runtime_of(model).device)
    while opt.step_count < until:
        opt.step(lambda: model(ids))
        time.sleep(0.002)  # so that the copier's thread has its turn


def train_until_copied(model: nn.Module, opt: distzo2.ZOSGD, num_rounds: int = 2) -> None:
    """Trains until every unit was copied `num_rounds` times, however slow the disk is."""
    copier = copier_of(model)
    while copier.num_rounds < num_rounds or copier.in_round:
        train(model, opt, opt.step_count + 1)
        if opt.step_count > 100 and copier._writing:
            concurrent.futures.wait([copier._writing], timeout=60)
        assert opt.step_count < 2000


def made(run: Path, weights: str, device: str = "cpu", more: int = 4, **options) -> int:
    """Makes a run that has been copied, with `more` steps after that; returns its number of steps."""
    model = place(run, weights, device, **options)
    opt = optimizer(model, run)
    train_until_copied(model, opt)
    train(model, opt, opt.step_count + more)
    close(model, opt)
    return opt.step_count


def close(model: nn.Module, opt: distzo2.ZOSGD) -> None:
    opt.close()
    distzo2.runtime_of(model).close()


def undisturbed(path: Path, steps: int) -> dict[str, torch.Tensor]:
    path.mkdir()
    model = distzo2.offload(Mixed(), weights="host")
    opt = optimizer(model, path)
    train(model, opt, steps)
    opt.close()
    return model.state_dict()


@pytest.mark.parametrize(
    ("begun", "resumed", "options"),
    [
        ("host", "host", {}),
        ("host", "disk", {}),
        ("disk", "host", {}),
        ("disk", "disk", {"write_every": 3}),
        ("disk", "device", {}),
        ("device", "disk", {}),
    ],
)
def test_resumes_to_the_same_bits(tmp_path, begun, resumed, options, device):
    run, said = tmp_path / "run", []
    steps = made(run, begun, device, **options)
    model = place(run, resumed, device, said.append)
    assert any(line.startswith("from weights.dzo2:") for line in said)
    opt = optimizer(model, run, resume=True)
    kept = distzo2.runtime_of(model).kept
    trained = {unit.index for unit in distzo2.runtime_of(model).units if unit.trainable}
    assert trained <= kept.versions.keys() and all(0 < kept.versions[index] <= steps for index in trained)
    train(model, opt, steps + 3)
    opt.close()
    if device == "cpu":
        assert_same_tensors(model.state_dict(), undisturbed(tmp_path / "undisturbed", steps + 3))
    else:  # another device has other losses: the journal is what leads to these weights
        again = distzo2.offload(Mixed(), device=device, weights="host")
        optimizer(again, run, resume=True).close()
        assert_same_tensors(model.state_dict(), again.state_dict())


def test_weights_on_disk_resume_without_their_base(tmp_path, monkeypatch):
    """Nothing is written to the file while the run is resumed, and nothing of the module is read."""
    steps = made(tmp_path, "disk")
    before = (tmp_path / "weights.dzo2").stat().st_mtime_ns
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    model = place(tmp_path, "disk")
    monkeypatch.undo()
    assert (tmp_path / "weights.dzo2").stat().st_mtime_ns == before
    kept = distzo2.runtime_of(model).kept
    assert kept.gave_all(distzo2.runtime_of(model).weights)
    opt = optimizer(model, tmp_path, resume=True)
    train(model, opt, steps + 2)
    opt.close()
    assert_same_tensors(model.state_dict(), undisturbed(tmp_path / "undisturbed", steps + 2))


@pytest.mark.parametrize("begun", ["host", "disk"])
def test_what_was_never_copied_comes_from_the_base(tmp_path, begun):
    """Blocks of a new file are zeros at version 0, and so may a unit that streams now not have been copied before."""
    run = tmp_path / "run"
    model = place(run, begun, every=10**6)
    opt = optimizer(model, run)
    train(model, opt, 5)
    close(model, opt)
    model = place(run, "disk")
    opt = optimizer(model, run, resume=True)
    train(model, opt, 8)
    opt.close()
    assert_same_tensors(model.state_dict(), undisturbed(tmp_path / "undisturbed", 8))


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_an_optimizer_that_does_not_resume_the_files_run_is_refused(tmp_path, weights):
    steps = made(tmp_path / "run", weights)
    for options in ({}, {"journal": tmp_path / "other"}):
        model = place(tmp_path / "run", weights)
        with pytest.raises(distzo2.DistZO2Error, match="resume that journal"):
            distzo2.ZOSGD(model, lr=1e-2, seed=3, weight_decay=0.1, **options)
        distzo2.runtime_of(model).close()
    model = place(tmp_path / "run", weights)
    opt = optimizer(model, tmp_path / "run", resume=True)
    opt.close()
    assert_same_tensors(model.state_dict(), undisturbed(tmp_path / "undisturbed", steps))


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_weights_replaced_before_the_run_is_resumed_end_the_files_use(tmp_path, weights):
    steps = made(tmp_path / "run", weights)
    model = place(tmp_path / "run", weights)
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    with pytest.raises(distzo2.DistZO2Error, match="as they were handed over"):
        optimizer(model, tmp_path / "run", resume=True)
    distzo2.runtime_of(model).close()
    model = place(tmp_path / "run", weights)
    opt = optimizer(model, tmp_path / "run", resume=True)
    opt.close()
    assert_same_tensors(model.state_dict(), undisturbed(tmp_path / "undisturbed", steps))


def test_a_file_that_was_being_made_is_made_again(tmp_path):
    (tmp_path / "weights.dzo2").write_bytes(bytes(8192))
    close(model := place(tmp_path, "disk"), optimizer(model, tmp_path))
    assert (tmp_path / "weights.dzo2.json").exists()


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("weights", ["host", "disk"])
@pytest.mark.parametrize(
    "kind", ["flip", "cut", "grown", "missing", "no record", "bad record", "format", "other slices"]
)
def test_what_is_damaged_is_reported_and_made_again(tmp_path, weights, kind):
    run, said = tmp_path / "run", []
    steps = made(run, weights)
    path, record = run / "weights.dzo2", run / "weights.dzo2.json"
    rng = random.Random(4)
    if kind == "flip":  # some of these hit a block that is used
        for at in range(4096, path.stat().st_size, 4096):
            flip(path, at + rng.randrange(64))
    elif kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "grown":
        os.truncate(path, path.stat().st_size + 1)
    elif kind == "missing":
        path.unlink()
    elif kind == "no record":
        record.unlink()
    elif kind == "bad record":
        flip(record, 9)
    else:
        line = decode_line(record.read_bytes(), MAX_RECORD_BYTES)
        line |= {"format": 99} if kind == "format" else {"rows": [[row[0], 0, 256] for row in line["rows"]]}
        record.write_bytes(encode_line(line, MAX_RECORD_BYTES))
    model = place(run, weights, log=said.append)
    opt = optimizer(model, run, resume=True)
    train(model, opt, steps + 3)
    close_later = model.state_dict()
    opt.close()
    assert_same_tensors(close_later, undisturbed(tmp_path / "undisturbed", steps + 3))
    if kind not in ("grown", "no record"):
        assert any("made from the base again" in line and "weights.dzo2" in line for line in said), said


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_a_block_that_is_newer_than_the_journal_is_not_used(tmp_path, weights):
    """Not now, and not when the journal has as many steps again, which may be others."""
    run, said = tmp_path / "run", []
    made(run, weights)
    lines = (run / "journal").read_bytes().splitlines(True)
    (run / "journal").write_bytes(b"".join(lines[:3]))
    model = place(run, weights, log=said.append, every=0)
    assert any("updates, and the journal 2" in line for line in said)
    opt = optimizer(model, run, resume=True)
    assert opt.step_count == 2
    train(model, opt, 60)
    close(model, opt)
    said.clear()
    model = place(run, weights, log=said.append)
    assert not any("made from the base" in line for line in said)
    opt = optimizer(model, run, resume=True)
    opt.close()
    assert_same_tensors(model.state_dict(), undisturbed(tmp_path / "undisturbed", 60))


def test_no_copy_is_ahead_of_the_durable_journal(tmp_path, monkeypatch):
    """A unit waits to be written while the journal's lines are written and not synced."""
    go, sync = threading.Event(), JournalWriter._sync

    def waits(self):
        assert go.wait(60)
        sync(self)

    monkeypatch.setattr(JournalWriter, "_sync", waits)
    model = place(tmp_path, "host")
    opt = optimizer(model, tmp_path, fsync_every=10**6)
    train(model, opt, 12)
    copier = copier_of(model)
    assert not copier._writing.done() and opt.journal.durable == 0
    sizes = [copy.num_bytes for copy in distzo2.runtime_of(model).kept.copies]
    assert all(distzo2.runtime_of(model).kept.file.version(block) == 0 for block in range(len(sizes)))
    go.set()
    train_until_copied(model, opt)
    close(model, opt)
    file = BlockFile(str(tmp_path / "weights.dzo2"), sizes, create=False)
    assert min(file.version(block) for block in range(len(sizes))) > 0


def test_a_file_of_another_run_is_refused(tmp_path):
    made(tmp_path / "theirs", "host")
    before = (tmp_path / "theirs/weights.dzo2").read_bytes()
    for journal in (tmp_path / "journal", tmp_path / "other/journal"):
        with pytest.raises(distzo2.DistZO2Error, match=r"weights\.dzo2: holds the weights of another run"):
            distzo2.offload(Mixed(), weight_file=distzo2.WeightFile(tmp_path / "theirs/weights.dzo2", journal))
    assert (tmp_path / "theirs/weights.dzo2").read_bytes() == before


def test_a_file_in_use_is_refused(tmp_path):
    model = place(tmp_path, "disk")
    opt = optimizer(model, tmp_path)
    train(model, opt, 2)
    with pytest.raises(distzo2.DistZO2Error, match="is in use by another run"):
        place(tmp_path, "disk")
    close(model, opt)


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_replaced_weights_are_not_resumed(tmp_path, weights):
    model = place(tmp_path, weights)
    opt = optimizer(model, tmp_path)
    train_until_copied(model, opt)
    with distzo2.edit(model), torch.no_grad():
        model.head.weight.mul_(2.0)
    assert not (tmp_path / "weights.dzo2.json").exists()
    close(model, opt)
    again = place(tmp_path, weights)
    assert not distzo2.runtime_of(again).kept.versions
    steps = opt.step_count
    optimizer(again, tmp_path, resume=True).close()
    assert_same_tensors(again.state_dict(), undisturbed(tmp_path / "undisturbed", steps))


def test_a_copy_that_cannot_be_made_is_reported_and_the_run_continues(tmp_path, monkeypatch):
    said: list[str] = []
    model = place(tmp_path, "host", log=said.append)
    opt = optimizer(model, tmp_path)
    sync = opt.journal.sync
    monkeypatch.setattr(opt.journal, "sync", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    while not said:
        train(model, opt, opt.step_count + 1)
        if opt.step_count > 100 and copier_of(model)._writing:
            concurrent.futures.wait([copier_of(model)._writing], timeout=60)
        assert opt.step_count < 2000
    assert "a copy of the weights was given up: " in said[0] and "No space left" in said[0]
    monkeypatch.setattr(opt.journal, "sync", sync)
    train_until_copied(model, opt, copier_of(model).num_rounds + 1)
    close(model, opt)


def test_a_run_that_is_dropped_lets_go_of_everything(tmp_path):
    """Without close(): model, file and threads, and the file is of use."""
    before = threading.enumerate()

    def use() -> weakref.ref:
        model = place(tmp_path, "disk")
        opt = optimizer(model, tmp_path)
        train_until_copied(model, opt)
        return weakref.ref(distzo2.runtime_of(model))

    runtime = use()
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert "distzo2-weight-file_0" in {thread.name for thread in threads}
    deadline = time.monotonic() + 60  # it may be in the middle of the next copy
    while runtime() is not None and time.monotonic() < deadline:
        gc.collect()
    assert runtime() is None
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), thread.name
    model = place(tmp_path, "host")
    assert distzo2.runtime_of(model).kept.versions
    optimizer(model, tmp_path, resume=True).close()


def test_minutes_and_what_is_out_of_range(tmp_path):
    with pytest.raises(distzo2.DistZO2Error, match="a pace above 0"):
        distzo2.WeightFile(tmp_path / "w", tmp_path / "j", pace=0.0)
    kept = distzo2.WeightFile(tmp_path / "w.dzo2", tmp_path / "journal", 0, minutes=1e-6, pace=1.0)
    model = distzo2.offload(Mixed(), weight_file=kept)
    opt = optimizer(model, tmp_path)
    train_until_copied(model, opt)
    close(model, opt)
    with pytest.raises(AttributeError, match="WeightFile"):
        _ = distzo2.Snapshots


def test_a_finished_run_removes_its_file(tmp_path):
    model = place(tmp_path, "disk")
    opt = optimizer(model, tmp_path)
    train(model, opt, 3)
    distzo2.runtime_of(model).kept.done()
    close(model, opt)
    assert not list(tmp_path.glob("weights*"))


def test_a_pace_is_kept(tmp_path):
    """No unit is copied while what the copies before it took is not earned."""
    model = place(tmp_path, "host", pace=1e-9)
    opt = optimizer(model, tmp_path)
    copier, kept = copier_of(model), distzo2.runtime_of(model).kept

    def num_copied() -> int:
        concurrent.futures.wait([copier._writing] if copier._writing else [])
        return sum(kept.file.version(block) > 0 for block in range(len(kept.copies)))

    train(model, opt, 5)
    assert num_copied() == 1 and copier.num_rounds == 1
    for seconds, pays in ((1e-3, False), (1e9, True)):  # of a step that earns too little, and enough
        kept.step_done(distzo2.runtime_of(model).access, opt.step_count, seconds)
        train(model, opt, opt.step_count + 5)
        assert (num_copied() > 1) is pays
    close(model, opt)


def test_a_gpu_copies_beside_its_lanes_and_pays_for_the_link(tmp_path, monkeypatch):
    cuda = fake_streams.install(monkeypatch)
    pool = SimpleNamespace(tensor=lambda block: torch.zeros(512, dtype=torch.uint8))
    monkeypatch.setattr(weight_file, "HostPool", lambda sizes, **options: pool)
    unit = Unit(0, "unit", [], [], resident=False)
    unit.num_bytes = 512
    options = distzo2.WeightFile(tmp_path / "weights", tmp_path / "journal", pace=0.5)
    file = BlockFile(str(tmp_path / "weights"), [512], durable=True)
    weights = SimpleNamespace(device=torch.device("cuda:1"), units=[unit], host_memory=None)
    copier = Copier(options, file, {0: 0}, None, weights)
    copier.begin_round()
    buffer = torch.full((512,), 7, dtype=torch.uint8)
    assert copier.offer(unit, buffer, 1) is None  # nothing is earned yet

    copier.step_done(None, 1, seconds=0.2)
    computed = cuda.work()
    reader = copier.offer(unit, buffer, 2)
    assert reader is not cuda.compute and reader.is_behind(computed)
    assert cuda.compute.clock == {cuda.compute: 1}  # waits for nothing
    copier.close()
    assert copier._account == pytest.approx(0.1 - 0.25, abs=0.05)  # of the two, in seconds
    assert file.version(0) == 2
    file.close()
