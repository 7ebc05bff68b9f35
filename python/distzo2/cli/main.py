"""The command `distzo2`.

Expected errors are one line on stderr and exit status 1, wrong usage is 2, Ctrl-C 130, SIGTERM 143.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from distzo2.cli.journal import add_journal, journal_path, run_journal
from distzo2.errors import DistZO2Error, UsageError
from distzo2.planning.plan_options import add_plan
from distzo2.run.finetune_options import add_finetune
from distzo2.run.options import (
    Formatter,
    Parser,
    add_data,
    add_placement,
    positive_int,
    seed_int,
    whole_float,
    whole_int,
)
from distzo2.text import printable
from distzo2.version import __version__

INTERRUPTED = 130
TERMINATED = 143
ABOUT = "Fine-tune language models with forward passes only, their weights streamed block by block through the device."


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and those of its commands."""
    parser = Parser(prog="distzo2", description=ABOUT, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"distzo2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> Parser:
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=Formatter
        )
        sub.set_defaults(run=run)
        return sub

    add_finetune(command("finetune", "fine-tune a checkpoint on a JSONL file", _finetune))

    sub = command("eval", "loss and accuracy of a checkpoint on a JSONL file", _eval)
    sub.add_argument("--model", required=True, metavar="DIR", help="directory of a Hugging Face checkpoint")
    sub.add_argument("--eval", required=True, metavar="FILE", help="JSONL of lines as for finetune")
    sub.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="examples in a micro-batch")
    sub.add_argument("--json", action="store_true", help="print one line of JSON")
    add_data(sub)
    add_placement(sub)

    sub = command("generate", "text from a checkpoint, its weights streamed", _generate)
    sub.add_argument("--model", required=True, metavar="DIR", help="directory of a Hugging Face checkpoint")
    sub.add_argument("--prompt", metavar="TEXT", help="how the text begins (default: read from standard input)")
    sub.add_argument("--max-new-tokens", type=positive_int, default=64, metavar="N", help="tokens to add at most")
    sub.add_argument(
        "--temperature", type=whole_float, default=0.0, help="of sampling; 0: the likeliest token each time"
    )
    sub.add_argument(
        "--top-k", type=whole_int, default=50, metavar="K", help="sample among the K likeliest tokens; 0: all"
    )
    sub.add_argument("--seed", type=seed_int, default=0, help="of sampling")
    add_placement(sub)

    sub = command("replay", "rebuild the checkpoint of any step from a run's journal, bit for bit", _replay)
    sub.add_argument(
        "run_dir",
        nargs="?",
        metavar="RUN",
        help="directory of a run; its base checkpoint is the one it names. Or BASE,"
        " a base checkpoint, with JOURNAL after it",
    )
    sub.add_argument("journal_file", nargs="?", metavar="JOURNAL", help="journal, or run, of a run on BASE")
    sub.add_argument("--base", metavar="DIR", help="base checkpoint (default: the one that RUN names)")
    sub.add_argument("--journal", metavar="FILE", help="journal (default: RUN/journal.jsonl)")
    sub.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="where the checkpoint is written; it must not hold one"
    )
    sub.add_argument("--to-step", type=whole_int, metavar="N", help="updates to apply (default: all)")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")

    add_journal(command("journal", "show, check or compare the journals of runs", run_journal))

    sub = command("report", "a picture of a run: loss, time of a step, memory, transfers", _report)
    sub.add_argument("run_dir", metavar="RUN", help="directory of a run")
    sub.add_argument("--out", metavar="FILE", help="PNG to write (default: RUN/report.png)")

    sub = command("measure", "rates of this machine's links, disk, cores and GPUs, and what slows them", _measure)
    sub.add_argument(
        "--directory", default=".", metavar="DIR", help="directory on the disk to measure, where weights would be kept"
    )
    sub.add_argument("--json", metavar="FILE", help="where the figures go (default: measure.json in ~/.cache/distzo2)")
    sub.add_argument("--quick", action="store_true", help="a few seconds, and rough figures")

    sub = command("plan", "memory, time of a step and the best mesh of a run, before it is started", _plan)
    add_plan(sub)
    return parser, commands.choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    terminated = _Terminated()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # what its encoding lacks is escaped
            with suppress(OSError, ValueError):  # a stream that is broken says so when it is written
                stream.reconfigure(errors="backslashreplace")
    try:
        with terminated:
            parser, commands = build_parser()
            options = parser.parse_args(arguments)
            if options.command == "finetune":
                from distzo2.run import launch

                options = launch.parse(commands["finetune"], arguments[arguments.index("finetune") + 1 :], options)
            _quiet_libraries()
            return options.run(options)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (python flushes it at exit)
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return _end_with(error, terminated.happened)


def _end_with(error: BaseException, terminated: bool) -> int:
    """Tells of what ended a command; returns the exit status."""
    from distzo2.run import launch

    error = launch.first_cause(error, terminated)
    interrupted = isinstance(error, KeyboardInterrupt)
    if not interrupted and (os.environ.get("DISTZO2_TRACEBACK") or not _expected(error)):
        raise error
    text = printable(" ".join(_text_of(error).split())) or ("interrupted" if interrupted else type(error).__name__)

    def show(text: str) -> None:
        print(f"distzo2: {'' if interrupted else 'error: '}{text}", file=sys.stderr, flush=True)

    launch.tell(error, text, show)
    launch.parallel.shutdown(error)
    if interrupted:
        return TERMINATED if terminated else INTERRUPTED
    return 2 if isinstance(error, UsageError) else 1


def _text_of(error: BaseException) -> str:
    """What an error says; of the system's, the file and the reason, without the number."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _expected(error: Exception) -> bool:
    """Whether an error is the world's and not a mistake of ours, so that a traceback would help nobody."""
    if isinstance(error, DistZO2Error | OSError | MemoryError):
        return True
    import torch

    from distzo2_core import BackendError

    return isinstance(error, BackendError | torch.OutOfMemoryError)


class _Terminated:
    """Makes SIGTERM end a run as Ctrl-C does, at a point where the step in flight is whole or dropped.

    A process that was started to ignore Ctrl-C, as with nohup, goes on ignoring it.
    """

    happened = False

    def __enter__(self) -> _Terminated:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_terminate)
            if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        self.happened = True
        signal.raise_signal(signal.SIGINT)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.happened:
            raise KeyboardInterrupt


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


def _finetune(options: argparse.Namespace) -> int:
    from distzo2.parallel import group as parallel
    from distzo2.run import launch
    from distzo2.run.preflight import gib
    from distzo2.run.train import finetune

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


def _interrupted(options: argparse.Namespace) -> str:
    from distzo2.record.journal import read_journal

    try:
        num_steps = len(read_journal(os.path.join(options.out, "journal.jsonl")).entries)
    except (OSError, DistZO2Error):
        return "interrupted before the first step: nothing was written"
    return (
        f"interrupted: {num_steps} steps are in the journal; go on with distzo2 finetune --resume --out {options.out}"
    )


def _eval(options: argparse.Namespace) -> int:
    from distzo2.run.inference import evaluate_file

    score, objective = evaluate_file(options)
    if options.json:
        print(
            json.dumps(
                {"loss": score.loss, "accuracy": score.accuracy, "examples": score.num_examples, "objective": objective}
            )
        )
    else:
        print(f"{objective}: loss {score.loss:.4f}, accuracy {score.accuracy:.2%} ({score.num_examples} examples)")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from distzo2.run.inference import generate_text

    if options.prompt is None:
        options.prompt = _standard_input()
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


def _replay(options: argparse.Namespace) -> int:
    from distzo2.checkpoint.replay import replay
    from distzo2.run.directory import saved_options

    if options.journal_file is not None:
        if options.base is not None or options.journal is not None:
            raise UsageError("replay BASE JOURNAL takes neither --base nor --journal")
        options.base, options.journal = options.run_dir, os.fspath(journal_path(options.journal_file))
    if options.run_dir is None and (options.base is None or options.journal is None):
        raise UsageError("replay needs RUN, or BASE and JOURNAL, or both --base and --journal")
    if not options.out:
        raise UsageError("replay --out is empty")
    if os.path.lexists(options.out) and not os.path.isdir(options.out):
        raise UsageError(f"--out {options.out}: a directory was expected")
    base = options.base or saved_options(options.run_dir)["model"]
    journal = (
        os.fspath(journal_path(options.journal)) if options.journal else os.path.join(options.run_dir, "journal.jsonl")
    )
    report = replay(base, journal, options.out, to_step=options.to_step, progress=not options.quiet)
    if report.torn:
        print(printable(report.torn), file=sys.stderr)
    print(f"wrote {options.out}: {report.num_steps} of {report.num_journal_steps} steps")
    return 0


def _report(options: argparse.Namespace) -> int:
    from distzo2.planning.report import run_report

    return run_report(options, print)


def _measure(options: argparse.Namespace) -> int:
    from distzo2.planning.measure import run_measure

    return run_measure(options, _log)


def _plan(options: argparse.Namespace) -> int:
    from distzo2.planning.plan import run_plan

    return run_plan(options, _log)
