"""Places and words of the noise, and its golden hashes, for tests of every backend and instruction set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

import distzo2_core
from distzo2_core import reference

GOLDEN = Path(__file__).parents[1] / "core" / "golden_noise.json"


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, written from the paper and apart from the reference."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def group_words(purpose: int, place: dict[str, int], q: int) -> list[int]:
    c3 = purpose << 24 | place["probe"] << 4 | q >> 32
    seed = place["seed"]
    return philox_scalar([q % 2**32, place["param"], place["step"], c3], [seed % 2**32, seed >> 32])


def exact_pair(radius_word: np.ndarray, angle_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box-Muller in float64 on the float32 u of the contract."""
    u = reference.fma(radius_word.astype(np.float32), np.float32(2.0**-32), np.float32(2.0**-33)).astype(np.float64)
    r, phi = np.sqrt(-2 * np.log(u)), 2 * np.pi / 2**32 * angle_word.astype(np.float64)
    return r * np.cos(phi), r * np.sin(phi)


def place_of_words(w0: int, w1: int, w2: int, seed: int) -> tuple[dict[str, int], list[int]]:
    """The place, and the group's words, of a group of normals that begins with these words.

    Philox is a bijection of counters, so its rounds are undone for many last words at once; one in 256 of them leads to
    the purpose of normals.
    """
    words = [np.full(4096, w, np.uint32) for w in (w0, w1, w2)] + [
        np.arange(4096, dtype=np.uint32) * np.uint32(999_983)
    ]
    c0, c1, c2, c3 = words
    keys = [[(k + r * w) % 2**32 for r in range(10)] for k, w in ((seed % 2**32, 0x9E3779B9), (seed >> 32, 0xBB67AE85))]
    for k0, k1 in reversed(list(zip(*keys, strict=True))):
        before0 = c3 * np.uint32(pow(0xD2511F53, -1, 2**32))
        before2 = c1 * np.uint32(pow(0xCD9E8D57, -1, 2**32))
        high = [(x.astype(np.uint64) * m >> np.uint64(32)).astype(np.uint32) for x, m in
                ((before2, np.uint64(0xCD9E8D57)), (before0, np.uint64(0xD2511F53)))]  # fmt: skip
        c0, c1, c2, c3 = before0, c0 ^ high[0] ^ np.uint32(k0), before2, c2 ^ high[1] ^ np.uint32(k1)
    i = int(np.flatnonzero(c3 >> 24 == 0)[0])
    group = (int(c3[i]) & 0xF) << 32 | int(c0[i])
    place = {"seed": seed, "step": int(c2[i]), "param": int(c1[i]), "probe": int(c3[i]) >> 4, "offset": 4 * group}
    return place, [int(word[i]) for word in words]


EDGES = [
    *(0, 1, 127, 128, 0xFFFF, 0x10000, 2**24 + 1, 2**24 + 3, 2**30 - 1, 2**30, 2**31 - 64, 2**31 - 1, 2**31),
    *(2**31 + 128, 2**31 + 384, 0xC0000000, 0xFFFF0000, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1),
]


def check_chosen_words(backend: str, device: str = "cpu", num: int = 200) -> None:
    """Words that random noise hardly ever meets, in every place of the group, within 2e-6 and bit for bit."""
    rng = np.random.default_rng(3)
    for _ in range(num):
        place, words = place_of_words(*(int(word) for word in rng.choice(EDGES, 3)), int(rng.integers(2**63)))
        assert group_words(0, place, place["offset"] // 4) == words
        arrays = [np.array([word], np.uint32) for word in words]
        got = distzo2_core.normal(4, **place, device=device, backend=backend).cpu().numpy()
        assert got.tobytes() == np.concatenate(reference.normals_from_words(*arrays)).tobytes(), (place, words)
        assert np.abs(got - np.concatenate([*exact_pair(*arrays[:2]), *exact_pair(*arrays[2:])])).max() <= 2e-6


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def noise_bytes(case: dict, backend: str) -> np.ndarray:
    place = {name: case[name] for name in ("seed", "step", "param", "probe", "offset")}
    dtype = getattr(torch, case["dtype"])
    tensor = getattr(distzo2_core, case["kind"])(case["numel"], dtype=dtype, backend=backend, **place)
    return tensor.view(torch.uint8).numpy()


def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def check_golden(backend: str) -> None:
    """The bits of this version of the noise, for ever."""
    for case in golden()["noise"]:
        assert digest(noise_bytes(case, backend)) == case["sha256"], case
