// clang-format off
// Normals from Philox words: Box-Muller with ln, sin and cos written out, so that every backend gives the same bits.
// All arithmetic is IEEE float32, round to nearest even, each fma explicit, nothing else contracted, subnormals kept.
// The exact order of operations is the contract; the NumPy reference, the Triton kernels and the SIMD loops repeat it
// line by line:
//
//   radius(w):  u = fma(float(w), 0x1p-32, 0x1p-33)             in (0, 1]; float(w) rounds the unsigned word to nearest
//               b = bits(u);  e = (b - 0x3F3504F3) & 0xFF800000 u = m * 2^k, m in [sqrt(1/2), sqrt(2)), e = k * 2^23
//               f = 1 - float(bits = b - e)                     = 1 - m, exact (Sterbenz)
//               Q = fma(...fma(fma(Q6, f, Q5), f, Q4)..., f, Q0)   Horner; -2 ln(1 - f) = f * Q(f)
//               L = fma(float(int32(e)), kLogScale, f * Q)      = -2 ln u >= +0, accurate too as u -> 1
//               r = sqrt(L)                                     IEEE
//   angle(w):   phi = 2 pi w / 2^32 = pi/2 y + (0 or pi), where y = float(int32(w << 1)) * 0x1p-31 is in [-1, 1]
//               r = bits(r) ^ ((w + 0x40000000) & 0x80000000)   the half turn, as a change of the radius' sign
//               t = y * y
//               S = fma(fma(fma(fma(S4, t, S3), t, S2), t, S1), t, S0);  s = y * S    = sin(pi/2 y)
//               c = fma(fma(fma(fma(C4, t, C3), t, C2), t, C1), t, 1)                 = cos(pi/2 y)
//   group:      z0 = radius(w0) * cos(w1), z1 = radius(w0) * sin(w1); z2, z3 likewise from w2, w3.
//
// fit_polynomials.py derives the coefficients. Within 2e-6 of float64 Box-Muller on the same u and w1 for every pair of
// words (tests/cpp/noise/normal_test.cpp bounds it over all of them).
// clang-format on
#pragma once

#include <cmath>
#include <cstring>

#include "philox.h"

namespace distzo2 {

constexpr uint32_t kSqrtHalfBits = 0x3F3504F3u;
constexpr float kLogScale = -0x1.62e43p-23f; // -2 ln 2 * 2^-23, for the exponent still shifted by 23 bits
constexpr float kQ0 = 0x1.000000p+1f, kQ1 = 0x1.0002e0p+0f, kQ2 = 0x1.5528f8p-1f, kQ3 = 0x1.fd80f6p-2f;
constexpr float kQ4 = 0x1.a3114ep-2f, kQ5 = 0x1.82eb24p-2f, kQ6 = 0x1.f4fa02p-3f;
constexpr float kS0 = 0x1.921fb4p+0f, kS1 = -0x1.4abba2p-1f, kS2 = 0x1.466506p-4f, kS3 = -0x1.31fc64p-8f;
constexpr float kS4 = 0x1.391de4p-13f;
constexpr float kC0 = 1.0f, kC1 = -0x1.3bd3b0p+0f, kC2 = 0x1.03bd9ap-2f, kC3 = -0x1.550208p-6f, kC4 = 0x1.c2939ap-11f;

DZO_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

DZO_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

DZO_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t b;
    std::memcpy(&b, &x, sizeof b);
    return b;
#endif
}

DZO_HD float bits_float(uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(b);
#else
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
#endif
}

// IEEE square root of +0 or of x in [2^-100, 2^100]; -2 ln u never leaves {+0} and [2^-23, 46]. On the device it is the
// sequence that nvcc emits for sqrt.rn.f32 on this range, without the test for the range and the branch behind it;
// max() keeps 0 * rsqrt(0) away.
DZO_HD float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaxf(x, 0x1p-100f)));
    const float root = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(inverse, 0.5f), root);
#else
    return __builtin_sqrtf(x);
#endif
}

struct NormalPair {
    float a, b;
};

DZO_HD float normal_radius(uint32_t w) {
#if defined(__CUDA_ARCH__)
    const float wide = __uint2float_rn(w);
#else
    const float wide = static_cast<float>(w);
#endif
    const uint32_t b = float_bits(fma_rn(wide, 0x1p-32f, 0x1p-33f));
    const uint32_t e = (b - kSqrtHalfBits) & 0xFF800000u;
    const float f = 1.0f - bits_float(b - e);
    float q = fma_rn(kQ6, f, kQ5);
    q = fma_rn(q, f, kQ4);
    q = fma_rn(q, f, kQ3);
    q = fma_rn(q, f, kQ2);
    q = fma_rn(q, f, kQ1);
    q = fma_rn(q, f, kQ0);
    return sqrt_rn(fma_rn(static_cast<float>(static_cast<int32_t>(e)), kLogScale, mul_rn(f, q)));
}

DZO_HD NormalPair normal_pair(uint32_t w0, uint32_t w1) {
    const float r = bits_float(float_bits(normal_radius(w0)) ^ ((w1 + 0x40000000u) & 0x80000000u));
    const float y = mul_rn(static_cast<float>(static_cast<int32_t>(w1 << 1)), 0x1p-31f);
    const float t = mul_rn(y, y);
    float s = fma_rn(kS4, t, kS3);
    s = fma_rn(s, t, kS2);
    s = fma_rn(s, t, kS1);
    s = fma_rn(s, t, kS0);
    float c = fma_rn(kC4, t, kC3);
    c = fma_rn(c, t, kC2);
    c = fma_rn(c, t, kC1);
    c = fma_rn(c, t, kC0);
    return NormalPair{mul_rn(r, c), mul_rn(r, mul_rn(y, s))};
}

struct Normals4 {
    float z[4];
};

// The four normals of a group: elements 4 q to 4 q + 3 of the parameter.
DZO_HD Normals4 normal_group(const PhiloxWords& words) {
    const NormalPair first = normal_pair(words.w[0], words.w[1]);
    const NormalPair second = normal_pair(words.w[2], words.w[3]);
    return Normals4{{first.a, first.b, second.a, second.b}};
}

} // namespace distzo2
