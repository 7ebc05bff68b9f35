"""journal verify --run on snapshots: every one that a resumed run would not use is named, with its file and cause."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from audited_runs import SNAPSHOTS, STEPS, copied, flip, make_run, verify
from cli_runs import make_files
from test_snapshots import optimizer, place, run_until_snapshots

import distzo2
from distzo2.cli.snapshot_audit import SnapshotAuditor
from distzo2.record.journal import read_journal
from distzo2.record.line import decode_line, encode_line
from distzo2.record.snapshot import MANIFEST, MAX_MANIFEST_BYTES, SnapshotError, snapshots_in
from distzo2.record.snapshot_resume import find_snapshot
from distzo2.run.audit import MAX_FINDINGS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("snapshots")
    files = make_files(root)
    return SimpleNamespace(files=files, run=make_run(files, root / "run", "--weights=disk"))


@pytest.fixture
def run(made: SimpleNamespace, tmp_path: Path) -> Path:
    return copied(made.run, tmp_path / "run")


def units(snapshot: Path) -> list[Path]:
    return sorted(snapshot.glob("unit-*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Forges a manifest whose CRC is right."""
    record = decode_line(path.read_bytes(), MAX_MANIFEST_BYTES)
    change(record)
    path.write_bytes(encode_line(record, MAX_MANIFEST_BYTES))


def reseal(snapshot: Path) -> None:
    """Makes the manifest say what the files of units hold now."""

    def change(record: dict[str, Any]) -> None:
        for row in record["units"]:
            data = (snapshot / row["file"]).read_bytes()
            row |= {"num_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}

    rewrite(snapshot / MANIFEST, change)


def test_whole_snapshots_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(capsys, run)
    assert found.notes == found.findings == [] and ", 3 snapshots and the checkpoint of step 8" in found.last
    for name in SNAPSHOTS[:2]:
        shutil.rmtree(run / "snapshots" / name)
    assert ", 1 snapshot and the checkpoint" in verify(capsys, run).last
    shutil.rmtree(run / "snapshots")
    assert "snapshot" not in verify(capsys, run).last.split("; checked ")[1]


@pytest.mark.parametrize("weights", ["host", "disk"])
def test_units_of_every_kind_are_in_order(tmp_path: Path, weights: str) -> None:
    """Frozen blocks and parameters, mixed dtypes, a weight without elements: what the model's own resume takes."""
    run, num_steps = run_until_snapshots(tmp_path, weights)
    contents = read_journal(run / "journal")
    header_bytes = (run / "journal").read_bytes().index(b"\n") + 1
    auditor = SnapshotAuditor(contents.header, header_bytes, run / "journal", num_steps)
    (snapshot, *_) = snapshots_in(run / "snapshots")
    assert list(auditor.findings(snapshot)) == list(auditor.strangers(snapshot)) == []
    (frozen,) = (row["name"] for row in contents.header["table"] if row["name"] == "blocks.2.0.weight")
    assert not any(frozen.encode() in path.read_bytes() for path in units(snapshot))
    for path in units(snapshot):
        for at in (0, 9, path.stat().st_size - 1):
            flip(path, at)
            assert [path.name in text for text in auditor.findings(snapshot)] == [True], (path, at)
            flip(path, at)
    assert list(auditor.findings(snapshot)) == []


@pytest.mark.parametrize("seed", range(12))
def test_every_damaged_file_is_named_and_no_other(run: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    """Some damage to several files of several snapshots at once."""
    rng = random.Random(seed)
    files = [path for name in SNAPSHOTS for path in units(run / "snapshots" / name)]
    damaged = sorted(rng.sample(files, rng.randrange(1, 6)))
    for path in damaged:
        size = path.stat().st_size
        kind = rng.choice(["flip", "cut", "longer", "gone", "empty", "link", "directory", "swap"])
        if kind == "flip":
            flip(path, rng.choice([rng.randrange(8), rng.randrange(8, 300), rng.randrange(4096, size), size - 1]))
        elif kind in ("cut", "longer", "empty"):
            os.truncate(path, {"cut": rng.randrange(size), "longer": size + 1, "empty": 0}[kind])
        elif kind == "swap":
            data = bytearray(path.read_bytes())
            data[4096:] = reversed(data[4096:])
            path.write_bytes(data)
        else:
            path.rename(path.with_name("moved"))
            if kind == "link":
                path.symlink_to("moved")
            elif kind == "directory":
                path.mkdir()
    found = verify(capsys, run)
    assert [text.split(": ")[0] for text in found.findings] == [str(path) for path in damaged], found.findings
    whole = {path.parent for path in files} - {path.parent for path in damaged}
    assert f"; {len(whole)} of 3 snapshots are whole" in found.last


def test_every_damaged_manifest_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = [run / "snapshots" / name / MANIFEST for name in SNAPSHOTS]
    flip(manifests[0], 30)
    manifests[1].unlink()
    manifests[2].rename(run / "manifest")
    manifests[2].symlink_to(run / "manifest")
    found = verify(capsys, run)
    assert [text.split(": ")[0] for text in found.findings] == [str(path) for path in manifests]
    assert "CRC" in found.findings[0] and "No such file" in found.findings[1] and "0 of 3 snapshots" in found.last
    manifests[2].unlink()
    os.mkfifo(manifests[2])  # nobody waits for what comes out of it
    assert "not a plain file" in verify(capsys, run).findings[-1]


def test_snapshots_of_other_runs_are_named(
    made: SimpleNamespace, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, rate = (make_run(made.files, tmp_path / option, f"--{option}") for option in ("seed=7", "lr=2e-3"))
    for name, other in zip(SNAPSHOTS, (seed, rate, run / "snapshots" / SNAPSHOTS[0]), strict=True):
        if other != run / "snapshots" / SNAPSHOTS[0]:
            shutil.rmtree(run / "snapshots" / name)
            shutil.copytree(other / "snapshots" / name, run / "snapshots" / name)
    renamed = run / "snapshots" / "step-00000099"
    shutil.copytree(made.run / "snapshots" / SNAPSHOTS[0], renamed)
    found = verify(capsys, run).findings
    where = [str(run / "snapshots" / name / MANIFEST) for name in (SNAPSHOTS[0], SNAPSHOTS[0], SNAPSHOTS[1], renamed)]
    assert [text.split(": ")[0] for text in found] == where
    assert "a run with seed 7, not 0" in found[0] and "are not those it holds" in found[1]
    assert "are not those it holds" in found[2] and "of step 2, which its directory's name does not say" in found[3]


def test_a_snapshot_that_is_ahead_of_the_journal_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "journal.jsonl").read_bytes().splitlines(True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[:4]))
    found = verify(capsys, run)
    ahead = [text for text in found.findings if MANIFEST in text]
    assert [SNAPSHOTS[1] in ahead[0], SNAPSHOTS[2] in ahead[1], len(ahead)] == [True, True, 2]
    assert all("steps of the journal, which has 3 now" in text for text in ahead) and "1 of 3 snapshots" in found.last


def parameters(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def with_header(path: Path, header: object) -> None:
    """The same data behind another header, padded as it was."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", length) + text.ljust(length) + data[8 + length :])


def forged(number: int, snapshot: Path) -> str:
    """A snapshot whose checksums are all right, and what is wrong with it."""
    first, second = units(snapshot)[:2]
    record = parameters(second)
    name = next(name for name in record if name != "__metadata__")
    match number:
        case 0:
            rewrite(snapshot / MANIFEST, lambda record: record["units"].pop())
            return f"{MANIFEST}: no unit holds "
        case 1:
            rewrite(snapshot / MANIFEST, lambda record: record["units"].append(record["units"][-1]))
            return f"{MANIFEST}: unit "
        case 2:
            rewrite(snapshot / MANIFEST, lambda record: record["units"][1].update(file="../../../etc/passwd"))
            return f"{MANIFEST}: unit "
        case 3:
            rewrite(snapshot / MANIFEST, lambda record: record["units"][1].update(file="unit-00001.safetensors/../x"))
            return f"{MANIFEST}: unit "
        case 4:
            shutil.copy(first, second)
            reseal(snapshot)
            return f"{second.name}: parameter "
        case 5:
            with_header(second, {"other" if key == name else key: value for key, value in record.items()})
            reseal(snapshot)
            return f"{second.name}: tensor 'other' is no parameter of the journal's run"
        case 6:
            record[name]["shape"].reverse()
            record[name]["shape"].append(1)
            with_header(second, record)
            reseal(snapshot)
            return f"{second.name}: its header is not that of unit "
        case 7:
            with_header(second, {"__metadata__": {"format": "pt"}})
            reseal(snapshot)
            return f"{second.name}: none of its tensors is trained"
        case 8:
            second.write_bytes(second.read_bytes() + bytes(64))
            reseal(snapshot)
            return f"{second.name}: {second.stat().st_size} bytes, where its parameters make up a file of "
        case 9:
            second.write_bytes(struct.pack("<Q", 1 << 62) + second.read_bytes()[8:])
            reseal(snapshot)
            return f"{second.name}: it announces a header of {1 << 62} bytes, which no unit has"
        case 10:
            with_header(second, b"[" * 4000)
            reseal(snapshot)
            return f"{second.name}: its header is not JSON"
        case 11:
            rewrite(snapshot / MANIFEST, lambda record: record.update(step=5))
            return f"{MANIFEST}: of step 5, which its directory's name does not say"
        case 12:
            rewrite(snapshot / MANIFEST, lambda record: record["units"][0].update(version=STEPS + 1))
            return f"{MANIFEST}: version of "
        case 13:
            rewrite(snapshot / MANIFEST, lambda record: record["software"].update(x="x" * (1 << 20)))
            return f"{MANIFEST}: longer than "
        case 14:
            with_header(second, [name])
            reseal(snapshot)
            return f"{second.name}: its header is not that of unit "
        case 15:
            data = second.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            longer = data[8 : 8 + length].ljust(1 << 20)
            second.write_bytes(struct.pack("<Q", len(longer)) + longer + data[8 + length :])
            reseal(snapshot)
            return f"{second.name}: it announces a header of {1 << 20} bytes, which no unit has"
    raise AssertionError


@pytest.mark.parametrize("number", range(16))
def test_what_is_forged_is_named(run: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    snapshot = run / "snapshots" / SNAPSHOTS[1]
    assert verify(capsys, run).findings == []
    reason = forged(number, snapshot)
    found = verify(capsys, run)
    assert len(found.findings) == 1 and f"{snapshot}/{reason}" in found.findings[0], found.findings
    assert "2 of 3 snapshots are whole" in found.last


def test_what_is_told_is_bounded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = run / "snapshots" / SNAPSHOTS[1]
    row = {"name": "\x1b[2J\u202e", "file": "x\r\n\x9b", "version": 0, "num_bytes": 0, "crc32": "00000000"}
    rewrite(snapshot / MANIFEST, lambda record: record["units"].extend([row] * 105))
    found = verify(capsys, run).findings
    assert len(found) == MAX_FINDINGS + 1 and "\\x1b[2J\\u202e" in found[0]
    assert f"{snapshot}: more than {MAX_FINDINGS} findings" in found[-1]


def test_what_is_no_snapshot_is_told_and_is_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = run / "snapshots"
    (home / ".writing-step-00000008-1f00aa37").mkdir()
    (home / ".writing-old-step-00000001-1f00aa37").mkdir()
    (home / "step-9").mkdir()
    (home / SNAPSHOTS[0] / "notes\x1b[2J.txt").touch()
    found = verify(capsys, run)
    assert found.findings == [] and ", 3 snapshots and " in found.last
    told = [text.removeprefix(f"note: {home}/").split(": ") for text in found.notes]
    assert [name for name, *_ in told] == [
        ".writing-old-step-00000001-1f00aa37",
        ".writing-step-00000008-1f00aa37",
        "step-9",
        f"{SNAPSHOTS[0]}/notes\\x1b[2J.txt",
    ]
    assert "when a run was killed" in told[0][1] and "when a run was killed" in told[1][1]
    for name in SNAPSHOTS[:2]:
        (home / name).rename(run.parent / name)
    (home / SNAPSHOTS[0]).symlink_to(run.parent / SNAPSHOTS[0])
    (home / SNAPSHOTS[1]).touch()
    found = verify(capsys, run).findings
    assert [text.split(": ", 1)[1][:7] for text in found] == ["a link,", "a file,"]


def test_files_are_read_in_pieces(tmp_path: Path) -> None:
    """A unit of 32 MiB, and a manifest of 60: neither is in memory at once."""
    model = distzo2.offload(torch.nn.Sequential(torch.nn.Linear(2048, 4096)), weights="host")
    path = tmp_path / "run"
    path.mkdir()
    opt = optimizer(model, path, every=1)
    while not snapshots_in(path / "snapshots"):
        opt.step(lambda: model(torch.ones(1, 2048)).sum())
    opt.close()
    distzo2.runtime_of(model).close()
    contents = read_journal(path / "journal")
    header_bytes = (path / "journal").read_bytes().index(b"\n") + 1
    (snapshot, *_) = snapshots_in(path / "snapshots")
    auditor = SnapshotAuditor(contents.header, header_bytes, path / "journal", len(contents.entries))

    def looked_at() -> tuple[list[str], int]:
        tracemalloc.start()
        try:
            return list(auditor.findings(snapshot)), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    found, peak = looked_at()
    assert found == [] and units(snapshot)[0].stat().st_size > 32 << 20 and peak < 6 << 20
    os.truncate(snapshot / MANIFEST, 60 << 20)
    (found,), peak = looked_at()
    assert "longer than" in found and peak < 6 << 20


def test_a_table_that_no_model_has_is_named(made: SimpleNamespace) -> None:
    header = read_journal(made.run / "journal.jsonl").header
    for change in ({"dtype": "onnx"}, {"dtype": "load"}, {"name": "\ud800"}, {"shape": [1 << 62] * 32}):
        table = [header["table"][0] | change, *header["table"][1:]]
        if "shape" in change:  # no more than a number: nothing is made of it
            auditor = SnapshotAuditor(header | {"table": table}, 1 << 20, made.run / "journal.jsonl", STEPS)
            assert list(auditor.findings(made.run / "snapshots" / SNAPSHOTS[0]))
            continue
        with pytest.raises(SnapshotError):
            SnapshotAuditor(header | {"table": table}, 1 << 20, made.run / "journal.jsonl", STEPS)


def test_what_is_in_order_is_what_a_resume_takes(tmp_path: Path) -> None:
    """And what a resume refuses is found: the two look at the same things."""
    run, num_steps = run_until_snapshots(tmp_path, "host")
    contents = read_journal(run / "journal")
    auditor = SnapshotAuditor(contents.header, 1 << 16, run / "journal", num_steps)
    (snapshot, *_) = snapshots_in(run / "snapshots")
    model = place(tmp_path, "host")
    opt = optimizer(model, tmp_path)  # not run's own journal
    runtime = distzo2.runtime_of(model)
    for path in (None, *units(snapshot), snapshot / MANIFEST):
        before = path and path.read_bytes()
        if path:
            flip(path, len(before) // 2)
        found = find_snapshot(run / "snapshots", runtime.access, run / "journal", num_steps)
        assert (found.path == snapshot) == (not list(auditor.findings(snapshot))) == (path is None)
        if path:
            path.write_bytes(before)
    opt.close()
    runtime.close()
