"""`distzo2 journal show | verify | diff`."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distzo2.cli.arguments import Formatter, Parser
from distzo2.errors import DistZO2Error, UsageError

if TYPE_CHECKING:
    from distzo2.record.journal import JournalContents, StepEntry

COEFS_SHOWN = 3  # of a step's


def step_range(text: str) -> slice:
    """a:b, as in Python: steps a to b - 1, counted from the end where negative; either may be left out."""
    match = re.fullmatch(r"(-?\d{1,12})?:(-?\d{1,12})?", text)
    if match is None:
        raise ValueError
    return slice(*(None if part is None else int(part) for part in match.groups()))


step_range.__name__ = "range (such as 100:200, or -10: for the last ten)"


def sha256_text(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text}: 64 hexadecimal digits were expected")
    return text


def printable(text: str) -> str:
    """Text of a file from anyone, for a terminal: what is no printable character is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def add_journal(parser: Parser) -> None:
    """The commands and options of `journal`."""
    commands = parser.add_subparsers(
        dest="journal_command", required=True, metavar="command", parser_class=Parser, help="what to do"
    )

    def command(name: str, text: str) -> Parser:
        return commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=Formatter
        )

    sub = command("show", "what a run was made of, and its steps")
    sub.add_argument("file", metavar="FILE", help="journal, or directory of a run")
    sub.add_argument(
        "--steps", type=step_range, default=slice(None), metavar="A:B",
        help="steps A to B - 1; --steps=-10: shows the last ten (default: all)",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print one line of JSON: header and steps")

    sub = command("verify", "check every line of a journal, and what belongs to it; exit status 1 if anything is wrong")
    sub.add_argument("file", metavar="FILE", help="journal, or directory of a run")
    sub.add_argument("--base", metavar="DIR", help="also compare the base checkpoint in DIR with its SHA-256s")
    sub.add_argument(
        "--run", dest="with_run", action="store_true",
        help="also check all of the run whose directory FILE is in: base checkpoint, training file, run.json, "
        "metrics.jsonl, every snapshot, and the checkpoint",
    )  # fmt: skip
    sub.add_argument("--parent", metavar="FILE", help="also compare the journal, or run, that it was branched from")
    sub.add_argument(
        "--chain", type=sha256_text, metavar="HASH",
        help="also compare the chained hash of the last line with the one that was noted elsewhere",
    )  # fmt: skip

    sub = command(
        "diff", "where two journals part, times left out; exit status 1 if they do, and 2 if one cannot be read"
    )
    sub.add_argument("first", metavar="A", help="journal, or directory of a run")
    sub.add_argument("second", metavar="B", help="journal, or directory of a run")


def run_journal(options: argparse.Namespace) -> int:
    return {"show": _show, "verify": _verify, "diff": _diff}[options.journal_command](options)


def journal_path(name: str) -> Path:
    """The journal that a command line names, by itself or by its run."""
    path = Path(name)
    return path / "journal.jsonl" if path.is_dir() else path


# ---- show -------------------------------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    from distzo2.record.journal import read_journal

    path = journal_path(options.file)
    contents = read_journal(path)
    entries = contents.entries[options.steps]
    if options.json:
        steps = [_step_record(entry) for entry in entries]
        print(json.dumps({"header": contents.header, "steps": steps, "torn": contents.torn, "chain": contents.chain}))
        return 0
    for name, text in _summary(path, contents):
        print(printable(f"{name:<9} {text}"))
    if entries:
        print(_TITLE)
    for entry in entries:
        print(printable(_row(entry)))
    if contents.torn:
        print(printable(contents.torn), file=sys.stderr)
    return 0


def _summary(path: Path, contents: JournalContents) -> list[tuple[str, str]]:
    from distzo2.record.header import is_chained, parents_of

    header, entries = contents.header, contents.entries
    table = header["table"]
    trained = [row for row in table if row["group"] is not None]
    dtypes = ", ".join(sorted({row["dtype"] for row in table}))
    num_elements = sum(math.prod(row["shape"]) for row in table)
    base = header["base"]
    num_bytes = sum(file["num_bytes"] for file in base["files"].values())
    kinds = ", ".join(sorted({row["noise"] for row in trained}))
    skipped = sum(entry.skipped is not None for entry in entries)
    clipped = sum(bool(entry.extra.get("clipped")) for entry in entries)
    marks = "".join(f", {count} {name}" for count, name in ((skipped, "skipped"), (clipped, "clipped")) if count)
    tokens, seconds = sum(entry.tokens for entry in entries), sum(entry.seconds for entry in entries)
    lines = [
        ("journal", f"{path}: format {header['journal']}" + (", chained hashes" if is_chained(header) else "")),
        ("base", f"{base['name'] or 'none'}: {len(base['files'])} files, {num_bytes / 2**20:.1f} MiB"),
        ("model", f"{len(table)} parameters, {num_elements} elements, {dtypes}; {len(trained)} trained in "
                  f"{len(header['groups'])} groups"),
        ("noise", f"{kinds or 'none'}, seed {header['seed']}; {header['noise']}, {header['rounding']}"),
        ("options", _pairs(header["options"])),
        ("software", _pairs(header["software"])),
        ("machine", _pairs(header["fingerprint"])),
    ]  # fmt: skip
    lines += [("parent", f"{p['name']}: its first {p['steps']} steps") for p in parents_of(header)]
    lines.append(("steps", f"{len(entries)}{marks}, {tokens} tokens, {seconds:.1f} s"))
    if contents.chain is not None:
        lines.append(("chain", contents.chain))
    return lines


_TITLE = f"{'step':>8}  {'loss':>10}  {'lr':>10}  {'tokens':>8}  {'seconds':>8}  coefs"


def _row(entry: StepEntry) -> str:
    rates = {group.lr: None for group in entry.update.groups}
    lr = ",".join(f"{rate:.3g}" for rate in rates)
    coefs = [f"{term.c:+.4g}" for term in entry.update.terms]
    more = f" (+{len(coefs) - COEFS_SHOWN})" if len(coefs) > COEFS_SHOWN else ""
    marks = [f"skipped: {entry.skipped}"] if entry.skipped is not None else []
    marks += ["clipped"] if entry.extra.get("clipped") else []
    text = f"{entry.step:8}  {_mean_loss(entry):10.5f}  {lr:>10}  {entry.tokens:8}  {entry.seconds:8.3f}  "
    return (text + " ".join(coefs[:COEFS_SHOWN]) + more + (f"  [{', '.join(marks)}]" if marks else "")).rstrip()


def _mean_loss(entry: StepEntry) -> float:
    losses = [loss for row in entry.losses for loss in row]
    return sum(losses) / len(losses) if losses else math.nan


def _step_record(entry: StepEntry) -> dict[str, Any]:
    from distzo2.run.metrics import finite

    return finite(
        {
            "step": entry.step,
            "loss": _mean_loss(entry),
            "losses": entry.losses,
            "groups": [group._asdict() for group in entry.update.groups],
            "terms": [term._asdict() for term in entry.update.terms],
            "eps": entry.eps,
            "skipped": entry.skipped,
            "clipped": bool(entry.extra.get("clipped")),
            "tokens": entry.tokens,
            "seconds": entry.seconds,
            "extra": entry.extra,
        }
    )


def _pairs(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if not isinstance(value, (dict, list))) or "none"


# ---- verify and diff --------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    from distzo2.cli.journal_audit import audit_journal, base_findings, parent_findings
    from distzo2.cli.run_audit import audit_run
    from distzo2.run.audit import FILE, Report, kind_of

    path = journal_path(options.file)
    if options.with_run and kind_of(path) not in (FILE, None):
        raise DistZO2Error(f"{path}: {kind_of(path)}, where the journal of a run was expected")
    audit = audit_journal(path)
    findings = audit.findings
    if options.chain is not None and options.chain != audit.chain:
        findings.append(f"{path}: the chained hash of its last line is {audit.chain}, not {options.chain}")
    report = Report()
    if options.with_run:
        report = audit_run(audit, options.base)
        findings += report.findings
    elif options.base and audit.header is not None:
        findings += base_findings(options.base, audit.header["base"])
        report.checked.append("the base checkpoint")
    if options.parent:
        findings += parent_findings(audit, journal_path(options.parent))
        report.checked.append("its parent's journal")
    for note in report.notes:
        print(printable(f"note: {' '.join(note.split())}"))
    for finding in findings:
        print(printable(" ".join(finding.split())))
    if findings:
        kinds = Counter("torn last line" if " was torn and left out" in text else "finding" for text in findings)
        counts = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
        whole = f"; {report.num_whole} of {report.num_snapshots} snapshots are whole" if report.num_snapshots else ""
        print(printable(f"{path}: not in order: {counts}{whole}"))
        return 1
    chain = f", chained hash {audit.chain}" if audit.chain is not None else ""
    checked = _enumerate(["every line", *report.checked])
    print(printable(f"{path}: in order: {len(audit.entries)} steps{chain}; checked {checked}"))
    return 0


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _diff(options: argparse.Namespace) -> int:
    from distzo2.cli.journal_diff import diff_journals
    from distzo2.record.journal import read_journal

    paths = [journal_path(options.first), journal_path(options.second)]
    try:
        first, second = (read_journal(path) for path in paths)
    except OSError as error:
        raise UsageError(f"{error.filename}: {os.strerror(error.errno)}") from error
    except DistZO2Error as error:
        raise UsageError(str(error)) from error
    difference = diff_journals(first, second)
    for text in (first.torn, second.torn):
        if text:
            print(text, file=sys.stderr)
    if difference.is_none:
        return 0
    print(f"{paths[0]}: {len(first.entries)} steps; {paths[1]}: {len(second.entries)} steps")
    if difference.header is not None:
        print(printable(f"header: {difference.header}"))
    if difference.step is not None:
        print(printable(difference.step))
    print(f"the first {difference.same_updates} steps make the same updates")
    return 1
