"""distzo2 journal: what it shows, what it finds wrong, and where two journals part."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_runs import finetune, make_files, one_line
from journal_cases import make_entry, make_test_header, write_journal
from replay_cases import make_llama
from test_journal_chain import forge, renumbered, write_chained

import distzo2
from distzo2.cli.main import main
from distzo2.record.journal import Journal, read_journal
from distzo2_core.types import GroupScalars, Update

IDS = torch.arange(8).reshape(1, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run with a chained journal."""
    root = tmp_path_factory.mktemp("journal_commands")
    files = make_files(root)
    options = [f"--out={root / 'run'}", "--journal-chain", "--fsync-every=3", "--weight-decay=0.1"]
    assert finetune(files, *options) == 0
    return SimpleNamespace(root=root, files=files, path=root / "run", journal=root / "run" / "journal.jsonl")


def journal(*arguments: object) -> int:
    return main(["journal", *map(str, arguments)])


def output(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def make_odd(path: Path) -> Path:
    """A journal with a skipped, a clipped and a many-probe step."""
    skipped = Update(1, (GroupScalars(0.0, 0.0),), ())
    update = make_entry(2).update
    entries = [
        make_entry(0),
        make_entry(1, update=skipped, skipped="non-finite loss", losses=[[math.nan], [1.0]]),
        make_entry(2, update=update._replace(terms=update.terms * 5), extra={"clipped": True}),
    ]
    Journal.create(path, make_test_header(), entries).close()
    return path


# show


def test_show(run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal("show", run.path) == 0
    lines = output(capsys)
    fields = dict(line.split(maxsplit=1) for line in lines)
    contents = read_journal(run.journal)
    assert fields["journal"] == f"{run.journal}: format 2, chained hashes" and fields["chain"] == contents.chain
    assert fields["noise"].startswith("normal, seed 0") and "in 2 groups" in fields["model"]
    assert fields["base"].startswith("model: 2 files") and fields["steps"].startswith("4, ")
    rows = [line.split() for line in lines if line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for row, entry in zip(rows, contents.entries, strict=True):
        losses = [loss for losses in entry.losses for loss in losses]
        assert float(row[1]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert float(row[2]) == pytest.approx(entry.update.groups[0].lr, rel=1e-2) and row[3] == str(entry.tokens)
        assert float(row[5]) == pytest.approx(entry.update.terms[0].c, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "shown"), [("1:3", [1, 2]), (":2", [0, 1]), ("-1:", [3]), (":", [0, 1, 2, 3]), ("9:", [])]
)
def test_show_some_steps(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str], steps: str, shown: list[int]
) -> None:
    assert journal("show", run.journal, f"--steps={steps}", "--json") == 0
    (line,) = output(capsys)
    record = json.loads(line)
    contents = read_journal(run.journal)
    assert [step["step"] for step in record["steps"]] == shown and record["header"] == contents.header
    for step in record["steps"]:
        entry = contents.entries[step["step"]]
        assert step["losses"] == entry.losses and step["terms"][0]["c"] == entry.update.terms[0].c


def test_show_marks_what_was_not_as_usual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_odd(tmp_path / "journal.jsonl")
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


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["show", "x", "--steps=1"], ["verify", "x", "--chain=0"], ["diff", "x"], []):
        with pytest.raises(SystemExit) as caught:
            journal(*arguments)
        assert caught.value.code == 2
        assert one_line(capsys)
    assert journal("show", tmp_path / "none") == 1
    assert "none" in one_line(capsys)


# verify


def findings(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What `verify` finds; its exit status must say whether it found anything."""
    status = journal("verify", *arguments)
    lines = output(capsys)
    assert status == (0 if ": in order: " in lines[-1] else 1) and (len(lines) > 1) == (status == 1)
    return lines[:-1]


def test_a_run_in_order(run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    chain = read_journal(run.journal).chain
    assert json.loads((run.path / "run.json").read_text())["journal_chain"] == chain
    assert findings(capsys, run.journal, "--run", f"--base={run.files.model}", f"--chain={chain}") == []
    assert findings(capsys, run.path, f"--base={run.files.model}") == []
    (found,) = findings(capsys, run.path, f"--chain={'0' * 64}")
    assert chain in found


def test_every_damaged_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_journal(tmp_path / "journal.jsonl", 6)
    lines = path.read_bytes().splitlines(True)
    lines[2] = lines[2].replace(b'"tokens":64', b'"tokens":65')
    lines[4] = make_entry(7).to_line()
    lines[6] = lines[6][:-20]
    path.write_bytes(b"".join(lines))
    found = findings(capsys, path)
    assert [text.split(": ", 2)[1] for text in found[:3]] == ["line 3", "line 5", "line 6"]
    assert "the CRC does not match" in found[0] and "step 7 where step 3 must follow" in found[1]
    assert "step 4 where step 8 must follow" in found[2] and "line 7 (step 5) was torn" in found[3]
    path.write_bytes(b"x" + b"".join(lines[:1])[1:] + make_entry(0).to_line())
    (found,) = findings(capsys, path)
    assert "line 1: not the header of a journal: the CRC" in found
    other = make_entry(0, update=Update(0, (GroupScalars(0.0, 0.0),) * 2, ()))
    path.write_bytes(lines[0] + other.to_line())
    (found,) = findings(capsys, path)
    assert "line 2: 2 groups, the header has 1" in found


def test_every_broken_link_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chained(tmp_path / "journal.jsonl", 6)
    assert findings(capsys, path) == []
    lines = path.read_bytes().splitlines(True)
    changed = [*lines[:2], lines[2].replace(b'"tokens":64', b'"tokens":65'), *lines[3:]]
    path.write_bytes(forge(changed))
    (found,) = findings(capsys, path)  # the lines after it still follow the hash that it states
    assert "line 3: the chained hash does not match" in found
    path.write_bytes(forge([*lines[:2], *(renumbered(x, s + 1, s) for s, x in enumerate(lines[3:], 1))]))
    found = findings(capsys, path)
    assert len(found) == 4 and all("the chained hash does not match" in text for text in found)
    # A damaged line's hash is not known, so the next is not blamed; one without a hash is.
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"tokens":64', b'"tokens":65'), *lines[3:]]))
    (found,) = findings(capsys, path)
    assert "line 3: the CRC does not match" in found
    path.write_bytes(b"".join([*lines[:4], make_entry(3).to_line(), *lines[5:]]))
    found = findings(capsys, path)
    assert len(found) == 1 and "line 5: it has no chained hash" in found[0]


def test_a_file_that_is_no_journal_has_few_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"x\n" * 10_000)
    found = findings(capsys, path)
    assert len(found) == 101 and "more than 100 findings" in found[-1]
    path.write_bytes(b"")
    assert "line 1" in findings(capsys, path)[0]


def test_what_belongs_to_a_run_is_compared(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(run.files.model, tmp_path / "base")
    copy = shutil.copytree(run.path, tmp_path / "run")
    assert findings(capsys, copy, f"--base={base}", "--run") == []
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    (base / "config.json").unlink()
    found = findings(capsys, copy, f"--base={base}")
    assert len(found) == 2 and "config.json" in found[0] and "model.safetensors: SHA-256" in found[1]
    # The journal lost its last line, whole: only what is beside it can tell.
    lines = (copy / "journal.jsonl").read_bytes().splitlines(True)
    (copy / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    assert findings(capsys, copy) == []
    found = findings(capsys, copy, "--run")
    assert len(found) == 2 and "4 steps were made, and 3 are in the journal" in found[0]
    assert "the checkpoint is of step 4, and 3 steps are in the journal" in found[1]
    (copy / "journal.jsonl").write_bytes(b"".join(lines))
    metrics = (copy / "metrics.jsonl").read_text().splitlines()
    step = json.loads(metrics[1])
    metrics[1] = json.dumps(step | {"coefs": [9.0]})
    (copy / "metrics.jsonl").write_text("\n".join(metrics))
    (found,) = findings(capsys, copy, "--run")
    assert f"step {step['step']}: other coefficients" in found
    (copy / "run.json").unlink()
    found = findings(capsys, copy, "--run")
    assert len(found) == 2 and "holds no run" in found[0] and "other coefficients" in found[1]


def test_a_branch_is_compared_with_its_parent(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert main(["finetune", f"--branch-from={run.path}", "--at-step=2", f"--out={new}", "--steps=3"]) == 0
    capsys.readouterr()
    assert findings(capsys, new, f"--parent={run.path}", "--run") == []
    assert journal("show", new, "--steps=:0") == 0
    assert "parent    run: its first 2 steps" in output(capsys)
    entries = read_journal(run.journal).entries
    for name, changed in (("eps", dataclasses.replace(entries[1], eps=0.5)), ("steps", None)):
        other = tmp_path / f"{name}.jsonl"
        header = read_journal(run.journal).header
        Journal.create(other, header, [entries[0], *([changed] if changed else [])]).close()
        found = findings(capsys, new, f"--parent={other}")
        assert ("another SHA-256" in found[0]) if changed else ("1 steps, and its branch took over 2" in found[0])
        assert len(found) == (2 if changed else 1) and (not changed or "eps 0.00" in found[1]), found
    (found,) = findings(capsys, run.path, f"--parent={new}")
    assert "not branched from another run" in found


def test_a_branchs_first_steps_are_the_parents_in_all_but_time(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forged with whole lines and the parent's true SHA-256: rates, losses and eps too are compared."""
    new = tmp_path / "new"
    assert main(["finetune", f"--branch-from={run.path}", "--at-step=2", f"--out={new}", "--steps=3"]) == 0
    capsys.readouterr()
    contents = read_journal(new / "journal.jsonl")
    first, other = contents.entries[:2]
    group = other.update.groups[1]
    rates = (other.update.groups[0], group._replace(lr=group.lr / 2))
    for changes, reason in (
        ({"update": other.update._replace(groups=rates)}, "group 1 lr "),
        ({"eps": 0.5}, "eps "),
        ({"losses": [[1.0], [2.0]]}, "losses "),
        ({"extra": {"clipped": True}}, "extra "),
        ({"tokens": 1}, "tokens "),
        ({"seconds": 1e6}, None),
    ):
        path = tmp_path / "forged.jsonl"
        path.unlink(missing_ok=True)
        entries = [first, dataclasses.replace(other, **changes), *contents.entries[2:]]
        Journal.create(path, contents.header, entries).close()
        found = findings(capsys, path, f"--parent={run.path}")
        if reason is None:
            assert found == []
        else:
            assert len(found) == 1 and "line 3: step 1 is not the parent's" in found[0] and reason in found[0], found


def test_a_branch_that_split_a_group_is_its_parents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_llama(tmp_path / "base")
    journals = []
    for num_groups, branch in ((1, None), (2, 3)):
        model = distzo2.from_pretrained(base)
        params = list(model.parameters())
        groups = [{"params": params[: len(params) // 2] if num_groups == 2 else params}]
        groups += [{"params": params[len(params) // 2 :], "lr": 0.5}] if num_groups == 2 else []
        path = tmp_path / f"{num_groups}.jsonl"
        more = {} if branch is None else {"branch_from": (journals[0], branch)}
        opt = distzo2.ZOSGD(model, groups, lr=1e-3, seed=1, journal=path, **more)
        for _ in range(4):
            opt.step(lambda model=model: model(input_ids=IDS, labels=IDS).loss)
        opt.close()
        journals.append(path)
    assert findings(capsys, journals[1], f"--parent={journals[0]}") == []


def test_nothing_of_a_journal_reaches_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x9b\r\n\u202e\ud800"
    header = make_test_header(
        base={"name": f"b{evil}", "files": {}},
        options={f"key{evil}": f"value{evil}"},
        software={"x": evil},
        fingerprint={"device": evil},
    )
    skipped = Update(0, (GroupScalars(0.0, 0.0),), ())
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, text in zip(paths, (evil, "other"), strict=True):
        Journal.create(path, header, [make_entry(0, update=skipped, skipped=text)]).close()
    other = tmp_path / "c.jsonl"
    Journal.create(other, header | {"options": {}}).close()
    for arguments in (["show", paths[0]], ["show", paths[0], "--json"], ["diff", *paths], ["diff", paths[0], other],
                      ["verify", paths[0], f"--base={tmp_path}"]):  # fmt: skip
        journal(*arguments)
        captured = capsys.readouterr()
        assert captured.out and all(c.isprintable() or c == "\n" for c in captured.out + captured.err), arguments
    journal("show", paths[0])
    assert "b\\x1b[2J\\x9b\\r\\n\\u202e\\ud800" in capsys.readouterr().out


def test_replay_takes_a_base_and_a_journal(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = run.files.model, tmp_path / "out"
    expected = (run.path / "checkpoint" / "model.safetensors").read_bytes()
    for number, arguments in enumerate(([base, run.journal], [base, run.path], [run.path])):
        assert main(["replay", *map(str, arguments), "-o", f"{out}{number}", "--quiet"]) == 0
        assert (Path(f"{out}{number}") / "model.safetensors").read_bytes() == expected
    assert main(["replay", str(base), str(run.journal), "-o", str(out), "--to-step", "1", "--quiet"]) == 0
    assert "1 of 4 steps" in capsys.readouterr().out.splitlines()[-1]
    assert main(["replay", str(base), str(run.journal), f"--base={base}", f"--out={out}2"]) == 2
    assert "neither --base nor --journal" in one_line(capsys)


# diff


def differences(capsys: pytest.CaptureFixture[str], first: Path, second: Path) -> list[str]:
    status = journal("diff", first, second)
    lines = output(capsys)
    assert status == (1 if lines else 0)
    return lines


def test_diff(run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = read_journal(run.journal)
    other = tmp_path / "other.jsonl"

    def written(entries: list, **header: object) -> Path:
        other.unlink(missing_ok=True)
        Journal.create(other, contents.header | header, entries).close()
        return other

    entries = contents.entries
    assert differences(capsys, run.journal, run.path) == []
    assert differences(capsys, run.path, written([dataclasses.replace(e, seconds=9.0) for e in entries])) == []
    lines = differences(capsys, run.path, written(entries[:2]))
    assert lines[1:] == ["step 2: only in the first journal", "the first 2 steps make the same updates"]
    lines = differences(capsys, run.path, written(entries, options=contents.header["options"] | {"eps": 0.5}))
    assert lines[1:] == [
        f"header: options.eps: {contents.header['options']['eps']} and 0.5",
        "the first 4 steps make the same updates",
    ]
    table = [dict(row) for row in contents.header["table"]]
    table[1]["name"] = "other"
    lines = differences(capsys, run.path, written(entries, table=table))
    assert lines[1].startswith("header: table[1].name: ") and lines[1].endswith(" and 'other'")
    changed = dataclasses.replace(entries[1], tokens=7, losses=[[0.0], [-0.0]])
    lines = differences(capsys, run.path, written([entries[0], changed, *entries[2:]]))
    assert lines[1].startswith("step 1: losses ") and lines[1].endswith(f"; tokens {entries[1].tokens} and 7")
    assert lines[2] == "the first 4 steps make the same updates"
    term = entries[1].update.terms[0]
    update = entries[1].update._replace(terms=(term._replace(c=-term.c),))
    lines = differences(capsys, run.path, written([entries[0], dataclasses.replace(entries[1], update=update)]))
    assert lines[1] == f"step 1: term 0 c {term.c} and {-term.c}"
    assert lines[2] == "the first 1 steps make the same updates"


def test_diff_of_what_cannot_be_read(run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal("diff", run.journal, tmp_path / "none") == 2
    assert "none: No such file" in one_line(capsys)
    (tmp_path / "bad").write_bytes(b"\n")
    assert journal("diff", tmp_path / "bad", run.journal) == 2
    assert "bad: line 1" in one_line(capsys)
