"""What is wrong in the directory of a run, all of it: everything that a run puts there is looked at.

Whoever made the directory, it is only read: no link in it is followed, no name in a file leads out of it but those of
the base checkpoint and the training file, and memory is in proportion to what is there, a piece at a time for weights.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distzo2.checkpoint.checkpoint_hidden import is_hidden
from distzo2.checkpoint.weight_files import brief, sha256_file
from distzo2.cli.checkpoint_audit import audit_checkpoint
from distzo2.cli.journal_audit import Audit, base_findings
from distzo2.cli.snapshot_audit import SnapshotAuditor, others_in
from distzo2.errors import DistZO2Error
from distzo2.record.snapshot import SnapshotError, snapshots_in
from distzo2.run.audit import DIRECTORY, FILE, LINK, Report, entries_of, kind_of
from distzo2.run.directory import LEFTOVERS, NAMES, RunDirectory
from distzo2.run.metrics import read_metrics


def audit_run(audit: Audit, base: str | os.PathLike[str] | None = None) -> Report:
    """Looks at the directory of a run, with its journal read. `base`: where its base checkpoint is now, if not where
    run.json says."""
    path, report = Path(audit.path).parent, Report()
    run = _record(path, report)
    with _told(report):
        report.note(path, _others(run))
    if run.record:
        _audit_record(run, audit, base, report)
    with _told(report):
        _audit_metrics(run, audit, report)
    with _told(report):
        _audit_snapshots(run, audit, report)
    with _told(report):
        audit_checkpoint(run, audit.header, len(audit.entries), report)
    return report


@contextmanager
def _told(report: Report) -> Iterator[None]:
    """What the operating system refuses is a finding as well, and does not keep the rest from being looked at."""
    try:
        yield
    except OSError as error:
        report.findings.append(f"{error.filename}: {error.strerror}")


def _record(path: Path, report: Report) -> RunDirectory:
    """The directory with what its run.json says; nothing where that cannot be read, which is told."""
    kind = kind_of(path / "run.json")
    if kind not in (FILE, None):
        report.findings.append(f"{path / 'run.json'}: {kind}, where a file was expected")
        return RunDirectory(path)
    try:
        return RunDirectory.resumed(path)
    except DistZO2Error as error:
        report.findings.append(str(error))
        return RunDirectory(path)


def _others(run: RunDirectory) -> Iterator[str]:
    """What is there besides a run's files, and what a killed one left."""
    in_use = run.is_in_use
    if in_use:
        yield f"{run.path}: another distzo2 finetune is at work there: what it is changing may be told as wrong"
    for entry in entries_of(run.path):
        if is_hidden(entry.name) or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in LEFTOVERS):
            if not in_use:
                yield f"{entry}: left by a killed run: the next one removes it"
        elif entry.name not in NAMES:
            yield f"{entry}: not a file that a run leaves, and not looked at"


def _audit_record(run: RunDirectory, audit: Audit, base: str | os.PathLike[str] | None, report: Report) -> None:
    """run.json, and the base checkpoint and training file that it names."""
    record, where = run.record, run.path / "run.json"
    options = record["options"]
    if audit.header is not None:
        if options.get("seed") != audit.header["seed"]:
            report.findings.append(
                f"{where}: seed {brief(options.get('seed'))}, the journal has {audit.header['seed']}"
            )
        with _told(report):
            directory = base or str(options.get("model"))
            report.find(directory, base_findings(directory, audit.header["base"]))
        report.checked.append("the base checkpoint")
    report.checked += ["the training file", "run.json"]
    num_steps = len(audit.entries)
    done = record.get("steps_done")
    if isinstance(done, int) and done > num_steps:
        report.findings.append(f"{where}: {brief(done)} steps were made, and {num_steps} are in the journal")
    if done == num_steps and record.get("journal_chain") not in (None, audit.chain):
        report.findings.append(f"{where}: the chained hash was {brief(record['journal_chain'])}, and is {audit.chain}")
    train = options.get("train")
    if not isinstance(train, str):
        report.findings.append(f"{where}: it names no training file")
    else:
        with _told(report):
            if not Path(train).is_file():
                report.findings.append(f"{train}: the training file is not there")
            elif sha256_file(train) != record.get("train_sha256"):
                report.findings.append(f"{train}: not the training file that the run began with")


def _audit_metrics(run: RunDirectory, audit: Audit, report: Report) -> None:
    kind = kind_of(run.metrics)
    if kind != FILE:
        if kind is not None or run.record.get("status") not in (None, "starting"):
            found = "not there" if kind is None else f"{kind}, where a file was expected"
            report.findings.append(f"{run.metrics}: {found}")
        return
    coefs = {entry.step: [term.c for term in entry.update.terms] for entry in audit.entries}

    def others() -> Iterator[str]:
        left_out: list[str] = []
        metrics = read_metrics(run.metrics, left_out.append)
        yield from left_out
        for line in metrics:
            if line["kind"] == "step" and line["step"] in coefs and line.get("coefs") != coefs[line["step"]]:
                yield f"{run.metrics}: step {line['step']}: other coefficients than the journal has"

    report.find(run.metrics, others())
    report.checked.append("metrics.jsonl")


def _audit_snapshots(run: RunDirectory, audit: Audit, report: Report) -> None:
    kind = kind_of(run.snapshots)
    if kind is None:
        return
    if kind == LINK:  # to a larger disk, say; a resume follows it
        report.notes.append(f"{run.snapshots}: a link, which is not followed: no snapshot was looked at")
        return
    if kind != DIRECTORY:
        report.findings.append(f"{run.snapshots}: {kind}, where a directory of snapshots was expected")
        return
    if audit.header is None:  # which is told; without it nothing can be said of what a snapshot must hold
        return
    report.note(run.snapshots, others_in(run.snapshots, run.is_in_use))
    try:
        auditor = SnapshotAuditor(audit.header, audit.header_bytes, audit.path, len(audit.entries))
    except SnapshotError as error:
        report.findings.append(str(error))
        return
    for path in reversed(snapshots_in(run.snapshots)):
        if kind_of(path) is None:  # a run at work has removed it meanwhile
            continue
        report.num_snapshots += 1
        with _told(report):
            report.num_whole += not report.find(path, auditor.findings(path))
            report.note(path, auditor.strangers(path))
    if report.num_snapshots:
        report.checked.append(f"{report.num_snapshots} snapshot{'s' * (report.num_snapshots > 1)}")
