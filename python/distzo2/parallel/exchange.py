"""The scalars that ranks exchange: few, small collectives over gloo, opened by an agreed word.

The word says what a rank is about to do. Ranks that are about to do different things all get an error that names the
difference, and an exception on one rank is an error on all: nobody waits for a rank that will not come. Whoever waits
asks the heartbeat meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from distzo2.errors import DistZO2Error
from distzo2.interrupts import check_for_interrupt
from distzo2.parallel.heartbeat import Heartbeat, RankFailedError, describe
from distzo2.parallel.rendezvous import new_group

NUMBERS = 2  # plain numbers in a word
LONGEST_PAUSE = 5e-4  # seconds between two looks at a collective in flight
PATIENCE = 2.0  # seconds of waiting after which Ctrl-C need not wait for a safe point
LAST_WORDS = 2.0  # seconds that a rank waits for what another sent before it left


class RanksDisagreeError(DistZO2Error):
    """The ranks are about to do different things; raised on all of them."""


def is_known(error: BaseException) -> bool:
    """Whether all ranks know of an error already, so that it need not be reported to them once more."""
    return isinstance(error, RankFailedError | RanksDisagreeError) or hasattr(error, "known_to_all_ranks")


def hash64(value: Any) -> int:
    """A 64-bit hash of a value's text, as a signed number."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


class Exchange:
    """Collectives of all ranks. Every rank must call the same ones in the same order: `agree` finds out where not."""

    def __init__(self, rank: int, world_size: int, store: Any, heartbeat: Heartbeat, timeout: float) -> None:
        """
        Args:
            store: of the rendezvous, for words outside of collectives.
            timeout: seconds to wait for ranks that are alive.
        """
        self.rank, self.world_size, self.store, self.heartbeat = rank, world_size, store, heartbeat
        self._timeout = timeout
        self.broken: RankFailedError | None = None  # why no collective can follow
        self.before_each: Callable[[], None] | None = None  # called before each collective
        self.number = 0  # of the next collective
        self.counts = Counter(collectives=0, bytes_sent=0, bytes_received=0)  # see `group.stats`
        # Waiting is limited in `wait`, which asks the heartbeat meanwhile; gloo itself need not give up.
        self.group = self.start(lambda: new_group([range(world_size)], "gloo"))

    # ---- collectives --------------------------------------------------------------------------------------------

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[n] on each rank -> [ranks, n]."""
        values = values.contiguous()
        result = torch.empty(self.world_size, *values.shape, dtype=values.dtype)
        self._run(lambda: dist.all_gather(list(result.unbind(0)), values, group=self.group, async_op=True))
        self.counts.update(bytes_sent=values.nbytes, bytes_received=result.nbytes - values.nbytes)
        return result

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, into those of the others."""
        self._run(lambda: dist.broadcast(values, group_src=0, group=self.group, async_op=True))
        self.counts["bytes_received" if self.rank else "bytes_sent"] += values.nbytes
        return values

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Each rank's bytes, of any length."""
        lengths = self.gather(torch.tensor([len(data)]))[:, 0].tolist()
        rows = self.gather(_padded(data, max(*lengths, 1)))
        return [row.numpy().tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]

    def _run(self, start: Callable[[], Any]) -> None:
        if self.before_each is not None:
            self.before_each()
        self.wait(self.start(start))
        self.number += 1
        self.counts["collectives"] += 1

    def start(self, start: Callable[[], Any]) -> Any:
        """Calls what begins a collective of any group, makes a group, or makes a GPU wait; returns its result."""
        with self._or_give_up():
            self.heartbeat.check()
            return start()

    def wait(self, work: Any, quiet: bool = False) -> None:
        """Waits until a collective that was begun has ended on this rank, or another rank is lost. With `quiet` a
        failure is not reported to the others, since this rank does not need the result."""
        with self._or_give_up(quiet):
            now = begun_at = left_at = time.monotonic()
            pause = 2e-5
            while not work.is_completed():
                self.heartbeat.check()
                left_at = left_at if self.heartbeat.left else now
                if now > left_at + LAST_WORDS:
                    raise self.heartbeat.gone() if quiet else self.heartbeat.explain(self.heartbeat.gone())
                if now > begun_at + PATIENCE:
                    check_for_interrupt()
                if now > begun_at + self._timeout:
                    raise RankFailedError(
                        f"rank {self.rank} has waited {self._timeout:g} s for the other ranks, which are alive: one of "
                        "them is busy elsewhere (timeout= sets the limit)"
                    )
                time.sleep(pause)
                pause, now = min(2 * pause, LONGEST_PAUSE), time.monotonic()
            work.wait()

    @contextmanager
    def _or_give_up(self, quiet: bool = False) -> Iterator[None]:
        """Around what begins or awaits a collective: an error in it ends this mesh."""
        if self.broken is not None:
            raise copy(self.broken)
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError):  # of gloo or NCCL, and behind it the failure of a rank
                error = RankFailedError(describe(error)) if quiet else self.heartbeat.explain(error)
            raise self.give_up(error, quiet) from None

    def give_up(self, error: BaseException, quiet: bool = False) -> BaseException:
        """Ends this mesh, because a collective failed or could not be begun: the others may or may not have what was
        sent. Unless `quiet`, they get the error.

        Returns the error to raise: the known failure of another rank, from which this one may follow, or else `error`.
        """
        if isinstance(error, Exception) and self.heartbeat.failure is not None:
            error = copy(self.heartbeat.failure)
        if self.broken is None:
            text = f"this mesh cannot be used any more: {describe(error)}"
            self.broken = RankFailedError(text, getattr(error, "rank", self.rank), getattr(error, "told", False))
        if not isinstance(error, RankFailedError) and not quiet:
            self.heartbeat.post(f"rank {self.rank}: {describe(error)}")
        return error

    # ---- agreement ------------------------------------------------------------------------------------------------

    def agree(
        self, what: str, fields: Mapping[str, Any] = {}, numbers: Sequence[int] = (), error: BaseException | None = None
    ) -> list[list[int]]:
        """The agreed word: opens something that all ranks do together.

        Args:
            what: its name, in words.
            fields: what must be equal on all ranks, by name; compared by the hash of their `repr`.
            numbers: up to two numbers that the other ranks are to know.
            error: why this rank cannot take part; it is raised here, and the other ranks get its text.

        Returns:
            `numbers` of each rank.

        Raises:
            RanksDisagreeError: on all ranks; says what differs, and on which ranks.
            RankFailedError: another rank cannot take part, or is gone.
        """
        # A rank that cannot take part may have no fields; it fails before they are compared.
        hashes = [hash64(what), 0 if error is not None else hash64(fields)]
        numbers = [*numbers, 0, 0][:NUMBERS]
        words = self.gather(torch.tensor([int(error is not None), *hashes, *numbers])).tolist()
        self.settle(what, [row[0] for row in words], error)
        if any(row[1:3] != hashes for row in words):
            self._raise_difference(what, fields)
        return [row[3:] for row in words]

    def settle(self, what: str, failed: Sequence[bool | int], error: BaseException | None) -> None:
        """Ends on all ranks what has failed on one. `failed` [ranks] is the same on all of them; `error` is why this
        rank has failed."""
        if not any(failed):
            return
        texts = self.gather_bytes(b"" if error is None else describe(error).encode())
        if error is not None:
            error.known_to_all_ranks = True  # see `is_known`
            raise error
        first = next(rank for rank, has_failed in enumerate(failed) if has_failed)
        raise RankFailedError(f"rank {first} failed in {what}: {texts[first].decode()}", first, told=True)

    def _raise_difference(self, what: str, fields: Mapping[str, Any]) -> NoReturn:
        mine = [what, {name: repr(value) for name, value in fields.items()}]
        names, tables = zip(*map(json.loads, self.gather_bytes(json.dumps(mine).encode())), strict=True)
        if len(set(names)) > 1:
            raise RanksDisagreeError(f"the ranks do different things: {by_ranks(names)}")
        rows = {name: [table.get(name, "nothing") for table in tables] for name in tables[0]}
        differing = [f"{name}: {by_ranks(row)}" for name, row in rows.items() if len(set(row)) > 1]
        raise RanksDisagreeError(f"{what}: the ranks do not agree on {'; '.join(differing)}")

    # ---- built on it ------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, what: str) -> Iterator[dict[str, Any]]:
        """Around what every rank does: an exception of one rank in it is an error of all at its end, and so are entries
        that differ in the dict that it gives."""
        agreed, failure = {}, None
        try:
            yield agreed
        except BaseException as error:
            failure = error
            if is_known(error) or self.broken is not None:
                raise
        self.agree(what, agreed, error=failure)

    def from_rank_0(self, what: str, make: Callable[[], bytes]) -> bytes:
        """Returns on all ranks what `make` returns on rank 0; what it raises there is an error of all."""
        data, failure = b"", None
        try:
            data = make() if self.rank == 0 else b""
        except BaseException as error:
            failure = error
        length = self.agree(what, numbers=[len(data)], error=failure)[0][0]
        return self.broadcast(_padded(data, max(length, 1))).numpy().tobytes()[:length]


def _padded(data: bytes, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes]: `data`, and zeros behind it."""
    return torch.frombuffer(bytearray(data.ljust(num_bytes, b"\0")), dtype=torch.uint8)


def by_ranks(texts: Sequence[str]) -> str:
    """`a on ranks 0, 2, b on rank 1`; of long texts the part where they differ."""
    differing = (i for i, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)
    start = max(0, next(differing, min(map(len, texts))) - 40) if max(map(len, texts)) > 120 else 0
    ranks_of: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks_of.setdefault(("..." if start else "") + text[start : start + 120], []).append(str(rank))
    return ", ".join(f"{text} on rank{'s' if len(r) > 1 else ''} {', '.join(r)}" for text, r in ranks_of.items())
