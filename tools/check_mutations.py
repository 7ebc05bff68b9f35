"""Shows that the copy engine's tests notice when an ordering of its transfers is left out.

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
from pathlib import Path

HEADER = Path(__file__).parent.parent / "csrc" / "runtime" / "mutations.h"
TESTS = ("copy_engine_cuda_test", "copy_engine_cpu_test")
SECONDS = 120.0  # a run without a mutation takes a few


def orderings() -> list[str]:
    """The names that the header lists."""
    table = HEADER.read_text().split("#define DISTZO2_ORDERINGS(X)")[1].split("enum class Ordering")[0]
    return re.findall(r"X\((\w+)\)", table)


def failing_tests(build: Path, dropped: str | None, rounds: int) -> list[str]:
    """The first tests that fail, in at most `rounds` runs of each executable, since timing decides what a run meets."""
    environment = {name: value for name, value in os.environ.items() if name != "DISTZO2_DROP"}
    if dropped is not None:
        environment["DISTZO2_DROP"] = dropped
    for _ in range(rounds):
        for test in TESTS:
            command = [str(build / "tests" / test)]
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                return [f"{test}: hangs"]
            if done.returncode:
                names = re.findall(r"^FAIL (\w+)", done.stdout, flags=re.MULTILINE)
                return [f"{test}: {name}" for name in names] or [f"{test}: status {done.returncode}"]
    return []


def main() -> int:
    """Parse the options, run, and say what was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="the build folder")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the tests in which a mutation must be noticed")
    options = parser.parse_args()
    failed = failing_tests(options.build, None, 1)
    if failed:
        print("error: without a mutation:", ", ".join(failed), file=sys.stderr)
        return 1
    unnoticed = []
    for name in orderings():
        failed = failing_tests(options.build, name, options.rounds)
        print(f"{name:34} {', '.join(failed) if failed else 'NOT NOTICED'}", flush=True)
        if not failed:
            unnoticed.append(name)
    if unnoticed:
        print("error: no test notices that these are left out:", ", ".join(unnoticed), file=sys.stderr)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
