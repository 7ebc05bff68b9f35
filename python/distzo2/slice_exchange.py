"""Whose turn a block is: the ranks of a node, each of which holds a slice of every streamed block, gather one together.

A gather needs every rank of the node, and the ranks run code of their own: other lanes, none, an evaluation on one of
them, an exception. So the gathers of a node are a sequence of **rounds**. In each round every rank says one word: which
block it wants, or that it wants none, since it stands before a collective of scalars. All see all words, and bring the
block that the lowest rank wants, whoever else had wanted another; when nobody wants one, all go on to their collective.
So each rank is served in its turn, and a rank with no lanes serves the others meanwhile. Words are said ahead of time,
for the blocks that are expected next, and while the lanes compute the gathers go on.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from distzo2.errors import DistZO2Error
from distzo2.heartbeat import RankFailedError, describe

if TYPE_CHECKING:
    from distzo2.exchange import Exchange
    from distzo2.sliced_store import SlicedStore

WORD_BYTES = 32


class Want(NamedTuple):
    """A word: which block is wanted. `wants` is 0 from a rank that stands before a collective of scalars."""

    wants: int
    store: int  # in the order in which the ranks made them
    unit: int
    version: int  # updates that must be in it


NONE = Want(0, 0, 0, 0)


class _Round(NamedTuple):
    mine: Want
    words: torch.Tensor  # int64 [ranks of the node, 4]
    work: Any


class SliceExchange:
    """The rounds and the gathers of this rank's node. Used by one thread."""

    def __init__(
        self, exchange: Exchange, ranks: Sequence[int], words_group: Any, bytes_group: Any, device_backend: str
    ) -> None:
        """
        Args:
            exchange: of all ranks; once there are stores, the rounds come to an end before each of its collectives.
            ranks: of this node, ascending.
            words_group: their gloo group.
            bytes_group: their group for blocks, of `device_backend` ("gloo" or "nccl").
        """
        self.ranks, self.index = tuple(ranks), list(ranks).index(exchange.rank)
        self.exchange, self.backend = exchange, device_backend
        self._words_group, self._bytes_group = words_group, bytes_group
        self._stores: list[weakref.ref[SlicedStore]] = []
        self._rounds: deque[_Round] = deque()  # said, and not yet acted on
        self.reset_stats()

    @property
    def size(self) -> int:
        """Ranks of this node."""
        return len(self.ranks)

    @property
    def in_use(self) -> bool:
        """Whether there has been a store."""
        return bool(self._stores)

    @property
    def groups(self) -> list[Any]:
        return [self._words_group, self._bytes_group]

    def register(self, store: SlicedStore) -> int:
        """The number of a store; the ranks make theirs in the same order."""
        self.exchange.before_each = self.meet
        self._stores.append(weakref.ref(store))
        return len(self._stores) - 1

    # ---- figures --------------------------------------------------------------------------------------------------

    def reset_stats(self) -> None:
        self.num_rounds = self.num_gathers = self.bytes_sent = self.bytes_received = 0

    def stats(self) -> dict[str, int]:
        """Rounds, gathers, and the bytes of both: each rank sends its word or slice, and receives the others'."""
        words = WORD_BYTES * self.num_rounds
        return {
            "rounds": self.num_rounds,
            "gathers": self.num_gathers,
            "bytes_sent": self.bytes_sent + words,
            "bytes_received": self.bytes_received + words * (self.size - 1),
        }

    # ---- rounds -------------------------------------------------------------------------------------------------

    def say(self, word: Want) -> None:
        """This rank's word of the next round; returns at once."""
        import torch.distributed as dist

        mine = torch.tensor(word, dtype=torch.int64, device="cpu")
        words = torch.empty(self.size, len(word), dtype=torch.int64, device="cpu")
        work = self.exchange.start(
            lambda: dist.all_gather(list(words.unbind(0)), mine, group=self._words_group, async_op=True)
        )
        self._rounds.append(_Round(word, words, work))
        self.num_rounds += 1

    def is_said(self, word: Want) -> bool:
        """Whether this rank has said it in a round that has not been acted on."""
        return any(r.mine == word for r in self._rounds)

    @property
    def answered(self) -> bool:
        """Whether all words of the oldest such round are here."""
        return bool(self._rounds) and self._rounds[0].work.is_completed()

    def act(self) -> bool:
        """Waits for the words of the oldest round and begins its gather.

        Returns:
            Whether there was none to begin: all ranks stand before a collective of scalars.
        """
        self.exchange.wait(self._rounds[0].work)
        words = [Want(*row) for row in self._rounds.popleft().words.tolist()]
        wanted = next((word for word in words if word.wants), None)
        if wanted is None:
            return True
        try:
            store = self._stores[wanted.store]() if wanted.store < len(self._stores) else None
            if store is None:
                raise DistZO2Error("another rank wants a block of a model that this one has not, or has closed")
            store.begin(wanted.unit, wanted.version)
        except RuntimeError as error:
            raise self.exchange.give_up(DistZO2Error(describe(error))) from error
        except BaseException as error:  # the others wait for this rank's slice, which will not come
            raise self.exchange.give_up(error) from error.__cause__
        return False

    def bring(self, word: Want, begun: Callable[[], bool]) -> None:
        """Takes part in rounds until the gather that is wanted has begun."""
        while not begun():
            if not self._rounds:
                self.say(word)
            self.act()

    def meet(self) -> None:
        """Serves the other ranks of the node until all of them stand before a collective of scalars."""
        while True:
            if not self._rounds:
                self.say(NONE)
            if self.act():
                return

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def gather(self, parts: Sequence[torch.Tensor]) -> list[Any]:
        """Begins a gather: `parts` are the ranks' slices, consecutive in memory, this rank's own filled.

        Returns:
            What to `wait` for.
        """
        import torch.distributed as dist

        own, total = parts[self.index].numel(), sum(part.numel() for part in parts)
        self.num_gathers += 1
        self.bytes_sent += own
        self.bytes_received += total - own
        if self.backend == "nccl" and len({part.numel() for part in parts}) == 1:
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            whole = parts[0].as_strided((total,), (1,))
            return [self.exchange.start(lambda: all_gather(whole, parts[self.index], self._bytes_group, True))]
        # gloo's all-gather goes through a copy of the whole; its broadcasts write where the bytes belong.
        return [self._broadcast(part, i) for i, part in enumerate(parts)]

    def _broadcast(self, part: torch.Tensor, index: int) -> Any:
        import torch.distributed as dist

        group = self._bytes_group
        return self.exchange.start(lambda: dist.broadcast(part, group_src=index, group=group, async_op=True))

    def wait(self, work: Any) -> None:
        """Until a part of a gather has ended; on a GPU what follows on the current stream waits, and not the host."""
        if self.backend == "nccl":
            work.wait()
        else:
            self.exchange.wait(work)

    def abort(self) -> None:
        """Ends what is in flight on a GPU, where a rank that is lost would be waited for without end."""
        if self.backend == "nccl":
            self._bytes_group._get_backend(torch.device("cuda")).abort()

    # ---- the end ----------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """A model is closed, or the mesh left: serves the others until they need no slice of this rank."""
        if not self.in_use or self.exchange.broken or self.exchange.heartbeat.failure is not None:
            return
        with suppress(RankFailedError):
            self.meet()


def node_name(environment: dict[str, str], host: str) -> str:
    """Names the node of a rank: torchrun's number for it, or else the machine."""
    number = environment.get("GROUP_RANK")
    return host if number is None else f"{host} {number}"
