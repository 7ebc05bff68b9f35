"""The tests of the PTX can fail: each change of its text, one place in one kernel, is noticed."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from kernel_cases import CODES, DTYPES, needs_native
from packed_cases import check_decode
from ptx.cases import backend_of, check_lookup, check_ops, check_visit, pairs_of, simple_visit
from ptx.cuda_kernels import CudaKernels
from ptx.parser import PtxError
from ptx.triton_kernels import TritonKernels

import distzo2_core

pytestmark = [needs_native, pytest.mark.timeout(900)]  # the first one compiles all kernels

VISIT = r"visit_kernelINS_13SimpleProgramILi1ELi2ELNS_7PurposeE0EEENS0_12InlineTables"
ANY = r"visit_kernelINS_10AnyProgramENS0_12InlineTables"
PERTURB = r"visit_kernelINS_13SimpleProgramILi0ELi1ELNS_7PurposeE1EEENS0_15WorkspaceTables"
PIECE = "store_piece_kernel"
GENERATE = r"generate_kernelILNS_5DTypeE0ENS_8NoMatrix"
LOOKUP = r"lookup_kernelILNS_5DTypeE2ELb0ENS_8NoMatrix"
MIXED = r"visit_kernelINS_5MixedINS_13SimpleProgramILi1ELi2ELNS_7PurposeE0EEEEENS0_12InlineTables"
CODED = r"visit_kernelINS_5CodedINS_10AnyProgramEEENS0_12InlineTables"
DECODE = r"decode_kernelILNS_5DTypeE1E"
DECODED_Q4_0 = r"decode_kernel CODES=0 .*OUT_CODE=1"
SHUFFLED = r"materialize_kernel ANCHORED=0 CODE=1 LOW_RANK=0 MOVED=0 NUM_EMITS=2 .*BACK=1"
MOVED = r"materialize_kernel ANCHORED=0 CODE=1 LOW_RANK=0 MOVED=1 NUM_EMITS=2 OUT_CODE=0 .*BACK=1"
CODES_16 = r"materialize_kernel ANCHORED=0 CODE=4 LOW_RANK=0 MOVED=1 NUM_EMITS=2 OUT_CODE=1 .*BACK=1"
# What is changed: the kernel, a pattern of its text, what takes its place, and which of the matches it is.
CUDA = {
    "a multiplier of Philox": (GENERATE, r"-845247145", "-845247143", 0),
    "a round key": (GENERATE, r"\+44\]", "+40]", 0),
    "a coefficient, by one unit": (GENERATE, r"0f3F800170", "0f3F800171", 0),
    "a product rounded up": (GENERATE, r"mul\.rn\.f32", "mul.rp.f32", 4),
    "an fma rounded towards zero": (GENERATE, r"fma\.rn\.f32", "fma.rz.f32", 9),
    "a conversion rounded towards zero": (GENERATE, r"cvt\.rn\.f32\.u32", "cvt.rz.f32.u32", 0),
    "the end of the tile": (GENERATE, r"setp\.ge\.u32", "setp.gt.u32", 0),
    "the stride of a thread": (GENERATE, r"(add\.s32 \s*(%r\d+), \2, )256", r"\g<1>255", 0),
    "the bit of a sign": (GENERATE, r"-2147483648", "1073741824", 0),
    "where a row begins": (LOOKUP, r"mul\.lo\.s64", "add.s64", 0),
    "the alignment of a row": (LOOKUP, r"setp\.ne\.s64", "setp.eq.s64", 0),
    "the order of a vector": (VISIT, r"(st\.global\.v4\.u32 \s*\[[^]]*\], \{)(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    "the bits of rounding": (VISIT, r"65535", "32767", 0),
    "the bits of a bfloat16": (VISIT, r"(and\.b32 \s*%r\d+, %r\d+, )-65536", r"\1-131072", 0),
    "what is NaN": (VISIT, r"setp\.nan\.f32", "setp.num.f32", 0),
    "an update that is none": (VISIT, r"setp\.eq\.f32", "setp.neu.f32", 0),
    "the alignment of a segment": (VISIT, r"(and\.b64 \s*%rd\d+, %rd\d+, )15", r"\g<1>7", 0),
    "the dtype of an emit": (MIXED, r"(setp\.eq\.s32 \s*%p\d+, %r\d+, )1;", r"\g<1>2;", 1),
    "the order of an emit's pair": (MIXED, r"(cvt\.rn\.bf16x2\.f32 %r\d+), (%f\d+), (%f\d+)", r"\1, \3, \2", 0),
    "the quotient of a step": (CODED, r"div\.rn\.f32", "mul.rn.f32", 0),
    "the floor of a step": (CODED, r"cvt\.rmi\.f32\.f32", "cvt.rzi.f32.f32", 0),
    "the largest code": (CODED, r"selp\.f32 (\s*%f\d+), 0f46FFFE00", r"selp.f32 \1, 0f46FFFC00", 0),
    "what is divided by where a scale is 0": (CODED, r"0f7F800000", "0f3F800000", 0),
    "the segment of a tile": (ANY, r"setp\.le\.u32", "setp.lt.u32", 0),
    "the last octet of a segment": (ANY, r"setp\.eq\.s32 (\s*%p\d+, %r\d+, %r\d+;)", r"setp.ne.s32 \1", 0),
    "a row of a table": (PERTURB, r"(ld\.global\.u32 \s*%r\d+, \[%rd\d+)\+4\]", r"\1+0]", 0),
    "the value of a sign": (PERTURB, r"-1082130432", "1065353216", 0),
    "the end of a piece of a table": (PIECE, r"setp\.ge\.u32", "setp.gt.u32", 0),
    # Of weights at the end of a row, decoded one by one, which come first in the text, and of octets.
    "an outer scale that divides": (DECODE, r"div\.rn\.f32", "mul.rn.f32", 0),
    "an octet's outer scale that divides": (DECODE, r"div\.rn\.f32", "mul.rn.f32", 1),
    "the bits of a code": (DECODE, r"(and\.b32 \s*%r\d+, %r\d+, )15;", r"\g<1>7;", 0),
    "a gain of an octet": (DECODE, r"mul\.rn\.f32 (\s*%f\d+, %f\d+, %f\d+;)", r"add.rn.f32 \1", -1),
    "the bits of an octet's code": (DECODE, r"(and\.b32 \s*%r\d+, %r\d+, )15;", r"\g<1>7;", 7),
}
TRITON = {
    "a barrier": (r"noise_kernel CODE=1 FAMILY=0", r"bar\.sync\s+0;", "", 1),
    "the source of a shuffle": (SHUFFLED, r"(shfl\.sync\.idx\.b32 \s*%r\d+, %r\d+, )%r\d+", r"\g<1>3", 0),
    "the NaN of an emit": (MOVED, r"2143289344", "2143289345", 0),
    "a root rounded down": (r"noise_kernel CODE=0 FAMILY=0", r"sqrt\.rn", "sqrt.rm", 0),
    "the scale of a code": (CODES_16, r"mul\.(rn\.)?f32", "add.rn.f32", 0),
    "the rounding of what is decoded": (DECODED_Q4_0, r"32767", "32766", 0),
    "the end of a row": (r"embedding_kernel CODE=2 FAMILY=1 OUT_CODE=2", r"setp\.lt\.s64", "setp.le.s64", 1),
}


def mutated(text: str, pattern: str, new: str, index: int) -> str:
    """The text with one match of the pattern replaced."""
    matches = list(re.finditer(pattern, text))
    assert index < len(matches), f"{len(matches)} matches of {pattern}"
    match = matches[index]
    return text[: match.start()] + match.expand(new) + text[match.end() :]


def check(kernels: CudaKernels | TritonKernels, kernel: str) -> None:
    """A few calls that a kernel serves: some the usual way, some with special values at odd places."""
    rng = np.random.default_rng(1)
    with backend_of(kernels) as backend:
        if kernel == LOOKUP or "embedding" in kernel:
            for cols, whole in ((64, False), (300, False), (160, True)):
                check_lookup(rng, backend, torch.float16, cols, whole)
        elif "decode" in kernel:
            name, gained = ("q4_0", 0.0) if kernel == DECODED_Q4_0 else ("nvfp4, divided", 0.5)
            check_decode(rng, backend, [name], dtypes=(torch.bfloat16,), gained=gained)
        elif kernel == GENERATE or "noise" in kernel:
            for dtype, numel in itertools.product((torch.float32, torch.bfloat16), (100, 4500)):
                check_ops(rng, backend, dtype, numel)
            kernels.device = 1  # of one multiprocessor, where a thread makes two octets
            got, expected = (
                distzo2_core.normal(70_000, seed=1, step=2, param=3, backend=each) for each in (backend, "native")
            )
            assert torch.equal(got, expected)
        else:
            shape, family = {ANY: ((1, 1), 0), PERTURB: ((0, 1), 1), SHUFFLED: ((1, 2), 1)}.get(kernel, ((1, 2), 0))
            coded = kernel in (CODED, CODES_16)
            pairs = pairs_of(kernels) if coded or kernel in (MIXED, MOVED) else ()
            dtypes = (*CODES, *DTYPES) if coded else DTYPES
            many = 40 if kernel in (PERTURB, PIECE) else 3 if pairs else 1
            for whole, numels, shift in (
                (True, [2048, 2048, 80], 0),
                (True, [264, 80, 40], 8),
                (False, [70, 300, 133], 0),
                (False, [9, 11, 80, 2, 30, 40], 0),
            ):
                kernels.shifts = (shift,)
                check_visit(simple_visit(rng, shape, family, dtypes, numels * many, whole, pairs=pairs), backend)


@pytest.mark.parametrize("what", CUDA)
def test_cuda(nvcc: CudaKernels, what: str) -> None:
    kernel, *change = CUDA[what]
    (name,) = [name for name in nvcc.module.texts if re.search(kernel, name)]
    check(nvcc, kernel)
    assert nvcc.launches[name] > 0
    nvcc.module.texts[name] = mutated(nvcc.module.texts[name], *change)
    with pytest.raises((AssertionError, PtxError)) as caught:
        check(nvcc, kernel)
    assert "unknown form" not in str(caught.value)


@pytest.mark.parametrize("what", TRITON)
def test_triton(triton: TritonKernels, what: str) -> None:
    kernel, *change = TRITON[what]
    (key,) = [key for key in triton.compiled if re.search(kernel, key)]
    check(triton, kernel)
    assert triton.launches[key] > 0
    text = mutated(triton.compiled[key]["ptx"], *change)
    triton.compiled = triton.compiled | {key: triton.compiled[key] | {"ptx": text}}
    with pytest.raises((AssertionError, PtxError)) as caught:
        check(triton, kernel)
    assert "unknown form" not in str(caught.value)
