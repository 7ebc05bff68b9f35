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


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def noise_bytes(case: dict, backend: str) -> np.ndarray:
    place = {name: case[name] for name in ("seed", "step", "param", "probe", "offset")}
    dtype = getattr(torch, case["dtype"])
    if case["kind"] == "low_rank":
        place |= {"family": case["family"], "numel": case["numel"]}
        return distzo2_core.low_rank(case["shape"], dtype=dtype, backend=backend, **place).view(torch.uint8).numpy()
    tensor = getattr(distzo2_core, case["kind"])(case["numel"], dtype=dtype, backend=backend, **place)
    return tensor.view(torch.uint8).numpy()


def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def check_golden(backend: str) -> None:
    """The bits of this version of the noise, for ever."""
    for case in golden()["noise"]:
        assert digest(noise_bytes(case, backend)) == case["sha256"], case
