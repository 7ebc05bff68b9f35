"""Which block the ranks of a node gather next. Each of them holds a slice of every streamed block.

A gather needs every rank of the node, but ranks run different code: other lanes, none, an evaluation on one of them, an
exception. So the gathers of a node are a sequence of **rounds**. In each round every rank says one word: the block that
it wants, or that it wants none because it stands before a collective of scalars, closes a model or ends. All ranks see
all words and gather a block that one of them wants, each rank's in its turn. A collective of scalars begins when all
ranks stand before it. So every rank is served, and a rank with no lanes serves the others meanwhile. Words are said
ahead, for the blocks that are expected next, and gathers run while the lanes compute.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distzo2.errors import DistZO2Error
from distzo2.parallel.exchange import Exchange
from distzo2.parallel.heartbeat import RankFailedError, left_mesh
from distzo2.parallel.rendezvous import new_group

READY, WANTS, LEAVES, ENDS = range(4)
# What libraries call; collectives of objects are made of these.
_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "gather", "monitored_barrier", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter",
)  # fmt: skip
_plain: dict[tuple[Any, str], Callable[..., Any]] = {}  # functions of torch.distributed that others stand in for


class Word(NamedTuple):
    """What a rank is about to do: READY for a collective of scalars, WANTS a block, LEAVES a model, or ENDS."""

    kind: int
    store: int = 0  # in the order in which the ranks made them
    unit: int = 0
    stamp: int = 0  # of a block that is wanted: what it must hold; READY: the collective's number


class _Round(NamedTuple):
    mine: Word
    words: torch.Tensor  # int64 [ranks of the node, 4]
    work: Any


class SliceExchange:
    """The rounds and the gathers of this rank's node. Used by one thread."""

    def __init__(self, exchange: Exchange, nodes: Sequence[Sequence[int]]) -> None:
        """
        Args:
            exchange: of all ranks. Once there are stores, all ranks end their rounds before each of its collectives.
            nodes: the ranks of every node, ascending.
        """
        self.ranks = next(tuple(ranks) for ranks in nodes if exchange.rank in ranks)
        self.size, self.index = len(self.ranks), self.ranks.index(exchange.rank)
        self.exchange, self.nodes = exchange, nodes
        self.most_ranks = max(len(ranks) for ranks in nodes)
        self.groups: dict[str, Any] = {}  # of the node's ranks: "words", and for blocks "gloo" and "nccl"
        self._num_stores = 0
        self.stores: dict[int, Callable[[int, int, bool], None]] = {}  # `SlicedStore.begin` of those that are open
        self._rounds: deque[_Round] = deque()  # said, and not yet acted on
        self._num_acted = 0

    def connect(self, backend: str) -> None:
        """Makes the groups of words, and of blocks that go through `backend` ("gloo" or "nccl"), if they are missing.
        All ranks of all nodes call it."""
        for name, kind in ("words", "gloo"), (backend, backend):
            if name not in self.groups:
                self.groups[name] = self.exchange.start(lambda kind=kind: new_group(self.nodes, kind))

    def disconnect(self, backend: str) -> None:
        """Ends the group of blocks unless a store was made: NCCL's holds memory of the GPU. All ranks call it."""
        if backend in self.groups and not self._num_stores:
            self.exchange.start(lambda: dist.destroy_process_group(self.groups.pop(backend)))

    def new_store(self) -> int:
        """Returns the number of a store that all ranks are about to make. From now on collectives of scalars wait for
        the rounds."""
        self.exchange.before_each = self.meet
        meet_first(self.exchange)
        self._num_stores += 1
        return self._num_stores - 1

    # ---- rounds -------------------------------------------------------------------------------------------------

    def say(self, word: Word) -> None:
        """Says this rank's word of the next round; does not wait for the others'. No-op where the word was said in a
        round that has not been acted on."""
        if any(r.mine == word for r in self._rounds):
            return
        mine = torch.tensor(word, dtype=torch.int64, device="cpu")
        words = torch.empty(self.size, len(word), dtype=torch.int64, device="cpu")
        # Of the group itself: torch.distributed's own function takes longer than the exchange.
        work = self.exchange.start(lambda: self.groups["words"].allgather([list(words.unbind(0))], [mine]))
        self._rounds.append(_Round(word, words, work))
        sent = mine.nbytes
        self.exchange.counts.update(slice_rounds=1, slice_bytes_sent=sent, slice_bytes_received=words.nbytes - sent)

    @property
    def answered(self) -> bool:
        """Whether all words of the oldest round that has not been acted on are here."""
        return bool(self._rounds) and self._rounds[0].work.is_completed()

    def act(self, quiet: bool = False) -> list[Word] | None:
        """Waits for the words of the oldest round and begins its gather. Returns the words, if none of them wants a
        block. With `quiet`, a rank that has left is no failure to report to the others."""
        self.exchange.wait(self._rounds[0].work, quiet=quiet)
        this = self._rounds.popleft()
        words = [Word(*row) for row in this.words.tolist()]
        first = self._num_acted % self.size  # each rank's turn
        self._num_acted += 1
        wanted = next((word for word in words[first:] + words[:first] if word.kind == WANTS), None)
        if wanted is None:
            return words
        try:
            if wanted.store not in self.stores:
                raise DistZO2Error("another rank wants a block of a model that this one has closed")
            self.stores[wanted.store](wanted.unit, wanted.stamp, this.mine == wanted)
        except BaseException as error:  # the others wait for this rank's slice, which will not come
            raise self.exchange.give_up(error) from error.__cause__
        return None

    def bring(self, word: Word, begun: Callable[[], bool]) -> None:
        """Takes part in rounds until `begun()`: the gather that `word` wants has begun."""
        if not begun():
            self._take_part(word, lambda _: begun())

    def meet(self) -> None:
        """Serves the other ranks of the node until all of them stand before the same collective of scalars."""
        word = Word(READY, stamp=self.exchange.number)
        self._take_part(word, lambda words: words is not None and all(w == word for w in words))

    def leave(self, ends: bool) -> None:
        """Serves the others before a model is closed: until none of them wants a block. With `ends`, before this rank's
        program ends: until those of all ranks do."""

        def done(words: list[Word] | None) -> bool:
            return words is not None and (not ends or all(w.kind == ENDS for w in words))

        if self._num_stores and self.exchange.broken is None and self.exchange.heartbeat.failure is None:
            with suppress(RankFailedError):
                self._take_part(Word(ENDS if ends else LEAVES), done, quiet=True)

    def _take_part(self, word: Word, done: Callable[[list[Word] | None], bool], quiet: bool = False) -> None:
        """Takes part in rounds, with `word` where this rank has said none ahead, until `done` of what `act` returns."""
        while True:
            if not self._rounds:
                self.say(word)
            words = self.act(quiet)
            if done(words):
                return
            for rank, said in zip(self.ranks, words or (), strict=False):
                if said.kind == ENDS and not quiet:
                    raise left_mesh(rank)

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def gather(self, parts: Sequence[torch.Tensor], backend: str) -> list[Any]:
        """Begins a gather, and returns what to `wait` for. `parts` are the ranks' slices, consecutive in memory, this
        rank's own filled; `backend` was given to `connect`."""
        own, total = parts[self.index].numel(), sum(part.numel() for part in parts)
        self.exchange.counts.update(slice_gathers=1, slice_bytes_sent=own, slice_bytes_received=total - own)
        group, mine = self.groups[backend], parts[self.index]
        if backend != "nccl":
            # gloo's all-gather goes through a copy of the whole; its broadcasts write where the bytes belong.
            return [self._broadcast(group, part, i) for i, part in enumerate(parts)]
        if len({part.numel() for part in parts}) > 1:  # NCCL's broadcasts, as one group
            return [self.exchange.start(lambda: dist.all_gather(list(parts), mine, group=group, async_op=True))]
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13's name
        return [self.exchange.start(lambda: all_gather(parts[0].as_strided((total,), (1,)), mine, group, True))]

    def _broadcast(self, group: Any, part: torch.Tensor, index: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = index, 0
        return self.exchange.start(lambda: group.broadcast([part], options))

    def wait(self, work: Any, backend: str) -> None:
        """Waits for a part of a gather; with NCCL the GPU's current stream waits, and not the host."""
        if backend == "nccl":
            self.exchange.start(work.wait)
        else:
            self.exchange.wait(work)

    def abort(self) -> None:
        """Ends what is in flight on a GPU, which would wait for a lost rank without end."""
        if (group := self.groups.get("nccl")) is not None:
            group._get_backend(torch.device("cuda")).abort()


def meet_first(exchange: Exchange) -> None:
    """From now on torch.distributed's own collectives of all ranks begin with an agreed word. A rank that comes to one,
    as libraries do, thereby serves the others until they are there too, and is told if they do something else."""
    if _plain:
        return
    for name in _COLLECTIVES:
        for module in (dist, dist.distributed_c10d):
            if (plain := getattr(module, name, None)) is not None:
                _plain[module, name] = plain
                setattr(module, name, _meeting(exchange, name, plain))


def _meeting(exchange: Exchange, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    position = list(inspect.signature(plain).parameters).index("group")

    @functools.wraps(plain)
    def met(*args: Any, **kwargs: Any) -> Any:
        group = args[position] if len(args) > position else kwargs.get("group")
        if group is None or group is dist.group.WORLD:
            exchange.agree(f"torch.distributed.{name}")
        return plain(*args, **kwargs)

    return met


def leave_plain() -> None:
    """Ends `meet_first`."""
    for (module, name), plain in _plain.items():
        setattr(module, name, plain)
    _plain.clear()
