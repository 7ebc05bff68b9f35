"""`distzo2 journal show | verify | diff`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distzo2.cli.arguments import Formatter, Parser
from distzo2.cli.ending import text_of
from distzo2.errors import DistZO2Error, UsageError
from distzo2.text import brief, printable

if TYPE_CHECKING:
    from distzo2.record.entry import StepEntry
    from distzo2.record.journal import JournalContents

COEFS_SHOWN = 3  # of a step's
DIFFERENCES_SHOWN = 8  # of two steps
# Options of `verify` that left, and what to do instead.
LEFT = {
    "run": "verify RUN checks the journal, its base checkpoint and its parent; "
    "`distzo2 replay RUN` makes a checkpoint again, to be compared",
    "chain": "compare `sha256sum journal.jsonl` with the sum that was noted elsewhere",
}


def step_range(text: str) -> slice:
    """a:b, as in Python: steps a to b - 1, counted from the end where negative; either may be left out."""
    first, last = text.split(":")
    return slice(int(first) if first else None, int(last) if last else None)


step_range.__name__ = "range (such as 100:200, or -10: for the last ten)"


def add_journal(parser: Parser) -> None:
    """Adds the commands of `distzo2 journal`, and their options, to `parser`."""
    commands = parser.add_subparsers(
        dest="journal_command", required=True, metavar="command", parser_class=Parser, help="what to do"
    )

    def command(name: str, text: str, *files: tuple[str, str]) -> Parser:
        about = text[0].upper() + text[1:] + "."
        sub = commands.add_parser(name, help=text, description=about, formatter_class=Formatter)
        for file, metavar in files:
            sub.add_argument(file, metavar=metavar, help="journal, or directory of a run")
        return sub

    show = command("show", "what a run was made of, and its steps", ("file", "FILE"))
    show.add_argument(
        "--steps", type=step_range, default=slice(None), metavar="A:B",
        help="steps A to B - 1; --steps=-10: shows the last ten (default: all)",
    )  # fmt: skip
    show.add_argument("--json", action="store_true", help="print one line of JSON: header and steps")
    text = "check every line of a journal, and what belongs to it; exit status 1 if anything is wrong"
    verify = command("verify", text, ("file", "FILE"))
    verify.add_argument("--base", metavar="DIR", help="base checkpoint (default: that of the run, if it is there)")
    verify.add_argument("--parent", metavar="FILE", help="journal, or run, of the parent (default: the one beside it)")
    text = "where two journals part, times left out; exit status 1 if they do, and 2 if one cannot be read"
    command("diff", text, ("first", "A"), ("second", "B"))


def run_journal(options: argparse.Namespace) -> int:
    """Runs a command of `distzo2 journal`; returns the exit status."""
    return {"show": _show, "verify": _verify, "diff": _diff}[options.journal_command](options)


def journal_path(name: str | os.PathLike[str]) -> Path:
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
        print(json.dumps({"header": contents.header, "steps": steps, "torn": contents.torn}))
        return 0
    for name, text in _summary(path, contents):
        print(printable(f"{name:<9} {text}"))
    if entries:
        print(f"{'step':>8}  {'loss':>10}  {'lr':>10}  {'tokens':>8}  {'seconds':>8}  coefs")
    for entry in entries:
        print(printable(_row(entry)))
    if contents.torn:
        print(printable(contents.torn), file=sys.stderr)
    return 0


def _summary(path: Path, contents: JournalContents) -> list[tuple[str, str]]:
    from distzo2.record.header import parents_of

    header, entries = contents.header, contents.entries
    table, base = header["table"], header["base"]
    trained = [row for row in table if row["group"] is not None]
    dtypes = ", ".join(sorted({row["dtype"] for row in table}))
    num_elements = sum(math.prod(row["shape"]) for row in table)
    num_bytes = sum(file["num_bytes"] for file in base["files"].values())
    kinds = ", ".join(sorted({row["noise"] for row in trained}))
    skipped = sum(entry.skipped is not None for entry in entries)
    clipped = sum(bool(entry.extra.get("clipped")) for entry in entries)
    marks = "".join(f", {count} {name}" for count, name in ((skipped, "skipped"), (clipped, "clipped")) if count)
    tokens, seconds = sum(entry.tokens for entry in entries), sum(entry.seconds for entry in entries)
    return [
        ("journal", f"{path}: format {header['journal']}"),
        ("base", f"{base['name'] or 'none'}: {len(base['files'])} files, {num_bytes / 2**20:.1f} MiB"),
        ("model", f"{len(table)} parameters, {num_elements} elements, {dtypes}; {len(trained)} trained in "
                  f"{len(header['groups'])} groups"),
        ("noise", f"{kinds or 'none'}, seed {header['seed']}; {header['noise']}, {header['rounding']}"),
        ("options", _pairs(header["options"])),
        ("software", _pairs(header["software"])),
        ("machine", _pairs(header["fingerprint"])),
        *(("parent", f"{parent['name']}: its first {parent['steps']} steps") for parent in parents_of(header)),
        ("steps", f"{len(entries)}{marks}, {tokens} tokens, {seconds:.1f} s"),
    ]  # fmt: skip


def _row(entry: StepEntry) -> str:
    rates = {group.lr: None for group in entry.update.groups}
    lr = ",".join(f"{rate:.3g}" for rate in rates)
    coefs = [f"{c:+.4g}" for c in entry.coefs]
    more = f" (+{len(coefs) - COEFS_SHOWN})" if len(coefs) > COEFS_SHOWN else ""
    marks = [f"skipped: {entry.skipped}"] if entry.skipped is not None else []
    unused = sum(last - first + 1 for first, last in entry.unused)
    marks += [f"{unused} parameters unused"] if unused else []
    marks += ["clipped"] if entry.extra.get("clipped") else []
    text = f"{entry.step:8}  {entry.mean_loss:10.5f}  {lr:>10}  {entry.tokens:8}  {entry.seconds:8.3f}  "
    return (text + " ".join(coefs[:COEFS_SHOWN]) + more + (f"  [{', '.join(marks)}]" if marks else "")).rstrip()


def _step_record(entry: StepEntry) -> dict[str, Any]:
    from distzo2.run.metrics import finite

    return finite(_fields(entry) | {"loss": entry.mean_loss, "clipped": bool(entry.extra.get("clipped"))})


def _fields(entry: StepEntry) -> dict[str, Any]:
    """A step as JSON values."""
    fields = {name: value for name, value in vars(entry).items() if name != "update"}
    groups, terms = ([part._asdict() for part in parts] for parts in (entry.update.groups, entry.update.terms))
    return {"groups": groups, "terms": terms, **fields}


def _pairs(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if not isinstance(value, (dict, list))) or "none"


# ---- verify -----------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    from distzo2.record.journal import JournalError, read_journal

    path, findings, checked = journal_path(options.file), [], ["every line"]
    try:
        contents = read_journal(path, findings=findings)
    except JournalError as error:
        findings.append(str(error))
    else:
        findings += [contents.torn] if contents.torn else []
        for what, found in _around(options, path, contents.header):
            checked.append(what)
            findings += found
    for finding in findings:
        print(printable(finding))
    if findings:
        print(printable(f"{path}: not in order: {len(findings)} finding{'s' * (len(findings) > 1)}"))
        return 1
    print(printable(f"{path}: in order: {len(contents.entries)} steps; checked {' and '.join(checked)}"))
    return 0


def _around(options: argparse.Namespace, path: Path, header: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """What belongs to a journal and was looked at, and what is wrong with it."""
    from distzo2.checkpoint.reading import checkpoint_differences
    from distzo2.record.header import parents_of
    from distzo2.record.lineage import parent_differences
    from distzo2.run.directory import saved_options

    base, parent, is_run = options.base, options.parent, Path(options.file).is_dir()
    if base is None and is_run and header["base"]["files"]:
        with suppress(DistZO2Error, KeyError):  # no run.json that can be read
            base = saved_options(options.file)["model"]
            base = base if Path(base).is_dir() else None
    if base is not None:
        no_files = [] if header["base"]["files"] else [f"{base}: the journal's run did not start from a checkpoint"]
        found = checkpoint_differences(base, header["base"], path.parent / "adapter_start")
        yield "the base checkpoint", [*no_files, *found]
    if parent is None and is_run and parents_of(header):
        beside = path.absolute().parent.parent / parents_of(header)[-1]["name"]
        parent = beside if journal_path(beside).is_file() and beside != path.absolute().parent else None
    if parent is not None:
        try:
            yield "its parent's journal", parent_differences(header, journal_path(parent))
        except DistZO2Error as error:
            yield "its parent's journal", [str(error)]


# ---- diff -------------------------------------------------------------------------------------------------------


def _diff(options: argparse.Namespace) -> int:
    from distzo2.record.journal import read_journal

    paths = [journal_path(options.first), journal_path(options.second)]
    try:
        first, second = (read_journal(path) for path in paths)
    except (OSError, DistZO2Error) as error:
        raise UsageError(text_of(error)) from error
    for text in (first.torn, second.torn):
        if text:
            print(printable(text), file=sys.stderr)
    # No two runs share their times.
    entries = [[dataclasses.replace(entry, seconds=0.0) for entry in each.entries] for each in (first, second)]
    shared = list(zip(*entries, strict=False))
    lines = [f"header: {found}" for found in islice(_differences(first.header, second.header), 1)]
    parts = ((a.step, list(islice(_differences(_fields(a), _fields(b)), DIFFERENCES_SHOWN))) for a, b in shared)
    step, found = next((part for part in parts if part[1]), (len(shared), []))
    if found:
        lines.append(f"step {step}: {'; '.join(found)}")
    elif len(first.entries) != len(second.entries):
        longer = "first" if len(first.entries) > len(second.entries) else "second"
        lines.append(f"step {step}: only in the {longer} journal")
    if not lines:
        print(printable(f"{paths[0]} and {paths[1]}: equal, {len(shared)} steps"))
        return 0
    print(printable(f"{paths[0]}: {len(first.entries)} steps; {paths[1]}: {len(second.entries)} steps"))
    for line in lines:
        print(printable(line))
    same = next((i for i, (a, b) in enumerate(shared) if repr(a.update) != repr(b.update)), len(shared))
    print(f"the first {same} steps make the same updates")
    return 1


def _differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Each place where two JSON values differ by bits, with what is there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            where = f"{path}.{key}" if path else str(key)
            if key in a and key in b:
                yield from _differences(a[key], b[key], where)
            else:
                yield f"{where}: only in the {'first' if key in a else 'second'} journal"
    elif isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _differences(x, y, f"{path}[{i}]")
        if len(a) != len(b):
            yield f"{path}: {len(a)} and {len(b)} entries"
    elif repr(a) != repr(b):  # nan is itself, -0.0 is not 0.0, 1 is neither 1.0 nor True
        yield f"{path}: {brief(a)} and {brief(b)}"
