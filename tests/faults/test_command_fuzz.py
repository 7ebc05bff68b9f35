"""The program on damaged configurations, tokenizers, data and options: a status and one line, never a traceback.

A short form runs here; DISTZO2_NUM_MUTANTS=2000 is the long one (`make fuzz`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import command_fuzz
import pytest

NUM_MUTANTS = int(os.environ.get("DISTZO2_NUM_MUTANTS", "30"))


@pytest.mark.timeout(120 + 4 * NUM_MUTANTS)
def test_no_input_ends_in_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, command_fuzz.__file__, tmp_path, "0", str(NUM_MUTANTS)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *failures, summary = done.stdout.splitlines()
    print(summary)
    assert not failures, "\n".join(failures)
    counts = json.loads(summary)
    assert counts["status 0"] >= NUM_MUTANTS // 10 and counts["status 1"] >= NUM_MUTANTS // 10
