"""Writes distzo2_core/_C.pyi, the type stubs of the compiled extension, from its signatures and docstrings.

    python tools/stubs.py            # after a change of csrc/bindings
    python tools/stubs.py --check    # fails where the file is not current

The extension must be built as csrc says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "distzo2_core" / "_C.pyi"
HEAD = "# Written by tools/stubs.py (make stubs); edit csrc/bindings instead.\n"


def make_stubs() -> str:
    """What the file should say of the extension that is built here."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "pybind11_stubgen", "distzo2_core._C", "--exit-code", "--output-dir", folder]
        subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True)
        text = (Path(folder) / "distzo2_core" / "_C.pyi").read_text()
    text = text.replace("typing.SupportsInt | typing.SupportsIndex", "int")
    text = "\n".join(line.rstrip() for line in text.splitlines())
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "stubs.pyi", "-"]
    return subprocess.run(ruff, check=True, input=HEAD + text, capture_output=True, text=True).stdout


def main() -> int:
    """Parse the options, then write the file or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the file is not current")
    text = make_stubs()
    if not parser.parse_args().check:
        STUBS.write_text(text)
    elif not STUBS.exists() or STUBS.read_text() != text:
        print(f"error: {STUBS.relative_to(ROOT)} is not current: run make stubs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
