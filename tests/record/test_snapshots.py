"""Snapshots: whole ones lead to the same bits as the whole journal, damaged ones are told and never used."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from same_bits import assert_same_tensors
from torch import nn

import distzo2
from distzo2.record import snapshot_writer
from distzo2.record.line import decode_line, encode_line
from distzo2.record.snapshot import HIDDEN, MANIFEST, MAX_MANIFEST_BYTES, Snapshots, snapshots_in
from distzo2.record.snapshot_resume import find_snapshot
from distzo2.record.snapshot_writer import Pace, SnapshotWriter
from distzo2.record.writer import JournalWriter

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


def place(tmp_path: Path, weights: str, device: str = "cpu", **options) -> nn.Module:
    return distzo2.offload(Mixed(), device=device, weights=weights, directory=tmp_path / "blocks", **options)


def optimizer(
    model: nn.Module, run: Path, resume: bool = False, log=None, fsync_every: int = 1, **snapshots
) -> distzo2.ZOSGD:
    if snapshots:
        snapshots = {"pace": 1.0, "log": log or (lambda line: None), **snapshots}
    options = Snapshots(run / "snapshots", **snapshots) if snapshots else None
    return distzo2.ZOSGD(
        model, lr=1e-2, seed=3, journal=run / "journal", resume=resume, snapshots=options, weight_decay=0.1,
        fsync_every=fsync_every,
    )  # fmt: skip


def train(model: nn.Module, opt: distzo2.ZOSGD, until: int) -> None:
    ids = IDS.to(distzo2.runtime_of(model).device)
    while opt.step_count < until:
        opt.step(lambda: model(ids))
        if opt._snapshots is not None:  # so that the thread has its turn, and a snapshot spans a few steps
            time.sleep(0.002)


def run_until_snapshots(tmp_path: Path, weights: str, device: str = "cpu", num: int = 1, **options) -> tuple[Path, int]:
    """Trains until `num` snapshots were made, and four steps more; returns the run and its number of steps."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    model = place(tmp_path, weights, device, **options)
    opt = optimizer(model, run, every=7, keep=2)
    while opt._snapshots.figures.num_made < num:
        train(model, opt, opt.step_count + 1)
        assert opt.step_count < 2000
    train(model, opt, opt.step_count + 4)
    steps = opt.step_count
    opt.close()
    distzo2.runtime_of(model).close()
    return run, steps


def undisturbed(tmp_path: Path, steps: int) -> dict[str, torch.Tensor]:
    path = tmp_path / "undisturbed"
    path.mkdir()
    model = place(path, "host")
    opt = optimizer(model, path)
    train(model, opt, steps)
    opt.close()
    return model.state_dict()


@pytest.mark.parametrize(
    ("made", "resumed", "options"),
    [
        ("host", "host", {}),
        ("host", "disk", {}),
        ("disk", "host", {}),
        ("disk", "disk", {"write_every": 3}),
        ("disk", "device", {}),
        ("device", "disk", {}),
    ],
)
def test_goes_on_with_the_same_bits(tmp_path, made, resumed, options, device):
    run, steps = run_until_snapshots(tmp_path, made, device, **options)
    said = []
    model = place(tmp_path, resumed, device)
    opt = optimizer(model, run, resume=True, log=said.append, every=0)
    assert any("went on from the snapshot" in line for line in said)
    runtime = distzo2.runtime_of(model)
    versions = {runtime.weights.copies[u.index].version for u in runtime.access.trained_units()}
    assert min(versions) > 0 and max(versions) <= steps
    train(model, opt, steps + 3)
    opt.close()
    if device == "cpu":
        assert_same_tensors(model.state_dict(), undisturbed(tmp_path, steps + 3))
    else:  # another device has other losses: the journal is what leads to these weights
        again = place(tmp_path, "host", device)
        optimizer(again, run, resume=True).close()
        assert_same_tensors(model.state_dict(), again.state_dict())


def test_a_snapshot_spans_steps_and_leaves_frozen_units_out(tmp_path):
    run, _ = run_until_snapshots(tmp_path, "host")
    newest = snapshots_in(run / "snapshots")[0]
    manifest = json.loads((newest / MANIFEST).read_text())
    names = [unit["name"] for unit in manifest["units"]]
    assert "blocks.2" not in names and "unused" in names and "blocks.1" in names
    assert len({unit["version"] for unit in manifest["units"]}) > 1  # fuzzy
    assert all(unit["version"] <= manifest["journal"]["steps"] for unit in manifest["units"])
    mixed = load_file(newest / manifest["units"][names.index("blocks.3")]["file"])  # any reader of safetensors can
    assert mixed["blocks.3.0.scale"].dtype == torch.float16 and mixed["blocks.3.0.weight"].shape == (8, 8)


def test_older_snapshots_go_when_a_newer_one_is_whole(tmp_path, monkeypatch):
    run, steps = run_until_snapshots(tmp_path, "host", num=3)
    assert len(snapshots_in(run / "snapshots")) == 2
    before = [p.name for p in snapshots_in(run / "snapshots")]

    def broken(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(snapshot_writer, "write_file", broken)
    said = []
    model = place(tmp_path, "host")
    opt = optimizer(model, run, resume=True, log=said.append, every=7, keep=1)
    while not any("given up" in line for line in said):
        train(model, opt, opt.step_count + 1)
        assert opt.step_count < steps + 1000
    assert [p.name for p in snapshots_in(run / "snapshots")] == before[:1]  # it was found to be whole
    monkeypatch.undo()
    made = opt._snapshots.figures.num_made
    while opt._snapshots.figures.num_made == made:
        train(model, opt, opt.step_count + 1)
    opt.close()
    assert len(list((run / "snapshots").iterdir())) == 1
    assert "manifest.json" in said[-2] or any("manifest.json" in line and "No space" in line for line in said)


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    run, _ = run_until_snapshots(tmp_path, "host")
    newest = snapshots_in(run / "snapshots")[0]
    leftover = run / "snapshots" / f"{HIDDEN}step-00000999-abcd"
    shutil.copytree(newest, leftover)
    model = place(tmp_path, "host")
    opt = optimizer(model, run, resume=True, every=5)
    assert not leftover.exists() and newest.exists()
    opt.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_goes_on_removes_what_a_killed_one_had_no_time_to(tmp_path, damaged):
    """Killed between a new snapshot's name and the removal of the oldest, and no new one is made. One that cannot be
    used takes no other's place."""
    run, _ = run_until_snapshots(tmp_path, "host", num=2)
    newest, older = snapshots_in(run / "snapshots")
    oldest = shutil.copytree(older, older.with_name("step-00000001"))
    if damaged:
        with open(next(newest.glob("*.safetensors")), "r+b") as file:
            file.truncate(100)
    model = place(tmp_path, "host")
    said = []
    opt = optimizer(model, run, resume=True, log=said.append, every=10**6, keep=2)
    expected = [newest, older, oldest] if damaged else [newest, older]
    assert snapshots_in(run / "snapshots") == expected
    assert sorted((run / "snapshots").iterdir()) == sorted(expected)
    opt.close()
    opt = optimizer(place(tmp_path, "host"), run, resume=True, log=said.append, every=10**6, keep=1)
    assert snapshots_in(run / "snapshots") == expected[: 2 if damaged else 1]
    opt.close()
    assert said[-1] == f"went on from the snapshot {(older if damaged else newest).name}"


def test_no_snapshot_is_ahead_of_the_durable_journal(tmp_path, monkeypatch):
    """All units are written while the journal's lines are written and not synced; the name comes when they are."""
    go_on, sync = threading.Event(), JournalWriter._sync
    publishing, publish = threading.Event(), SnapshotWriter._publish

    def waits(self):
        assert go_on.wait(60)
        sync(self)

    def publishes(self, making):
        publishing.set()
        publish(self, making)

    monkeypatch.setattr(JournalWriter, "_sync", waits)
    monkeypatch.setattr(SnapshotWriter, "_publish", publishes)
    model = place(tmp_path, "host")
    opt = optimizer(model, tmp_path, every=2, fsync_every=10**6)
    train(model, opt, 2)
    while not publishing.is_set():
        train(model, opt, opt.step_count + 1)
        assert opt.step_count < 2000
    time.sleep(0.1)
    assert opt.journal.durable == 0 and not snapshots_in(tmp_path / "snapshots")
    go_on.set()
    while not opt._snapshots.figures.num_made:
        train(model, opt, opt.step_count + 1)
        assert opt.step_count < 4000
    assert snapshots_in(tmp_path / "snapshots")
    opt.close()


def test_snapshots_of_another_run_are_left_alone(tmp_path):
    run, _ = run_until_snapshots(tmp_path, "host")
    theirs = snapshots_in(run / "snapshots")
    assert theirs
    model = place(tmp_path, "host")
    journal = tmp_path / "journal"
    for _ in range(2):  # nothing of the first try is in the way of the next
        with pytest.raises(distzo2.DistZO2Error, match="a snapshot of another run"):
            distzo2.ZOSGD(model, lr=1e-2, journal=journal, snapshots=Snapshots(run / "snapshots", every=2))
        assert not journal.exists()
    assert snapshots_in(run / "snapshots") == theirs
    distzo2.ZOSGD(model, lr=1e-2, journal=journal, snapshots=Snapshots(tmp_path / "own", every=2)).close()


def test_a_run_that_is_dropped_lets_go_of_everything(tmp_path):
    """Without close(): model, files and threads, and no one's snapshot is harmed."""
    before = threading.enumerate()

    def use() -> weakref.ref:
        model = place(tmp_path, "disk")
        opt = optimizer(model, tmp_path, every=2)
        while not opt._snapshots.figures.num_made:
            train(model, opt, opt.step_count + 1)
        return weakref.ref(distzo2.runtime_of(model))

    runtime = use()
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert "distzo2-snapshot" in {thread.name for thread in threads}
    deadline = time.monotonic() + 60  # it may be in the middle of the next snapshot
    while runtime() is not None and time.monotonic() < deadline:
        gc.collect()
    assert runtime() is None
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), thread.name
    optimizer(place(tmp_path, "host"), tmp_path, resume=True, every=2).close()


def test_minutes_and_no_journal(tmp_path):
    model = place(tmp_path, "host")
    with pytest.raises(distzo2.DistZO2Error, match="need a journal"):
        distzo2.ZOSGD(model, lr=1e-2, snapshots=Snapshots(tmp_path))
    with pytest.raises(distzo2.DistZO2Error, match="at least 1 kept"):
        Snapshots(tmp_path, keep=0)
    opt = optimizer(model, tmp_path, minutes=1e-6)
    while opt._snapshots.figures.num_made < 2:
        train(model, opt, opt.step_count + 1)
        assert opt.step_count < 2000
    opt.close()


def test_a_pace_is_kept(tmp_path):
    """One unit at a time is taken, and none while what was taken is not earned."""
    pace = Pace(0.1)
    assert not pace.allows()
    pace.earn(1.0)
    assert pace.allows()
    guess = pace.spend(0.5, 1000)
    assert not pace.allows()
    pace.correct(guess, 0.5, 1000)
    for _ in range(9):
        pace.earn(1.0)
    assert not pace.allows()
    pace.earn(1.0)
    assert pace.allows()


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "grown":
        data += b"\0"
    elif kind == "missing":
        path.unlink()
        return
    elif kind == "flip":
        at = rng.randrange(8 * len(data))
        data[at // 8] ^= 1 << (at % 8)
    else:
        begin = rng.randrange(len(data))
        for i in range(begin, min(len(data), begin + 512)):
            data[i] = 0xA5 if data[i] != 0xA5 else 0x5A
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["units"][1].update(file="../../journal"), "'../../journal'"),
        (lambda m: m["units"][1].update(file="/etc/passwd"), "'/etc/passwd'"),
        (lambda m: m["units"][0].update(num_bytes=1 << 60), "1152921504606846976 bytes, where the model has"),
        (lambda m: m["units"][0].update(version=m["journal"]["steps"] + 1), "version of unit-"),
        (lambda m: m["units"][0].update(version=True), "version of unit-"),
        (lambda m: m["units"][0].update(crc32="0x12"), "8 hex digits"),
        (lambda m: m["units"].reverse(), "where the model has"),
        (lambda m: m["units"].pop(), "units, the model has"),
        (lambda m: m.update(seed=4), "a run with seed 4, not 3"),
        (lambda m: m.update(snapshot=2), "format '2', this program knows 1"),
        (lambda m: m.update(snapshot=True), "format 'True'"),
        (lambda m: m.update(more=1), "the manifest: expected"),
        (lambda m: m["journal"].update(steps=1 << 31), "steps of the journal, which has"),
        (lambda m: m["journal"].update(sha256="0" * 64), "are not those it holds"),
        (lambda m: m["journal"].update(steps=m["journal"]["steps"] + 1), "are not those it holds"),
    ],
)
def test_a_manifest_that_is_whole_and_wrong_is_refused(whole_run, change, reason):
    """One whose CRC is right: of another run, of a later program, or by an enemy."""
    run, steps, runtime = whole_run
    manifest = snapshots_in(run / "snapshots")[0] / MANIFEST
    before = manifest.read_bytes()
    record = decode_line(before, MAX_MANIFEST_BYTES)
    change(record)
    manifest.write_bytes(encode_line(record, MAX_MANIFEST_BYTES))
    try:
        found = find_snapshot(run / "snapshots", runtime, run / "journal", steps)
    finally:
        manifest.write_bytes(before)
    assert len(found.reasons) == 1 and reason in found.reasons[0] and "\n" not in found.reasons[0]


def test_links_and_devices_are_no_files_of_a_snapshot(whole_run):
    run, steps, runtime = whole_run
    newest = snapshots_in(run / "snapshots")[0]
    for name in (MANIFEST, "unit-00000.safetensors"):
        path, aside = newest / name, newest / "aside"
        path.rename(aside)
        for put in (lambda p, a: p.symlink_to(a), lambda p, a: os.mkfifo(p), lambda p, a: p.mkdir()):
            put(path, aside)
            found = find_snapshot(run / "snapshots", runtime, run / "journal", steps)
            assert found.path != newest and name in found.reasons[0]
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        aside.rename(path)
    assert find_snapshot(run / "snapshots", runtime, run / "journal", steps).path == newest


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(run, its number of steps, the access to weights that are bound to the same parameters)"""
    path = tmp_path_factory.mktemp("whole")
    run, steps = run_until_snapshots(path, "host", num=2)
    (path / "other").mkdir()
    model = place(path, "host")
    opt = optimizer(model, path / "other")
    yield run, steps, distzo2.runtime_of(model).access
    opt.close()


def num_damages() -> int:
    return int(os.environ.get("DISTZO2_NUM_DAMAGES", "120"))


def test_damage_is_always_found(whole_run, tmp_path):
    run, steps, runtime = whole_run
    older = snapshots_in(run / "snapshots")[1]
    newest = snapshots_in(run / "snapshots")[0]
    whole = tmp_path / "whole"
    shutil.copytree(newest, whole)
    journal = run / "journal"
    rng = random.Random(7)
    assert find_snapshot(run / "snapshots", runtime, journal, steps).path == newest
    for _ in range(num_damages()):
        file = rng.choice(sorted(newest.iterdir()))
        kind = rng.choice(["cut", "flip", "flip", "flip", "stretch", "grown", "missing"])
        damage(file, kind, rng)
        found = find_snapshot(run / "snapshots", runtime, journal, steps)
        assert found.path == older and found.invalid == [newest], (file, kind)
        assert file.name in found.reasons[0] and newest.name in found.reasons[0], (kind, found.reasons)
        shutil.copy(whole / file.name, file)
    assert find_snapshot(run / "snapshots", runtime, journal, steps).path == newest
