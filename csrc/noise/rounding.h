// Conversions between float32 and the stored types, bit for bit the same on every platform: nearest even by integer
// arithmetic, and stochastic rounding on the magnitude. The 16 bits R of an element are half (e mod 8) of rounding
// group e div 8, word 0's low half first, at probe 0 and the update's step.
//
// Stochastic: y = |x| / spacing at |x| (for fp16 below 2^-14 the spacing is 2^-24), k = floor(frac(y) * 2^16), up if
// and only if k + R >= 2^16. A carry past the largest finite gives infinity, and so does |x| >= 65536 in fp16. Every
// NaN that is stored is the canonical one: 0x7FC0, 0x7E00, and 0x7FC00000 in float32 (hardware differs in the NaN that
// an fma returns). Host and device, no torch.
#pragma once

#include "normal.h"

namespace distzo2 {

constexpr uint32_t kNanFp32 = 0x7FC00000u;
constexpr uint16_t kNanBf16 = 0x7FC0u;
constexpr uint16_t kNanFp16 = 0x7E00u;

// R of an element; lane = element mod 8.
DZO_HD uint32_t rounding_bits(const PhiloxWords& words, uint32_t lane) {
    return (words.w[lane >> 1] >> ((lane & 1) * 16)) & 0xFFFFu;
}

DZO_HD float canonical_fp32(float x) { return x != x ? bits_float(kNanFp32) : x; }

DZO_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Exact. The payload of a NaN is kept; it does not survive the next rounding.
DZO_HD float fp16_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u)
        return bits_float(sign | (magnitude << 13) | 0x7F800000u);
    if (magnitude >= 0x0400u)
        return bits_float(sign | ((magnitude << 13) + (112u << 23)));
    return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f)); // subnormal: an integer times 2^-24
}

DZO_HD uint16_t float_to_bf16(float x) {
    const uint32_t b = float_bits(x);
    if ((b & 0x7FFFFFFFu) > 0x7F800000u)
        return kNanBf16;
    return static_cast<uint16_t>((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16);
}

DZO_HD uint16_t float_to_fp16(float x) {
    const uint32_t b = float_bits(x);
    const uint32_t magnitude = b & 0x7FFFFFFFu;
    const uint32_t sign = (b >> 16) & 0x8000u;
    if (magnitude > 0x7F800000u)
        return kNanFp16;
    if (magnitude >= 0x477FF000u) // 65520, half way to the value after the largest finite
        return static_cast<uint16_t>(sign | 0x7C00u);
    if (magnitude < 0x38800000u) // below 2^-14: the spacing of 0.5f is 2^-24, so the sum rounds as the subnormal does
        return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u));
    return static_cast<uint16_t>(sign | (((magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10)));
}

// R < 2^16. The spacing at |x| is 2^16 units of the float's own last place, so k is the low half of the bits.
DZO_HD uint16_t float_to_bf16_stochastic(float x, uint32_t r) {
    const uint32_t b = float_bits(x);
    if ((b & 0x7FFFFFFFu) > 0x7F800000u)
        return kNanBf16;
    return static_cast<uint16_t>((b + r) >> 16);
}

// Above 2^-14, k = 8 * (the low 13 bits), so k + R >= 2^16 if and only if (low 13 bits) + (R >> 3) >= 2^13.
DZO_HD uint16_t float_to_fp16_stochastic(float x, uint32_t r) {
    const uint32_t b = float_bits(x);
    const uint32_t magnitude = b & 0x7FFFFFFFu;
    const uint32_t sign = (b >> 16) & 0x8000u;
    if (magnitude > 0x7F800000u)
        return kNanFp16;
    if (magnitude < 0x38800000u) // |x| * 2^40 is exact and below 2^26; its floor is y with 16 bits of fraction
        return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(bits_float(magnitude) * 0x1p40f) + r) >> 16));
    const uint32_t h = ((magnitude + (r >> 3)) >> 13) - (112u << 10);
    return static_cast<uint16_t>(sign | (h < 0x7C00u ? h : 0x7C00u));
}

// A canonical number, or +0 where it has a sign: a NaN stays.
DZO_HD float not_below_zero(float x) {
    const int32_t b = static_cast<int32_t>(float_bits(x));
    return bits_float(static_cast<uint32_t>(b < 0 ? 0 : b));
}

// What changes of a value are divided by, to be steps of its code: by infinity where the scale is 0, so that no finite
// change is a step.
DZO_HD float code_divisor(float scale) { return scale == 0.0f ? bits_float(0x7F800000u) : scale; }

// The code q, an integer, after a change of its value: clamp(q + floor(change / divisor + R / 2^16)), the step being 0
// where it is NaN. limit < 2^16, so that nothing is lost where a step is cut to 2^17.
DZO_HD float step_code(float q, float change, float divisor, uint32_t r, float limit) {
#if defined(__CUDA_ARCH__)
    const float exact = __fmaf_rn(static_cast<float>(r), 0x1p-16f, __fdiv_rn(change, divisor));
    const float next = q + (exact == exact ? floorf(exact) : 0.0f);
#else
    const float exact = fma_rn(static_cast<float>(r), 0x1p-16f, change / divisor);
    const float cut = exact > 0x1p17f ? 0x1p17f : exact < -0x1p17f ? -0x1p17f : exact == exact ? exact : 0.0f;
    const float whole = static_cast<float>(static_cast<int32_t>(cut)); // floor() is a call where it is no instruction
    const float next = q + (whole > cut ? whole - 1.0f : whole);
#endif
    return next > limit ? limit : next < -limit ? -limit : next;
}

} // namespace distzo2
