"""distzo2 journal: what it shows, what it finds wrong, and where two journals part."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_runs import finetune, one_line
from journal_cases import make_entry, make_test_header, write_journal

from distzo2.cli.main import main
from distzo2.record.journal import Journal, read_journal
from distzo2_core.types import GroupScalars, Update


@pytest.fixture(scope="module")
def run(files: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run."""
    path = tmp_path_factory.mktemp("journal_commands") / "run"
    assert finetune(files, f"--out={path}", "--fsync-every=3", "--weight-decay=0.1") == 0
    return SimpleNamespace(files=files, path=path, journal=path / "journal.jsonl")


def journal(*arguments: object) -> int:
    return main(["journal", *map(str, arguments)])


def output(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


# show


def test_show(run, capsys) -> None:
    assert journal("show", run.path) == 0
    lines = output(capsys)
    fields = dict(line.split(maxsplit=1) for line in lines)
    contents = read_journal(run.journal)
    assert fields["journal"] == f"{run.journal}: format 3"
    assert fields["noise"].startswith("normal, seed 0") and "in 2 groups" in fields["model"]
    assert fields["base"].startswith("model: 2 files") and fields["steps"].startswith("4, ")
    rows = [line.split() for line in lines if line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for row, entry in zip(rows, contents.entries, strict=True):
        losses = [loss for losses in entry.losses for loss in losses]
        assert float(row[1]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert float(row[2]) == pytest.approx(entry.update.groups[0].lr, rel=1e-2) and row[3] == str(entry.tokens)
        assert float(row[5]) == pytest.approx(entry.update.terms[0].c, rel=1e-3)


def test_show_some_steps(run, capsys) -> None:
    contents = read_journal(run.journal)
    for steps, shown in (("1:3", [1, 2]), (":2", [0, 1]), ("-1:", [3]), (":", [0, 1, 2, 3]), ("9:", [])):
        assert journal("show", run.journal, f"--steps={steps}", "--json") == 0
        (line,) = output(capsys)
        record = json.loads(line)
        assert [step["step"] for step in record["steps"]] == shown and record["header"] == contents.header
        for step, entry in zip(record["steps"], (contents.entries[i] for i in shown), strict=True):
            assert step["losses"] == entry.losses and step["terms"][0]["c"] == entry.update.terms[0].c


def test_show_marks_what_was_not_as_usual(tmp_path, capsys) -> None:
    path = tmp_path / "journal.jsonl"
    skipped, update = Update(1, (GroupScalars(0.0, 0.0),), ()), make_entry(2).update
    entries = [
        make_entry(0),
        make_entry(1, update=skipped, skipped="non-finite loss", losses=[[math.nan], [1.0]]),
        make_entry(2, update=update._replace(terms=update.terms * 5), extra={"clipped": True}),
    ]
    Journal.create(path, make_test_header(), entries).close()
    with path.open("ab") as file:
        file.write(b'{"step"')
    assert journal("show", path) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-2].endswith("[skipped: non-finite loss]") and " nan " in lines[-2]
    assert lines[-1].endswith("+0.3 +0.3 +0.3 (+2)  [clipped]")
    assert any(line.startswith("steps     3, 1 skipped, 1 clipped") for line in lines)
    assert "line 5 (step 3) was torn" in captured.err
    assert journal("show", path, "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert steps[1]["losses"] == [[None], [1.0]] and [s["clipped"] for s in steps] == [False, False, True]


def test_wrong_usage(tmp_path, capsys) -> None:
    for arguments, reason in (
        (["show", "x", "--steps=1"], "invalid range"),
        (["diff", "x"], "required: B"),
        ([], "required: command"),
        (["verify", "x", "--run"], "verify RUN checks"),
        (["verify", "x", "--chain=0"], "sha256sum"),
    ):
        with pytest.raises(SystemExit) as caught:
            journal(*arguments)
        assert caught.value.code == 2
        assert reason in one_line(capsys)
    (tmp_path / "bad").write_bytes(b"\n")
    for command, name, status, reason in (
        ("show", "none", 1, "none"), ("diff", "none", 2, "none: No such file"), ("diff", "bad", 2, "bad: line 1")
    ):  # fmt: skip
        assert journal(command, tmp_path / name, *[tmp_path / "x"] * (command == "diff")) == status
        assert reason in one_line(capsys)


# verify


def findings(capsys, *arguments: object) -> list[str]:
    """What `verify` finds; its exit status must say whether it found anything."""
    status = journal("verify", *arguments)
    lines = output(capsys)
    assert status == (0 if ": in order: " in lines[-1] else 1) and (len(lines) > 1) == (status == 1)
    return lines[:-1]


def test_a_run_in_order(run, capsys) -> None:
    for arguments, checked in (
        ([run.path], "every line and the base checkpoint"),
        ([run.journal], "every line"),
        ([run.journal, f"--base={run.files.model}"], "every line and the base checkpoint"),
    ):
        assert journal("verify", *arguments) == 0
        assert output(capsys) == [f"{run.journal}: in order: 4 steps; checked {checked}"]


def test_every_damaged_line_is_named(tmp_path, capsys) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 6)
    lines = path.read_bytes().splitlines(True)
    lines[2] = lines[2].replace(b'"tokens":64', b'"tokens":65')
    lines[4] = make_entry(7).to_line()
    lines[6] = lines[6][:-20]
    several = make_entry(0, update=Update(0, (GroupScalars(0.0, 0.0),) * 2, ())).to_line()
    of_lines = ["line 3: the CRC does not match", "line 5: step 7 where step 3 must follow", "line 7 (step 5) was torn"]
    for content, reasons in (
        (lines, of_lines),
        ([*lines[:3], bytes(600), *lines[3:]], ["line 3: the CRC", "line 4 (step 2) and all after it were torn"]),
        ([b"x", lines[0][1:], lines[1]], ["line 1: not the header of a journal: the CRC"]),
        ([lines[0], several], ["line 2: 2 groups, the header has 1"]),
        ([lines[0], b"x\n" * 10_000], [*[""] * 100, "more than 100 findings"]),
    ):
        path.write_bytes(b"".join(content))
        for found, reason in zip(findings(capsys, path), reasons, strict=True):
            assert reason in found


def test_the_base_is_compared(run, tmp_path, capsys) -> None:
    base = shutil.copytree(run.files.model, tmp_path / "base")
    copy = shutil.copytree(run.path, tmp_path / "run")
    assert findings(capsys, copy, f"--base={base}") == []
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    (base / "config.json").unlink()
    found = findings(capsys, copy, f"--base={base}")
    assert len(found) == 2 and "config.json" in found[0] and "model.safetensors: SHA-256" in found[1]
    # A run's own base is compared where it is, and is otherwise left out.
    record = json.loads((copy / "run.json").read_text())
    for place, num_found in ((base, 2), (tmp_path / "nowhere", 0)):
        record["options"]["model"] = str(place)
        (copy / "run.json").write_text(json.dumps(record))
        assert len(findings(capsys, copy)) == num_found
    (copy / "run.json").unlink()
    assert findings(capsys, copy) == []


def test_a_branch_is_compared_with_its_parent(run, tmp_path, capsys) -> None:
    new = run.path.parent / "new"
    assert main(["finetune", f"--branch-from={run.path}", "--at-step=2", f"--out={new}", "--steps=3"]) == 0
    capsys.readouterr()
    for arguments in ([new], [new / "journal.jsonl", f"--parent={run.path}"]):
        assert journal("verify", *arguments) == 0
        assert "its parent's journal" in output(capsys)[0]
    assert journal("show", new, "--steps=:0") == 0
    assert "parent    run: its first 2 steps" in output(capsys)
    contents = read_journal(run.journal)
    first, second = contents.entries[:2]
    for entries, reason in (
        ([first, dataclasses.replace(second, eps=0.5)], "another SHA-256 up to step 2"),
        ([first], "1 steps, and its branch took over 2"),
    ):
        other = tmp_path / "other.jsonl"
        other.unlink(missing_ok=True)
        Journal.create(other, contents.header, entries).close()
        (found,) = findings(capsys, new, f"--parent={other}")
        assert reason in found
    (found,) = findings(capsys, run.path, f"--parent={new}")
    assert "not branched from another" in found
    shutil.move(new, tmp_path / "new")  # where its parent is not beside it
    assert findings(capsys, tmp_path / "new") == []


def test_nothing_of_a_journal_reaches_the_terminal_raw(tmp_path, capsys) -> None:
    evil = "\x1b[2J\x9b\r\n\u202e\ud800"
    base = {"name": f"b{evil}", "files": {}}
    header = make_test_header(options={f"key{evil}": f"value{evil}"}, fingerprint={"device": evil}, base=base)
    header["software"] = {"x": evil}
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    skipped = Update(0, (GroupScalars(0.0, 0.0),), ())
    for path, text, changed in zip(paths, (evil, "other", evil), ({}, {}, {"options": {}}), strict=True):
        Journal.create(path, header | changed, [make_entry(0, update=skipped, skipped=text)]).close()
    for arguments in (["show", paths[0]], ["show", paths[0], "--json"], ["diff", *paths[:2]], ["diff", *paths[::2]],
                      ["verify", paths[0], f"--base={tmp_path}"]):  # fmt: skip
        journal(*arguments)
        captured = capsys.readouterr()
        assert captured.out and all(c.isprintable() or c == "\n" for c in captured.out + captured.err), arguments
    journal("show", paths[0])
    assert "b\\x1b[2J\\x9b\\r\\n\\u202e\\ud800" in capsys.readouterr().out


def test_replay_takes_a_base_and_a_journal(run, tmp_path, capsys) -> None:
    base, out = run.files.model, tmp_path / "out"
    expected = (run.path / "checkpoint" / "model.safetensors").read_bytes()
    ways = ([base, run.journal], [base, run.path], [run.path], [f"--base={base}", f"--journal={run.path}"])
    for number, arguments in enumerate(ways):
        assert main(["replay", *map(str, arguments), "-o", f"{out}{number}", "--quiet"]) == 0
        assert (Path(f"{out}{number}") / "model.safetensors").read_bytes() == expected
    assert main(["replay", str(base), str(run.journal), "-o", str(out), "--to-step", "1", "--quiet"]) == 0
    assert "1 of 4 steps" in capsys.readouterr().out.splitlines()[-1]


# diff


def differences(capsys, first: Path, second: Path) -> list[str]:
    status = journal("diff", first, second)
    lines = output(capsys)
    if status == 0:
        assert len(lines) == 1 and re.fullmatch(
            rf"{re.escape(str(first))}.* and {re.escape(str(second))}.*: equal, \d+ steps", lines[0]
        )
        return []
    assert status == 1
    return lines


def test_diff(run, tmp_path, capsys) -> None:
    contents = read_journal(run.journal)
    other = tmp_path / "other.jsonl"

    def written(entries: list, **header: object) -> Path:
        other.unlink(missing_ok=True)
        Journal.create(other, contents.header | header, entries).close()
        return other

    entries = contents.entries
    assert differences(capsys, run.journal, run.path) == []
    assert differences(capsys, run.path, written([dataclasses.replace(e, seconds=9.0) for e in entries])) == []
    table = [dict(row) for row in contents.header["table"]]
    table[1]["name"] = "other"
    name = contents.header["table"][1]["name"]
    eps = contents.header["options"]["eps"]
    (term,), losses = entries[1].update.terms, entries[1].losses
    scored = dataclasses.replace(entries[1], tokens=7, losses=[[0.0], [-0.0]])
    moved = dataclasses.replace(entries[1], update=entries[1].update._replace(terms=(term._replace(c=-term.c),)))
    for changed, header, difference, num_same in (
        (entries[:2], {}, "step 2: only in the first journal", 2),
        (entries, {"options": contents.header["options"] | {"eps": 0.5}}, f"header: options.eps: {eps} and 0.5", 4),
        (entries, {"table": table}, f"header: table[1].name: {name!r} and 'other'", 4),
        ([entries[0], scored, *entries[2:]], {}, f"step 1: losses[0][0]: {losses[0][0]} and 0.0", 4),
        ([entries[0], moved], {}, f"step 1: terms[0].c: {term.c} and {-term.c}", 1),
    ):
        lines = differences(capsys, run.path, written(changed, **header))
        assert lines[1].startswith(difference) and lines[2] == f"the first {num_same} steps make the same updates"
