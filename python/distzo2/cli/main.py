"""The command `distzo2`.

Expected errors are one line on stderr and exit status 1, wrong usage is 2, Ctrl-C 130, SIGTERM 143.
"""

from __future__ import annotations

import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from distzo2.cli.arguments import Formatter, Parser, add_options, refuse
from distzo2.cli.ending import Terminated, end_with
from distzo2.cli.journal import add_journal, journal_path, run_journal
from distzo2.errors import DistZO2Error, UsageError
from distzo2.run.options import (
    EvalOptions,
    FinetuneOptions,
    GenerateOptions,
    MeasureOptions,
    PlanOptions,
    ReplayOptions,
    ReportOptions,
    checked,
    made,
    read_config,
)
from distzo2.text import printable
from distzo2.version import __version__

ABOUT = "Fine-tune language models with forward passes only, their weights streamed block by block through the device."


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and those of its commands."""
    parser = Parser(prog="distzo2", description=ABOUT, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"distzo2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, (text, kind, _) in COMMANDS.items():
        about = text[0].upper() + text[1:] + "."
        sub = commands.add_parser(name, help=text, description=about, formatter_class=Formatter)
        if kind is None:
            add_journal(sub)
        else:
            add_options(sub, kind)
    return parser, commands.choices


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """The command that `arguments` name, and its options.

    Raises:
        SystemExit: the command line is wrong, or asks for help.
        UsageError: a file of options cannot be used, an option is missing, or two do not go together.
    """
    parser, commands = build_parser()
    given, unknown = parser.parse_known_args(arguments)
    name, kind = given.command, COMMANDS[given.command][1]
    if unknown:
        refuse(commands[name], kind, unknown)
    if kind is None:
        return name, given
    values = vars(given)
    del values["command"]
    config = values.pop("config", None)
    try:
        values = checked(kind, values)
        if kind is not FinetuneOptions:
            return name, made(kind, read_config(kind, config) | values)
    except UsageError as error:
        commands[name].error(str(error))
    from distzo2.run.launch import finetune_options

    return name, finetune_options(values, config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    terminated = Terminated()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # what its encoding lacks is escaped
            with suppress(OSError, ValueError):  # a broken stream reports its error at the next write
                stream.reconfigure(errors="backslashreplace")
    try:
        with terminated:
            name, options = parse(sys.argv[1:] if arguments is None else arguments)
            _quiet_libraries()
            return COMMANDS[name][2](options)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (python flushes it at exit)
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return end_with(error, terminated.happened)


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _log(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


# ---- commands ---------------------------------------------------------------------------------------------------


def _finetune(options: FinetuneOptions) -> int:
    from distzo2.parallel import group as parallel
    from distzo2.run import launch
    from distzo2.run.train import finetune
    from distzo2.text import gib

    mesh = launch.make_mesh(options, _log)
    try:
        result = finetune(options, _log)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(options)) from None
    parallel.shutdown()
    if mesh is not None and mesh.rank != 0:
        return 0
    memory = f"peak memory {gib(result.peak_bytes)}, weights {gib(result.size.total)}"
    _log(f"{result.num_steps} steps in {result.out}; {memory}")
    return 0


def _interrupted(options: FinetuneOptions) -> str:
    from distzo2.record.journal import read_journal

    try:
        num_steps = len(read_journal(os.path.join(options.out, "journal.jsonl")).entries)
    except (OSError, DistZO2Error):
        return "interrupted before the first step: nothing was written"
    return (
        f"interrupted: {num_steps} steps are in the journal; continue with distzo2 finetune --resume --out "
        f"{options.out}"
    )


def _eval(options: EvalOptions) -> int:
    from distzo2.run.inference import evaluate_file

    score, objective = evaluate_file(options)
    figures = {"loss": score.loss, "accuracy": score.accuracy, "examples": score.num_examples, "objective": objective}
    if options.json:
        print(json.dumps(figures))
    else:
        print(f"{objective}: loss {score.loss:.4f}, accuracy {score.accuracy:.2%} ({score.num_examples} examples)")
    return 0


def _generate(options: GenerateOptions) -> int:
    from distzo2.run.inference import generate_text

    if options.prompt is None:
        options = replace(options, prompt=_standard_input())
    generate_text(options, lambda text: print(text, end="", flush=True))
    print()
    return 0


def _standard_input() -> str:
    if sys.stdin is None:
        raise UsageError("--prompt is missing, and standard input is closed")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DistZO2Error(f"standard input: not {error.encoding}: {error.reason} at byte {error.start}") from error


def _replay(options: ReplayOptions) -> int:
    from distzo2.checkpoint.replay import replay
    from distzo2.run.directory import saved_options

    if os.path.lexists(options.out) and not os.path.isdir(options.out):
        raise UsageError(f"--out {options.out}: a directory was expected")
    run, base, journal = options.run_dir, options.base, options.journal or options.journal_file
    if options.journal_file is not None:  # BASE JOURNAL
        base = run
    base = base or saved_options(run)["model"]
    journal = os.fspath(journal_path(journal)) if journal else os.path.join(run, "journal.jsonl")
    report = replay(base, journal, options.out, to_step=options.to_step, progress=not options.quiet)
    if report.torn:
        print(printable(report.torn), file=sys.stderr)
    print(f"wrote {options.out}: {report.num_steps} of {report.num_journal_steps} steps")
    return 0


def _report(options: ReportOptions) -> int:
    from distzo2.planning.report import run_report

    return run_report(options, print)


def _measure(options: MeasureOptions) -> int:
    from distzo2.planning.measure import run_measure

    return run_measure(options, _log)


def _plan(options: PlanOptions) -> int:
    from distzo2.planning.plan import run_plan

    return run_plan(options, _log)


def _journal(options: Namespace) -> int:
    return run_journal(options)


# Of each command: what it does, its options, and the function that runs it.
COMMANDS = {
    "finetune": ("fine-tune a checkpoint on a JSONL file", FinetuneOptions, _finetune),
    "eval": ("loss and accuracy of a checkpoint on a JSONL file", EvalOptions, _eval),
    "generate": ("text from a checkpoint, its weights streamed", GenerateOptions, _generate),
    "replay": ("rebuild the checkpoint of any step from a run's journal, bit for bit", ReplayOptions, _replay),
    "journal": ("show, check or compare the journals of runs", None, _journal),
    "report": ("a picture of a run: loss, time of a step, memory, transfers", ReportOptions, _report),
    "measure": ("rates of this machine's links, disk, cores and GPUs, and what slows them", MeasureOptions, _measure),
    "plan": ("memory, time of a step and the best mesh of a run, before it is started", PlanOptions, _plan),
}
