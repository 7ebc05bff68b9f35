"""Whether the noise is what it claims to be: independent standard normals, fair signs and rounding bits, 10^9 of each.

    python tools/noise_stats.py                # minutes on two cores; writes bench/results/noise_stats.json
    python tools/noise_stats.py --quick        # 10^7 of each, seconds; writes nothing

Each test is a z-score or p-value against exact expectations. Thresholds are Bonferroni's, with an equal share for each
kind of tests: a test fails where p < ALPHA / (number of kinds) / (number of tests of its kind), so that sound noise
fails anywhere with a probability of at most ALPHA. Where a kind has many tests, one more looks at the sum of their
squares, for many small correlations that each pass alone. The noise is a function: a result holds until its version
changes.

The exact law of the noise is not quite normal: a radius takes 2^32 values and ends at sqrt(66 ln 2) = 6.76, and float32
rounds. This moves the distribution function by less than 10^-6 and the 8th moment by less than 10^-3, against standard
errors of 3·10^-5 and 0.04 at 10^9 samples, so that the normal law's own values are the expectations.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import noise_sums
import numpy as np
import torch
from noise_sums import BINS, BINS_A_UNIT, GROUP, LANES, NORMAL_CHUNK, NORMAL_LAGS, SIGN_CHUNK, SIGN_LAGS, Place, Sums

import distzo2_core

RECORD = Path(__file__).parent.parent / "bench" / "results" / "noise_stats.json"
ALPHA = 1e-3
LARGEST = math.sqrt(66 * math.log(2)) + 2e-6  # of |z|: the radius of u = 2^-33, and the error that is allowed
LISTED = 32  # kinds of at most so many tests are recorded one by one


@dataclass(frozen=True)
class Tests:
    """Tests of one kind over `samples` samples: p-values float64 [n], z-scores where there are any, what each is."""

    kind: str
    samples: int
    p: torch.Tensor
    z: torch.Tensor | None
    label: Callable[[int], str]


def from_z(kind: str, samples: int, z: torch.Tensor, label: Callable[[int], str]) -> Tests:
    """Two-sided tests of standardized values [n]."""
    z = z.double()
    return Tests(kind, samples, torch.special.erfc(z.abs() / math.sqrt(2)), z, label)


def with_spread(tests: Tests) -> list[Tests]:
    """The tests, and one of the sum of their squares, a chi-square by Wilson and Hilferty's normal score."""
    assert tests.z is not None
    freedom = tests.z.numel()
    spread = 2 / (9 * freedom)
    z = ((float((tests.z**2).sum()) / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    return [tests, from_z(f"{tests.kind}, together", tests.samples, torch.tensor([z]), lambda _: "sum of z²")]


def from_gram(kind: str, samples: int, gram: torch.Tensor, names: list[str], same: int | None = None) -> list[Tests]:
    """All pairs of different rows of a Gram matrix over `samples` samples of variance 1; without pairs `same` apart."""
    rows, columns = torch.triu_indices(len(names), len(names), 1)
    if same is not None:
        kept = columns - rows != same
        rows, columns = rows[kept], columns[kept]
    z = gram[rows, columns] / math.sqrt(samples)
    return with_spread(from_z(kind, samples, z, lambda i: f"{names[rows[i]]} · {names[columns[i]]}"))


def kolmogorov_p(distance: float, samples: int) -> float:
    """Kolmogorov's limit law, with Stephens' correction for finite samples."""
    x = distance * (math.sqrt(samples) + 0.12 + 0.11 / math.sqrt(samples))
    total = sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, 2 * total) if x > 0.2 else 1.0  # below, the series has not converged, and p is 1 to ten digits


def normal_moment(power: int) -> int:
    """E z^power."""
    return 0 if power % 2 else math.prod(range(1, power, 2))


def judge_distribution(sums: Sums, samples: int) -> list[Tests]:
    """Kolmogorov-Smirnov at the edges of the bins (between them it can be larger by 6.1e-6), moments, tails."""
    lanes = sums["histogram"].view(LANES, BINS)
    counts = lanes.sum(0)
    exact = torch.special.ndtr((torch.arange(1, BINS, dtype=torch.float64) - BINS // 2) / BINS_A_UNIT)
    p, distances = [], []
    for name, part in {"all": counts, **{f"lane {lane}": lanes[lane] for lane in range(LANES)}}.items():
        number = int(part.sum())
        distance = float((part.cumsum(0)[:-1] / number - exact).abs().max())
        p.append(kolmogorov_p(distance, number))
        distances.append(f"{name}: D = {distance:.3e}")
    ks = Tests("normal: Kolmogorov-Smirnov", samples, torch.tensor(p, dtype=torch.float64), None, distances.__getitem__)

    z, labels = [], []
    for power in range(1, 9):
        moment = float(sums["powers"][power - 1]) / samples
        error = math.sqrt((normal_moment(2 * power) - normal_moment(power) ** 2) / samples)
        z.append((moment - normal_moment(power)) / error)
        labels.append(f"E z^{power} = {moment:.7g}, exact {normal_moment(power)}, standard error {error:.2g}")
    moments = from_z("normal: moments", samples, torch.tensor(z), labels.__getitem__)

    z, tails = [], []
    for bound in range(1, 6):
        share = math.erfc(bound / math.sqrt(2)) / 2
        if share * samples < 200:  # too few for a normal law of their number
            continue
        above, below = counts[BINS // 2 + bound * BINS_A_UNIT :], counts[: BINS // 2 - bound * BINS_A_UNIT]
        for name, number in ((f"z ≥ {bound}", int(above.sum())), (f"z < -{bound}", int(below.sum()))):
            z.append((number - share * samples) / math.sqrt(samples * share * (1 - share)))
            tails.append(f"{name}: {number}, expected {share * samples:.1f}")
    return [ks, moments, from_z("normal: tails", samples, torch.tensor(z), tails.__getitem__)]


def judge_normals(places: list[Place], num_threads: int) -> list[Tests]:
    """Distribution, lags, and products with the successors, lane by lane."""
    sums = noise_sums.in_threads(noise_sums.normal_sums, places, num_threads)
    if not float(sums["largest"]) <= LARGEST:
        raise SystemExit(f"error: a normal of magnitude {float(sums['largest'])}, expected at most {LARGEST}")
    samples = len(places) * NORMAL_CHUNK
    found = judge_distribution(sums, samples)
    # The probability of a smaller maximum; LARGEST is the bound on the other side.
    largest = sums["largest"].double()
    p = torch.exp(-samples * torch.special.erfc(largest / math.sqrt(2)))
    found.append(Tests("normal: largest magnitude", samples, p, None, lambda _: f"{float(largest):.4f}"))
    pairs = torch.tensor([len(places) * (NORMAL_CHUNK - lag) for lag in NORMAL_LAGS], dtype=torch.float64)
    for what, lags in zip(("z", "z²"), sums["lags"], strict=True):
        found.append(from_z(f"normal: {what} at lags", samples, lags / pairs.sqrt(), lambda i: f"lag {NORMAL_LAGS[i]}"))
    streams = ["place", *noise_sums.successors(places[0])]
    names = [f"{what} {one} lane {lane}" for what in ("z", "z²") for one in streams for lane in range(LANES)]
    # z and z² of the same element depend on each other: that is the third moment.
    kind, number = "normal: place and successors, by lane", samples // LANES
    found += from_gram(kind, number, sums["products"], names, same=len(names) // 2)
    signs = sums["signs"] / math.sqrt(samples)
    return [*found, from_z("normal · Rademacher", samples, signs, lambda _: "same place and element")]


def chi_square(kind: str, samples: int, counts: torch.Tensor, expected: torch.Tensor) -> Tests:
    """Counts [n] against what is expected of them."""
    z = (counts - expected) / expected.sqrt()
    p = torch.special.gammaincc(torch.tensor([(counts.numel() - 1) / 2]).double(), (z**2).sum().view(1) / 2)
    return Tests(kind, samples, p, None, lambda _: f"chi-square {float((z**2).sum()):.2f}")


def judge_signs(family: str, places: list[Place], num_threads: int) -> list[Tests]:
    """Mean, positions in a group and their pairs, lags, lengths of runs, 16 neighbours as a number."""
    sums = noise_sums.in_threads(functools.partial(noise_sums.sign_sums, family), places, num_threads)
    what = {"rademacher": "Rademacher", "rounding": "rounding"}[family]
    samples, groups = len(places) * SIGN_CHUNK, len(places) * SIGN_CHUNK // GROUP
    mean = sums["bits"].sum().view(1) / math.sqrt(samples)
    found = [from_z(f"{what}: mean", samples, mean, lambda _: "mean")]
    found += with_spread(from_z(f"{what}: mean by bit", groups, sums["bits"] / math.sqrt(groups), lambda i: f"bit {i}"))
    pairs = torch.tensor([len(places) * (SIGN_CHUNK - lag) for lag in SIGN_LAGS], dtype=torch.float64)
    z = sums["lags"] / pairs.sqrt()
    found.append(from_z(f"{what}: lags", samples, z, lambda i: f"lag {SIGN_LAGS[i]}"))
    found += from_gram(f"{what}: pairs of bits in a group", groups, sums["within"], [f"{k}" for k in range(GROUP)])
    followed = groups - len(places)  # groups that have a next one in their place
    z = sums["across"].view(-1) / math.sqrt(followed)
    label: Callable[[int], str] = lambda i: f"{i // GROUP} · next group's {i % GROUP}"  # noqa: E731
    found += with_spread(from_z(f"{what}: pairs of bits in neighbouring groups", followed, z, label))
    lengths = sums["runs"][1:].double()
    expected = lengths.sum() * 0.5 ** torch.arange(1, lengths.numel() + 1, dtype=torch.float64)
    expected[-1] *= 2  # at least so long
    found.append(chi_square(f"{what}: runs", int(lengths.sum()), lengths, expected))
    words = sums["words"].double()
    number = int(words.sum())
    kind = f"{what}: {noise_sums.WORD} bits as a number"
    return [*found, chi_square(kind, number, words, torch.full_like(words, number / words.numel()))]


def judge_streams(bases: list[Place], num_threads: int) -> list[Tests]:
    """All pairs of the places one bit or a few units away from a base, the base among them."""
    names = list(noise_sums.related(bases[0]))
    samples = len(bases) * noise_sums.COLUMNS
    found: list[Tests] = []
    for family in ("normal", "rademacher"):
        sums = noise_sums.in_threads(functools.partial(noise_sums.stream_sums, family), bases, num_threads)
        for name, gram in sums.items():
            what = {"normal": {"values": "z", "squares": "z²"}, "rademacher": {"values": "sign"}}[family][name]
            found += from_gram(f"{what} of places one bit or ≤ 16 apart", samples, gram, names)
    return found


def report(tests: list[Tests]) -> tuple[list[dict[str, Any]], list[str]]:
    """Prints a line a kind; returns the record of each, and the tests that failed (a NaN fails)."""
    record, failed = [], []
    for one in tests:
        number = one.p.numel()
        limit = ALPHA / len(tests) / number
        p = one.p.nan_to_num(nan=-1.0)
        failed += [f"{one.kind}: {one.label(int(i))}" for i in torch.nonzero(p < limit)]
        worst = int(p.argmin())
        entries = []
        for i in range(number) if number <= LISTED else [worst]:
            entry = {"what": one.label(i), "p": float(f"{float(one.p[i]):.4g}")}
            entries.append(entry if one.z is None else entry | {"z": round(float(one.z[i]), 4)})
        kind: dict[str, Any] = {"kind": one.kind, "samples": one.samples, "tests": number, "limit_p": limit}
        kind |= {"all": entries} if number <= LISTED else {"worst": entries[0]}
        if one.z is not None and number > LISTED:
            kind["rms_z"] = round(float((one.z**2).mean().sqrt()), 5)
        record.append(kind)
        score = f"z {float(one.z[worst]):+6.2f}" if one.z is not None else " " * 8
        least = f"least p {float(one.p[worst]):.1e} (limit {limit:.1e})  {score}  {one.label(worst)}"
        print(f"{one.kind:55} {one.samples:>10} x {number:<5} {least}")
    return record, failed


def main() -> int:
    """Parse the options, make the sums, judge, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^7 samples, and no record unless --json")
    parser.add_argument("--json", type=Path, help=f"where the record goes (default: {RECORD.name} in bench/results)")
    parser.add_argument("--places", type=int, default=0, help="seed of NumPy's generator that chooses the places")
    parser.add_argument("--threads", type=int, default=noise_sums.available_cores(), help="default: all cores")
    options = parser.parse_args()
    start = time.perf_counter()
    rng = np.random.default_rng(options.places)
    normals = noise_sums.random_places(rng, 40 if options.quick else 4096, NORMAL_CHUNK)
    signs = noise_sums.random_places(rng, 10 if options.quick else 1024, SIGN_CHUNK)
    zero: Place = {"seed": 0, "step": 0, "param": 0, "probe": 0, "offset": 0}
    bases = [zero, *noise_sums.random_places(rng, 7 if options.quick else 511, noise_sums.COLUMNS, clear_bits=5)]
    tests = judge_normals(normals, options.threads)
    for family in ("rademacher", "rounding"):
        tests += judge_signs(family, signs, options.threads)
    tests += judge_streams(bases, options.threads)
    kinds, failed = report(tests)
    total = sum(one.p.numel() for one in tests)
    verdict = f"{total} tests of {len(tests)} kinds, {len(failed)} failed at {ALPHA:g} for all of them"
    print(f"{'FAILED' if failed else 'passed'}: {verdict}; {time.perf_counter() - start:.0f} s")
    for name in failed[:LISTED]:
        print(f"  failed: {name}")
    path = options.json or (None if options.quick else RECORD)
    if path:
        result = {
            "noise_version": distzo2_core.NOISE_VERSION,
            "passed": not failed,
            "failed": failed,
            "tests": total,
            "alpha": ALPHA,
            "places": options.places,
            "backend": distzo2_core.resolve_backend(None, "cpu"),
            "torch": torch.__version__,
            "kinds": kinds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
