"""Shows that the tests of the copy engine and of block files notice when an ordering of theirs is left out.

    python tools/check_mutations.py build/mutations

The build must have been configured with DISTZO2_MUTATIONS. Every ordering of csrc/runtime/mutations.h is left out in
turn; for each, at least one test must fail or hang. With all of them kept, none may.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HEADER = Path(__file__).parent.parent / "csrc" / "runtime" / "mutations.h"
TESTS = ("copy_engine_cuda_test", "copy_engine_cpu_test", "block_file_crash_test")
SECONDS = 120.0  # a run without a mutation takes a few


def orderings() -> list[str]:
    """The names that the header lists."""
    table = HEADER.read_text().split("#define DISTZO2_ORDERINGS(X)")[1].split("enum class Ordering")[0]
    return re.findall(r"X\((\w+)\)", table)


def noticed_by(build: Path, dropped: str | None, rounds: int) -> str:
    """Which tests fail, hang or crash first, in at most `rounds` runs of each executable, since timing decides what a
    run meets; empty if none does. What is left out of a block file is looked for in its own test first."""
    tests = sorted(TESTS, key=lambda test: test.startswith("block") != (dropped or "").startswith("block"))
    environment = {name: value for name, value in os.environ.items() if name != "DISTZO2_DROP"}
    if dropped is not None:
        environment["DISTZO2_DROP"] = dropped
    for _ in range(rounds):
        for test in tests:
            command = [str(build / "tests" / test)]
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                return f"{test}: not done after {SECONDS:.0f} s"
            failed = re.findall(r"^FAIL (\w+)", done.stdout, flags=re.MULTILINE)
            if failed:
                return f"{test}: {', '.join(failed)}"
            if done.returncode < 0:  # a signal: a watchdog that saw a hang, or a crash
                hung = re.search(r"watchdog: (\w+) hangs", done.stderr)
                return f"{test}: {hung[1]} hangs" if hung else f"{test}: signal {-done.returncode}"
            if done.returncode:
                raise SystemExit(f"error: {test} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return ""


def main() -> int:
    """Parse the options, run, and say what was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="the build folder")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the tests in which a mutation must be noticed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args()
    unnoticed = []
    names = (None, *orderings(), None)  # with all of them kept, first and last, as often as with one left out
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, noticed in zip(
            names, pool.map(lambda name: noticed_by(options.build, name, options.rounds), names), strict=True
        ):
            if name is None and noticed:
                print(f"error: without a mutation: {noticed}", file=sys.stderr)
                pool.shutdown(cancel_futures=True)
                return 1
            if name is not None:
                print(f"{name:34} {noticed or 'NOT NOTICED'}", flush=True)
            if name is not None and not noticed:
                unnoticed.append(name)
    if unnoticed:
        print("error: no test notices that these are left out:", ", ".join(unnoticed), file=sys.stderr)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
