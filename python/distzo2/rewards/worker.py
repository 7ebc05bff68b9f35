"""Where rewards run: in a process that is killed when it takes too long, or here."""

from __future__ import annotations

import contextvars
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from distzo2.errors import RewardError, UsageError
from distzo2.interrupts import check_for_interrupt
from distzo2.rewards import child
from distzo2.rewards.functions import WORDS, Reward, Row, digest, figure_of, parsed, reward_named
from distzo2.streaming.isolation import CallerState
from distzo2.streaming.lanes import LaneThread

LOAD_SECONDS = 120.0  # what importing a reward's file may take
POLL_SECONDS = 0.2  # between looks for Ctrl-C
_T = TypeVar("_T")


class InlineReward:
    """A reward that runs in this process: nothing but Ctrl-C ends the wait for it. What it prints goes to stderr."""

    def __init__(self, name: str) -> None:
        """
        Raises:
            UsageError: `reward_named` refuses it.
        """
        self.name, self.sha256 = name, digest(name)
        with redirect_stdout(sys.stderr):
            self._reward = reward_named(name, self.sha256)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """A number for each completion; higher is better.

        Raises:
            RewardError: the function raises, or returns anything but a finite number for each.
            KeyboardInterrupt: Ctrl-C came, also in a lane, where a pass over the weights keeps it.
        """
        call = functools.partial(child.values_of, self._reward, prompts, completions, rows)
        with redirect_stdout(sys.stderr):
            return _interruptible(call) if isinstance(threading.current_thread(), LaneThread) else call()

    def close(self) -> None:
        """No-op."""


def _interruptible(call: Callable[[], _T]) -> _T:
    """What `call` returns or raises, for a lane: it runs in a thread of its own, in the lane's context and state, and
    this one looks for Ctrl-C, which leaves that thread behind, whatever it waits for."""
    on_gpu = torch.cuda.is_initialized()
    state = CallerState(torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))
    made: Future[_T] = Future()

    def run() -> None:
        state.enter()
        try:
            made.set_result(call())
        except BaseException as error:
            made.set_exception(error)
        finally:
            state.thread_state.exit()

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="distzo2-reward", daemon=True).start()
    while not wait([made], POLL_SECONDS).done:
        check_for_interrupt(in_lane=True)
    return made.result()


class RewardWorker:
    """A reward in a process of its own, which is killed, with all that it started, when it takes longer than `timeout`
    seconds; the next call starts another. Calls from several threads wait for each other."""

    def __init__(self, name: str, timeout: float) -> None:
        """
        Raises:
            UsageError: `reward_named` refuses it.
        """
        self.name, self.sha256, self.timeout = name, digest(name), timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._start()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """A number for each completion; higher is better.

        Raises:
            RewardError: the function raises, takes too long, ends its process, or returns anything but a finite number
                for each.
            KeyboardInterrupt: Ctrl-C came, also where a pass over the weights keeps it; the process is then ended.
        """
        with self._lock:
            if self._process is None:
                self._start()
            answer = self._ask([list(prompts), list(completions), list(rows)], self.timeout)
        if "error" in answer:
            raise RewardError(answer["reason"], answer["error"])
        return answer["values"]

    def _start(self) -> None:
        self._connection, other = multiprocessing.Pipe()
        start = {"parent": os.getpid(), "path": sys.path, "name": self.name, "sha256": self.sha256}
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", child.__file__, str(other.fileno()), json.dumps(start)],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env={**os.environ, "PYTHONHASHSEED": "0"},  # an order of sets is that of every other process
                start_new_session=True,  # a group to be killed, which no Ctrl-C reaches
            )
        answer = self._ask(None, max(LOAD_SECONDS, self.timeout))
        if "error" in answer:
            self.close()
            raise UsageError(answer["error"])

    def _ask(self, message: Any, seconds: float) -> dict[str, Any]:
        """The answer to a message; to None, what the process says when it has loaded the reward."""
        try:
            if message is not None:
                self._connection.send_bytes(json.dumps(message).encode())
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                if self._connection.poll(min(left, POLL_SECONDS)):
                    return json.loads(self._connection.recv_bytes())
                check_for_interrupt(in_lane=isinstance(threading.current_thread(), LaneThread))
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):  # it has ended, or is about to
                self._process.wait(1.0)
            status = self.close()
            raise RewardError(RewardError.RAISED, f"its process ended with status {status}") from None
        except BaseException:
            self.close()  # what it answers later would be taken for the next answer
            raise
        self.close()
        raise RewardError(RewardError.SLOW, f"{Path(self.name).name} took more than {seconds:g} seconds")

    def close(self) -> int | None:
        """Ends the process and all that it started; returns its status. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def open_reward(name: str, *, timeout: float = 60.0, inline: bool = False) -> InlineReward | RewardWorker:
    """The reward of that name (:mod:`distzo2.rewards.functions` lists them), to be closed when it is no longer called.
    Those that only compare words need no process.

    Raises:
        UsageError: there is none, or its file cannot be used.
    """
    inline = inline or parsed(name)[0] not in ("regex", "json", "file")
    return InlineReward(name) if inline else RewardWorker(name, timeout)


def open_scores(score: str | None, reward: Reward | None = None, **options: Any) -> dict[str, Any]:
    """The rewards, by the names of their figures, that an evaluation needs for a score, besides the run's own
    `reward`. `options` are of `open_reward`."""
    rewards = {} if reward is None else {"reward": reward}
    name = figure_of(score, None if reward is None else reward.name) if score else "loss"
    if name in WORDS:
        rewards |= WORDS
    elif name not in ("loss", "accuracy", *rewards):
        rewards[name] = open_reward(score, **options)
    return rewards
