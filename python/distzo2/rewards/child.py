"""The program of the process in which rewards run (:mod:`distzo2.rewards.worker` starts it).

Messages are JSON, in and out, over a socket whose number is the first argument. What rewards print goes to stderr.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


def end_with_parent(parent: int) -> None:
    """Ends this process and all that it started once the trainer is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def watch(parent: int, inherited: Connection) -> None:
    """Sees to it that this process, and all that it started, ends once the trainer is gone.

    A thread cannot do that while a reward keeps the GIL, as a regular expression does, so on Linux a process of this
    group waits for the trainer's end. (The kernel's PR_SET_PDEATHSIG would end this process alone, without what it
    started, and already when the trainer's thread ends that started it.)
    """
    try:
        trainer = os.pidfd_open(parent)
    except (AttributeError, OSError):  # elsewhere, or not allowed
        threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
        return
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)
    if between := os.fork():
        os.close(trainer)
        os.waitpid(between, 0)
        return
    if os.fork():  # no child of this process's, for which a reward could wait
        os._exit(0)
    inherited.close()
    select.select([trainer], [], [])
    os.killpg(0, signal.SIGKILL)


def values_of(reward: Callable[..., Any], prompts: list[str], completions: list[str], rows: list[Any]) -> list[float]:
    """Calls a reward; returns a finite number for each completion. Ends copies of this process that the reward forks.

    Raises:
        RewardError: the reward raises, or returns anything but a finite number for each.
    """
    from distzo2.errors import RewardError, one_line
    from distzo2.rewards.functions import checked

    own = os.getpid()
    try:
        return checked(reward(prompts, completions, rows), len(completions))
    except GeneratorExit as error:
        raise RewardError(RewardError.RAISED, one_line(error)) from error
    finally:
        if os.getpid() != own:
            os._exit(0)


def serve(connection: Connection, name: str, sha256: str | None) -> None:
    from distzo2.errors import DistZO2Error, RewardError, one_line
    from distzo2.rewards.functions import reward_named

    try:
        reward = reward_named(name, sha256)
        answer = {}
    except DistZO2Error as error:
        reward, answer = None, {"error": str(error)}
    while True:
        connection.send_bytes(json.dumps(answer).encode())
        prompts, completions, rows = json.loads(connection.recv_bytes())
        try:
            answer = {"values": values_of(reward, prompts, completions, rows)}
        except RewardError as error:
            answer = {"error": error.text, "reason": error.reason}
        except BaseException as error:  # no Ctrl-C: none reaches this process
            text = one_line(error)
            name = type(error).__name__
            answer = {"error": text if text == name else f"{name}: {text}", "reason": RewardError.RAISED}


if __name__ == "__main__":
    start = json.loads(sys.argv[2])
    sys.path[:] = start["path"]
    connection = Connection(int(sys.argv[1]))
    watch(start["parent"], connection)
    with suppress(EOFError, OSError):  # the trainer is gone, or has closed the worker
        serve(connection, start["name"], start["sha256"])
    os.killpg(0, signal.SIGKILL)
