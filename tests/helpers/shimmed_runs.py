"""Runs of the command line under the shim of file_shim.cpp: a server that has imported everything forks one a request.

As a program it is the server: a line of JSON on stdin is a request, a line of JSON on stdout is the answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("file_shim.cpp")


def build_shim(directory: Path) -> Path:
    library = directory / "file_shim.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@dataclass(frozen=True)
class Answer:
    """`num_calls`: that changed files below the watched directory."""

    status: int
    text: str
    num_calls: int


class ShimmedRuns:
    """The server; runs go one after another."""

    def __init__(self, shim: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "LD_PRELOAD": str(shim)},
            text=True,
        )

    def run(
        self,
        directory: Path,
        arguments: list[str],
        *,
        fail_at: int = 0,
        error: int = 0,
        and_all_after: bool = False,
        record: Path | None = None,
        limit: float = 120.0,
    ) -> Answer:
        """`distzo2 ARGUMENTS` in `directory`; files below `directory`/out are watched."""
        request = {
            "directory": str(directory), "arguments": arguments, "fail_at": fail_at, "error": error,
            "on": and_all_after, "record": str(record or ""),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        assert ready, f"{arguments} hangs with call {fail_at} failing ({os.strerror(error)})"
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def _serve() -> None:
    import preloaded  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        directory = Path(request["directory"])
        child = os.fork()
        if child == 0:
            _run(request)
        _, status = os.waitpid(child, 0)
        num_calls = int((directory / "calls").read_text()) if (directory / "calls").exists() else -1
        text = (directory / "log").read_text()
        answer = {"status": os.waitstatus_to_exitcode(status), "text": text, "num_calls": num_calls}
        print(json.dumps(answer), flush=True)


def _run(request: dict) -> None:
    from distzo2.cli.main import main

    shim = ctypes.CDLL(None)
    os.chdir(request["directory"])
    (Path(request["directory"]) / "calls").unlink(missing_ok=True)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    shim.shim_watch(
        os.path.join(request["directory"], "out").encode(), request["record"].encode(),
        ctypes.c_long(request["fail_at"]), request["error"], request["on"],
    )  # fmt: skip
    status = 70
    try:
        status = main(request["arguments"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        shim.shim_num_calls.restype = ctypes.c_long
        num_calls = shim.shim_num_calls()
        shim.shim_watch(b"", b"", 0, 0, 0)
        Path("calls").write_text(str(num_calls))
        os._exit(status)


if __name__ == "__main__":
    _serve()
