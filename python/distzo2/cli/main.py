"""The command `distzo2`.

Expected errors are one line on stderr and exit status 1, wrong usage is 2, Ctrl-C 130, SIGTERM 143.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distzo2.cli import journal
from distzo2.cli.arguments import Formatter, Parser, add_options, refuse
from distzo2.cli.ending import end_with, terminated_as_interrupted
from distzo2.cli.options import MeasureOptions, PlanOptions, ReplayOptions, ReportOptions, TasksOptions
from distzo2.errors import UsageError
from distzo2.option_types import checked, made, read_config
from distzo2.run.options import (
    LEFT,
    EvalOptions,
    FinetuneOptions,
    GenerateOptions,
    SignalOptions,
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
            journal.add_journal(sub)
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
        left = {"finetune": LEFT, "journal": journal.LEFT}.get(name, {})
        refuse(commands[name], left, {other: each for other, (_, each, _) in COMMANDS.items() if each}, unknown)
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what its encoding lacks is escaped
    terminated: list[int] = []
    try:
        with terminated_as_interrupted() as terminated:
            name, options = parse(sys.argv[1:] if arguments is None else arguments)
            _quiet_libraries()
            return COMMANDS[name][2](options)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (python flushes it at exit)
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return end_with(error, bool(terminated))


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

    launch.make_mesh(options, _log)
    finetune(options, _log)
    parallel.shutdown()
    return 0


def _eval(options: EvalOptions) -> int:
    from distzo2.run.inference import evaluate_file
    from distzo2.run.metrics import finite

    score, objective = evaluate_file(options)
    figures = {**score.figures(), "examples": score.num_examples, "objective": objective}
    text = f"{options.task or objective}: {score} ({score.num_examples} examples)"
    print(json.dumps(finite(figures)) if options.json else text)
    return 0


def _tasks(options: TasksOptions) -> int:
    from distzo2.datasets.rows import read_tasks, table_of_tasks

    print("\n".join(table_of_tasks(read_tasks(options.task_file))))
    return 0


def _signal(options: SignalOptions) -> int:
    from distzo2.run.inference import json_of_signals, signals_of_file, table_of_signals

    signals = signals_of_file(options)
    print(json.dumps(json_of_signals(signals)) if options.json else "\n".join(table_of_signals(signals)))
    return 0


def _generate(options: GenerateOptions) -> int:
    from distzo2.run.inference import generate_text

    if options.prompt is None:
        options = replace(options, prompt=sys.stdin.read())
    generate_text(options)
    return 0


def _replay(options: ReplayOptions) -> int:
    from distzo2.models.replay import replay
    from distzo2.peft.replay import replay_adapter
    from distzo2.run.directory import saved_options

    run, base = options.run_dir, options.base
    if options.journal_file is not None:  # BASE JOURNAL
        base = run
    steps = journal.journal_path(options.journal or options.journal_file or run)
    start = Path(options.adapter or Path(steps).parent / "adapter_start")
    adapts = options.adapter or start.is_dir()
    if options.merge and not adapts:
        raise UsageError("--merge: the run trains no adapter; name the one that it began with by --adapter")
    if options.merge or not adapts:
        base = base or saved_options(run)["model"]
    more = {"to_step": options.to_step, "progress": not options.quiet}
    if options.packed and adapts:
        raise UsageError("--packed: the run trains an adapter, and leaves the packed files as they are")
    if adapts:
        report = replay_adapter(start, steps, options.out, base_dir=base if options.merge else None, **more)
    else:
        report = replay(base, steps, options.out, packed=options.packed, **more)
    if report.torn:
        print(printable(report.torn), file=sys.stderr)
    print(f"wrote {options.out}: {report.num_steps} of {report.num_journal_steps} steps")
    return 0


def _planning(name: str, log: Callable[[str], None]) -> Callable[[Any], int]:
    """The function that runs a command from distzo2.planning; its module is imported when it is called."""
    return lambda options: getattr(importlib.import_module(f"distzo2.planning.{name}"), f"run_{name}")(options, log)


# Of each command: what it does, its options, and the function that runs it.
COMMANDS = {
    "finetune": ("fine-tune a checkpoint on a JSONL file or a published task", FinetuneOptions, _finetune),
    "eval": ("loss and accuracy of a checkpoint on a JSONL file or a published task", EvalOptions, _eval),
    "tasks": ("the published tasks that finetune and eval read: data sets, fields, metrics", TasksOptions, _tasks),
    "signal": ("how much of a step is signal, by compute dtype and eps", SignalOptions, _signal),
    "generate": ("text from a checkpoint, its weights streamed", GenerateOptions, _generate),
    "replay": ("rebuild the checkpoint of any step from a run's journal, bit for bit", ReplayOptions, _replay),
    "journal": ("show, check or compare the journals of runs", None, journal.run_journal),
    "report": ("a picture of a run: loss, time, memory, transfers", ReportOptions, _planning("report", print)),
    "measure": ("rates of this machine's links, disk, cores and GPUs", MeasureOptions, _planning("measure", _log)),
    "plan": ("memory, time of a step and best mesh of a run, before it starts", PlanOptions, _planning("plan", _log)),
}
