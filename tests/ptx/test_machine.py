"""The interpreter itself, on small texts: arithmetic, lanes that part, barriers, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import arithmetic
from ptx.machine import Module
from ptx.memory import GAP, READ, WRITE, Memory
from ptx.parser import PtxError

from distzo2_core import reference

BASE = 0x7F00_0000_0000
HEAD = """.entry test(.param .u64 test_param_0)
.maxntid 64, 1, 1
{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<19>;
.reg .b64 %rd<9>;
ld.param.u64 %rd1, [test_param_0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
"""


def run(body: str, words: np.ndarray | None = None, num_blocks: int = 1, num_shared: int = 0) -> tuple[np.ndarray, int]:
    """Runs 64 threads on 64 words, each having its word's address in %rd3; the words afterwards, and the count."""
    memory = Memory(BASE, 2 * GAP)
    words = np.arange(64, dtype=np.uint32) if words is None else words
    address = memory.place(words.view(np.uint8), READ | WRITE)
    program = Module(HEAD + body.replace(";", ";\n").replace(":", ":\n") + "\nret;\n}\n")["test"]
    count = program.run((num_blocks, 1, 1), (64, 1, 1), [address.to_bytes(8, "little")], memory, num_shared)
    return memory.read(address, 256).view(np.uint32).copy(), count


def test_lanes_part_and_meet() -> None:
    """A loop that each thread passes as often as its number modulo 3 says."""
    got, count = run(
        "mov.u32 %r2, 0; mov.u32 %r3, 0; rem: setp.ge.u32 %p1, %r2, %r1; @%p1 bra done; add.s32 %r2, %r2, 1;"
        "add.s32 %r3, %r3, 5; bra.uni rem; done: st.global.u32 [%rd3], %r3;"
    )
    assert (got == 5 * np.arange(64)).all()
    assert count == 64 * (4 + 2 + 2 + 1 + 1) + 5 * sum(range(64))


def test_guards_and_poison() -> None:
    got, _ = run("setp.lt.u32 %p1, %r1, 2; @%p1 mov.u32 %r2, 7; @!%p1 st.global.u32 [%rd3], %r2;")
    assert (got[:2] == [0, 1]).all() and (got[2:] == 0xA5A5A5A5).all()


SHARED = "cvt.u32.u64 %r4, %rd2; st.shared.b32 [%r4], %r1; {} xor.b32 %r5, %r4, 4; ld.shared.b32 %r6, [%r5];"


def test_barriers() -> None:
    got, _ = run(SHARED.format("bar.sync 0;") + "st.global.u32 [%rd3], %r6;", num_shared=256)
    assert (got == np.arange(64) ^ 1).all()
    with pytest.raises(PtxError, match="race: a thread reads what another one wrote"):
        run(SHARED.format(""), num_shared=256)
    with pytest.raises(PtxError, match="a barrier meets"):
        run("setp.lt.u32 %p1, %r1, 7; @%p1 bra skip; bar.sync 0; skip:")
    with pytest.raises(PtxError, match="shared memory has 128 bytes"):
        run(SHARED.format("bar.sync 0;"), num_shared=128)


def test_shuffle() -> None:
    got, _ = run("xor.b32 %r2, %r1, 5; shfl.sync.idx.b32 %r3, %r1, %r2, 31, -1; st.global.u32 [%rd3], %r3;")
    assert (got == np.arange(64) ^ 5).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r2, [%rd3+4];", "load of 4 bytes out of bounds"),
        ("st.global.u32 [%rd3+-4], %r1;", "store of 4 bytes out of bounds"),
        ("cvt.u64.u32 %rd4, %r1; ld.global.u8 %r2, [%rd4];", "out of bounds"),
        ("ld.global.u16 %rs1, [%rd3+1];", "misaligned access of 2 bytes"),
        ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd3];", "misaligned access of 16 bytes"),
        ("st.global.u32 [%rd1], %r1;", "race: two threads write"),
        ("ld.global.u32 %r2, [%rd1]; st.global.u32 [%rd3], %r1;", "race: a thread writes what another one read"),
        ("fma.rn.ftz.f32 %r2, %r1, %r1, %r1;", r"'fma.rn.ftz.f32 .*unknown form of instruction"),
        ("atom.global.add.u32 %r2, [%rd3], 1;", "'atom.global.add.u32 .*unknown form of instruction"),
        ("ld.volatile.global.u32 %r2, [%rd3];", "unknown form of instruction"),
        ("mov.u32 %r2, %clock;", "not an operand: '%clock'"),
        ("add.s32 %r2, %rd1, 1;", "%rd1 has 8 bytes"),
        ("again: bra again;", "does not end"),
        ("bra nowhere;", "no such label"),
    ],
)
def test_what_is_refused(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(body)


def test_one_thread_may_not_write_for_two_blocks() -> None:
    with pytest.raises(PtxError, match="race: two threads write"):
        run("mov.u32 %r2, %ctaid.x; st.global.u32 [%rd3], %r2;", num_blocks=2)


def floats(seed: int) -> list[np.ndarray]:
    """Three arrays of any bits, with many near to a tie, subnormal or special."""
    rng = np.random.default_rng(seed)
    found = [rng.integers(0, 2**32, 200_000, dtype=np.uint32) for _ in range(3)]
    for each in found:
        each[:50_000] = rng.integers(0x3F000000, 0x40000000, 50_000) & 0xFFFFF000
        each[50_000:60_000] = rng.choice([0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC00001, 0x00800000], 10_000)
        each[60_000:80_000] &= 0x9FFFFFFF  # small
    return [each.view(np.float32) for each in found]


def test_arithmetic_is_exactly_rounded() -> None:
    a, b, c = floats(0)
    with np.errstate(all="ignore"):
        for got, expected in (
            (arithmetic.fma(a, b, c, "rn"), reference.fma(a, b, c)),
            (arithmetic.add(a, b, "rn"), a + b),
            (arithmetic.mul(a, b, "rn"), a * b),
        ):
            bits = np.where(expected != expected, np.uint32(0x7FFFFFFF), expected.view(np.uint32))
            assert (got == bits).all()
        low, high = (arithmetic.add(a, b, mode).view(np.float32) for mode in ("rm", "rp"))
        exact = a.astype(np.longdouble) + b
        finite = np.isfinite(low) & np.isfinite(high)
        assert ((low <= exact) & (exact <= high))[finite].all()
        assert (np.nextafter(low, np.float32(np.inf)) >= high)[finite].all()
        for x, bits in ((a, arithmetic.to_half(a)), (b, arithmetic.to_half(b))):
            assert (bits == reference.round_nearest(x, reference.FLOAT16))[x == x].all()


def test_int_operations() -> None:
    a = np.array([0x12345678, 0xFEDCBA98], np.uint32)
    assert [hex(x) for x in arithmetic.prmt(a, ~a, np.array([0x7632], np.uint32))] == ["0xedcb1234", "0x123fedc"]
    field = arithmetic.bfe(a.view(np.int32), np.array([4], np.uint32), np.array([8], np.uint32))
    assert [hex(x) for x in field] == ["0x67", "0xffffffa9"]
    assert (arithmetic.shl(a, np.array([32], np.uint32)) == 0).all()
    assert (arithmetic.shr(a.view(np.int32), np.array([40], np.uint32)) == [0, -1]).all()
    place, length = np.array([4], np.uint32), np.array([8], np.uint32)
    assert [hex(x) for x in arithmetic.bfi(a, ~a, place, length)] == ["0xedcba787", "0x1234987"]
    signed, by = np.array([-7, 7], np.int32), np.array([2], np.int32)
    assert arithmetic.quotient(signed, by).tolist() == [-3, 3] and arithmetic.remainder(signed, by).tolist() == [-1, 1]
    x = np.array([np.nan, -1.5, 3e9, 5e9], np.float32)
    assert (arithmetic.to_int(x, np.dtype(np.uint32)) == [0, 0, 3_000_000_000, 2**32 - 1]).all()
