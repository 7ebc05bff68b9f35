"""The sums over the noise that noise_stats.py judges: where the noise is taken, and what is added up there.

Every function here takes places (dicts of seed, step, param, probe, offset) and returns sums over all of them, so that
the work can be dealt to threads and their sums be added. Products of normals are added up in float32 within a chunk:
at most 2^18 of them, each sum a few hundred, so that rounding stays below 10^-4 of a standard error. Power sums are
made in float64, sums of signs are exact.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import distzo2_core
from distzo2_core import reference
from distzo2_core.types import MAX_ELEMENTS

Place = dict[str, int]
Sums = dict[str, torch.Tensor]

COORDINATES = {"seed": 64, "step": 32, "param": 32, "probe": 20}  # bits of each

LANES = 4
NORMAL_CHUNK = 2**18  # elements of one place
NORMAL_LAGS = (*range(1, 17), 32, 64, 128)
BINS_A_UNIT = 2**16  # of the histogram over [-8, 8)
BINS = 16 * BINS_A_UNIT

GROUP = 128
SIGN_CHUNK = 2**20
SIGN_LAGS = (*range(1, 17), 31, 32, 33, 64, 127, 128, 129, 256)
LONGEST_RUN = 20  # runs of at least so many equal signs are counted together
WORD = 16  # signs that are looked at as one number: for rounding bits, those of one element

COLUMNS = 2**15  # elements of each stream in one product of streams
OFFSET_BITS = range(15, 38)  # flipped bits of the offset: lower ones would meet the same elements again
SUCCESSORS = 16


def make(family: str, numel: int, place: Place) -> torch.Tensor:
    """float32 [numel] of the noise at a place, by the backend that training uses on this machine.

    "rounding" gives the rounding bits as signs, in the order of elements and bits; offset and numel count bits. They
    are the reference's, since no backend hands them out; tests hold every backend's rounding to them.
    """
    if family == "rounding":
        at = {name: place[name] for name in ("seed", "step", "param")}
        halves = reference.rounding_bits(**at, offset=place["offset"] // WORD, numel=numel // WORD)
        bits = np.unpackbits(halves.astype("<u2").view(np.uint8), bitorder="little")
        return torch.from_numpy(bits).float().mul_(2).sub_(1)
    return getattr(distzo2_core, family)(numel, **place)


def random_places(rng: np.random.Generator, count: int, numel: int, clear_bits: int = 0) -> list[Place]:
    """Places in turn small, as runs use them, and anywhere in range, each with room for `numel` elements.

    The lowest `clear_bits` bits of the coordinates are 0, and each has a successor. Offsets are multiples of `numel`.
    """
    places = []
    for index in range(count):
        bits = COORDINATES if index % 2 else {"seed": 10, "step": 14, "param": 10, "probe": 6}
        place = {}
        for name, width in bits.items():
            value = int(rng.integers(0, 2**width, dtype=np.uint64))
            place[name] = min(value, 2 ** COORDINATES[name] - 2) >> clear_bits << clear_bits
        place["offset"] = int(rng.integers(0, (MAX_ELEMENTS if index % 2 else 2**30) // numel)) * numel
        places.append(place)
    return places


def successors(place: Place) -> dict[str, Place]:
    """The four places whose seed, step, param or probe is greater by one."""
    return {f"{name} + 1": place | {name: place[name] + 1} for name in COORDINATES}


def related(base: Place) -> dict[str, Place]:
    """The base, all places one flipped bit away, and the next in each coordinate; the base's low 5 bits are 0."""
    places = {"base": base}
    for name, width in COORDINATES.items():
        places |= {f"{name} ^ 2^{bit}": base | {name: base[name] ^ 1 << bit} for bit in range(width)}
        others = [k for k in range(1, SUCCESSORS + 1) if k & (k - 1)]  # adding a power of two is flipping a bit
        places |= {f"{name} + {k}": base | {name: base[name] + k} for k in others}
    return places | {f"offset ^ 2^{bit}": base | {"offset": base["offset"] ^ 1 << bit} for bit in OFFSET_BITS}


def square_score(z: torch.Tensor) -> torch.Tensor:
    """(z² - 1)/√2, of mean 0 and variance 1."""
    return (z * z - 1) * math.sqrt(0.5)


def lag_sums(values: torch.Tensor, lags: Sequence[int]) -> torch.Tensor:
    """float64 [len(lags)]: the sums of values[i] values[i + lag]."""
    return torch.stack([torch.dot(values[lag:], values[:-lag]) for lag in lags]).double()


def normal_sums(places: Sequence[Place]) -> Sums:
    """Over NORMAL_CHUNK normals of each place.

    Returns:
        histogram: int64 [LANES * BINS], counts of [k, k + 1) / BINS_A_UNIT - 8 for each lane.
        powers: [8], sums of z to z^8.
        lags: [2, number of lags], of z and of (z² - 1)/√2.
        products: [40, 40], Gram matrix of z by stream (the place, then its successors) and lane, then of (z² - 1)/√2.
        signs: [1], sum of z times the Rademacher sign of the same element.
        largest: [1], of |z|; a maximum.
    """
    histogram = torch.zeros(LANES * BINS, dtype=torch.int64)
    powers = torch.zeros(8, dtype=torch.float64)
    lags = torch.zeros(2, len(NORMAL_LAGS), dtype=torch.float64)
    products = torch.zeros(10 * LANES, 10 * LANES, dtype=torch.float64)
    signs, largest = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    ones = torch.ones(NORMAL_CHUNK, dtype=torch.int64)
    first_bins = torch.arange(LANES) * BINS + BINS // 2
    for place in places:
        streams = [make("normal", NORMAL_CHUNK, one) for one in (place, *successors(place).values())]
        z = streams[0]
        largest = torch.maximum(largest, z.abs().max())  # a NaN stays
        bins = (z.view(-1, LANES) * BINS_A_UNIT).floor_().clamp_(-(BINS // 2), BINS // 2 - 1).long() + first_bins
        histogram.scatter_add_(0, bins.view(-1), ones)
        wide = z.double()
        square = wide * wide
        cube, fourth = wide * square, square * square
        factors = [(wide, square), (square, square), (wide, fourth), (square, fourth), (cube, fourth), (fourth, fourth)]
        powers += torch.stack([wide.sum(), square.sum(), *(torch.dot(a, b) for a, b in factors)])
        lags += torch.stack([lag_sums(wide, NORMAL_LAGS), lag_sums(square_score(wide), NORMAL_LAGS)])
        lanes = torch.cat([stream.view(-1, LANES) for stream in streams], 1)
        lanes = torch.cat([lanes, square_score(lanes)], 1)
        products += lanes.T @ lanes
        signs += torch.dot(z, make("rademacher", NORMAL_CHUNK, place))
    return {
        "histogram": histogram,
        "powers": powers,
        "lags": lags,
        "products": products,
        "signs": signs,
        "largest": largest,
    }


def sign_sums(family: str, places: Sequence[Place]) -> Sums:
    """Over SIGN_CHUNK signs of each place, of "rademacher" or "rounding".

    Returns:
        bits: [128], sums by position in the group.
        lags: [number of lags].
        within, across: [128, 128], products of the positions of one group, and of one group's with the next one's.
        runs: int64 [LONGEST_RUN + 1], runs of equal signs by length, without the first and the last of a place.
        words: int64 [2^WORD], counts of WORD signs read as a number.
    """
    bits = torch.zeros(GROUP, dtype=torch.float64)
    lags = torch.zeros(len(SIGN_LAGS), dtype=torch.float64)
    within = torch.zeros(GROUP, GROUP, dtype=torch.float64)
    across = torch.zeros(GROUP, GROUP, dtype=torch.float64)
    runs = torch.zeros(LONGEST_RUN + 1, dtype=torch.int64)
    words = torch.zeros(2**WORD, dtype=torch.int64)
    digits = torch.tensor([2.0**bit for bit in range(WORD)])
    for place in places:
        signs = make(family, SIGN_CHUNK, place)
        groups = signs.view(-1, GROUP)
        bits += groups.sum(0)
        lags += lag_sums(signs, SIGN_LAGS)
        within += groups.T @ groups
        across += groups[:-1].T @ groups[1:]
        changes = torch.nonzero(signs[1:] != signs[:-1]).view(-1)
        runs += torch.bincount(changes.diff().clamp_(max=LONGEST_RUN), minlength=LONGEST_RUN + 1)
        words += torch.bincount(((signs.view(-1, WORD) + 1) / 2 @ digits).long(), minlength=2**WORD)
    return {"bits": bits, "lags": lags, "within": within, "across": across, "runs": runs, "words": words}


def stream_sums(family: str, bases: Sequence[Place]) -> Sums:
    """Over COLUMNS elements of each base and of all places `related` to it.

    Returns:
        values: Gram matrix of the streams, in the order of `related`.
        squares: that of (z² - 1)/√2, for normals alone.
    """
    numbers = len(related(bases[0]))
    sums = {"values": torch.zeros(numbers, numbers, dtype=torch.float64)}
    if family == "normal":
        sums["squares"] = torch.zeros(numbers, numbers, dtype=torch.float64)
    streams = torch.empty(numbers, COLUMNS)
    for base in bases:
        for row, place in enumerate(related(base).values()):
            streams[row] = make(family, COLUMNS, place)
        sums["values"] += streams @ streams.T
        if family == "normal":
            squares = square_score(streams)
            sums["squares"] += squares @ squares.T
    return sums


def in_threads(function: Callable[[Sequence[Place]], Sums], places: Sequence[Place], num_threads: int) -> Sums:
    """The function's sums over all places, dealt to threads that compute alone ("largest" is a maximum)."""
    torch.set_num_threads(1)

    def work(thread: int) -> Sums:
        torch.set_num_threads(1)  # a setting of each thread
        return function(places[thread::num_threads])

    with ThreadPoolExecutor(num_threads) as threads:
        parts = list(threads.map(work, range(min(num_threads, len(places)))))
    total = parts[0]
    for part in parts[1:]:
        for name, value in part.items():
            total[name] = torch.maximum(total[name], value) if name == "largest" else total[name] + value
    return total


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
