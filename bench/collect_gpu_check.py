"""Puts what gpu_check.sh left in its scratch folder into one JSON file.

python bench/collect_gpu_check.py SCRATCH SECONDS FILE
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench_common import machine


def test_counts(path: Path) -> dict[str, int] | None:
    """passed, failed (errors among them) and skipped of a JUnit file; None where the tests did not end."""
    if not path.exists():
        return None
    suites = ElementTree.parse(path).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, "0"))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def main() -> None:
    """Read the stages, the tests' file and the benches' files, write the result and print a summary."""
    scratch, seconds, target = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    stages = []
    for line in (scratch / "stages").read_text().splitlines():
        name, status, duration = line.split()
        stages.append({"stage": name, "status": int(status), "seconds": int(duration)})
    result = {
        "machine": machine(),
        "seconds": seconds,
        "stages": stages,
        "python_tests": test_counts(scratch / "tests.xml"),
    }
    for name in ("kernels", "copy", "step"):
        path = scratch / f"{name}.json"
        # bench_step.py writes one line a run, the others one object.
        parts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        result[name] = [row for part in parts for row in part.get("rows", [part])]
    target.write_text(json.dumps(result, indent=1) + "\n")
    for stage in stages:
        print(f"  {stage['stage']:14} {stage['seconds']:4} s  {'ok' if stage['status'] == 0 else 'FAILED'}")
    print(f"python tests: {result['python_tests']}; {seconds} s in all; wrote {target}")


if __name__ == "__main__":
    main()
