// The AVX-512 intrinsics that simd_avx512.h uses, written in plain C++ from their definitions in Intel's manual, so
// that the AVX-512 kernels' logic is tested on every machine. Only lanes and bits are modelled, not speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "noise/rounding.h"

namespace distzo2 {
namespace {

struct __m512 {
    float v[16];
};
struct __m512i {
    uint32_t v[16];
};
struct __m256i {
    uint16_t v[16];
};
struct __m128i {
    uint8_t v[16];
};
using __mmask16 = uint16_t;

enum {
    _CMP_UNORD_Q = 3,
    _MM_FROUND_TO_NEAREST_INT = 0,
    _MM_FROUND_TO_NEG_INF = 1,
    _MM_FROUND_NO_EXC = 8,
    _MM_PERM_CCAA = 0xA0
};

template <class To, class From>
To model_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class Out, class Lane>
Out model_lanes(Lane lane) {
    Out out;
    for (int i = 0; i < 16; ++i)
        out.v[i] = lane(i);
    return out;
}

inline uint64_t quad(const __m512i& a, int i) { return static_cast<uint64_t>(a.v[2 * i + 1]) << 32 | a.v[2 * i]; }

template <class Lane>
__m512i model_quads(Lane lane) {
    __m512i out;
    for (int i = 0; i < 8; ++i) {
        const uint64_t value = lane(i);
        out.v[2 * i] = static_cast<uint32_t>(value);
        out.v[2 * i + 1] = static_cast<uint32_t>(value >> 32);
    }
    return out;
}

#define DZO_MODEL(type, name, parameters, expression)                                                                  \
    inline type name parameters {                                                                                      \
        return model_lanes<type>([&](int i) { return expression; });                                                   \
    }
DZO_MODEL(__m512, _mm512_set1_ps, (float x), (static_cast<void>(i), x))
DZO_MODEL(__m512i, _mm512_set1_epi32, (int x), (static_cast<void>(i), static_cast<uint32_t>(x)))
DZO_MODEL(__m512, _mm512_fmadd_ps, (__m512 a, __m512 b, __m512 c), fma_rn(a.v[i], b.v[i], c.v[i]))
DZO_MODEL(__m512, _mm512_add_ps, (__m512 a, __m512 b), a.v[i] + b.v[i])
DZO_MODEL(__m512, _mm512_mul_ps, (__m512 a, __m512 b), a.v[i] * b.v[i])
DZO_MODEL(__m512, _mm512_sub_ps, (__m512 a, __m512 b), a.v[i] - b.v[i])
DZO_MODEL(__m512, _mm512_div_ps, (__m512 a, __m512 b), a.v[i] / b.v[i])
DZO_MODEL(__m512, _mm512_min_ps, (__m512 a, __m512 b), a.v[i] < b.v[i] ? a.v[i] : b.v[i])
DZO_MODEL(__m512, _mm512_max_ps, (__m512 a, __m512 b), a.v[i] > b.v[i] ? a.v[i] : b.v[i])
DZO_MODEL(__m512, _mm512_roundscale_ps, (__m512 a, int), std::floor(a.v[i])) // _MM_FROUND_TO_NEG_INF alone
DZO_MODEL(__m512, _mm512_sqrt_ps, (__m512 a), std::sqrt(a.v[i]))
DZO_MODEL(__m512, _mm512_cvtepi32_ps, (__m512i a), static_cast<float>(static_cast<int32_t>(a.v[i])))
DZO_MODEL(__m512, _mm512_cvtepu32_ps, (__m512i a), static_cast<float>(a.v[i]))
DZO_MODEL(__m512i, _mm512_cvttps_epi32, (__m512 a),
          std::fabs(a.v[i]) < 0x1p31f ? static_cast<uint32_t>(static_cast<int32_t>(a.v[i])) : 0x80000000u)
DZO_MODEL(__m512i, _mm512_add_epi32, (__m512i a, __m512i b), a.v[i] + b.v[i])
DZO_MODEL(__m512i, _mm512_sub_epi32, (__m512i a, __m512i b), a.v[i] - b.v[i])
DZO_MODEL(__m512i, _mm512_and_si512, (__m512i a, __m512i b), a.v[i] & b.v[i])
DZO_MODEL(__m512i, _mm512_or_si512, (__m512i a, __m512i b), a.v[i] | b.v[i])
DZO_MODEL(__m512i, _mm512_xor_si512, (__m512i a, __m512i b), a.v[i] ^ b.v[i])
DZO_MODEL(__m512i, _mm512_min_epu32, (__m512i a, __m512i b), a.v[i] < b.v[i] ? a.v[i] : b.v[i])
DZO_MODEL(__m512i, _mm512_max_epi32, (__m512i a, __m512i b),
          static_cast<int32_t>(a.v[i]) > static_cast<int32_t>(b.v[i]) ? a.v[i] : b.v[i])
DZO_MODEL(__m512i, _mm512_srli_epi32, (__m512i a, unsigned n), a.v[i] >> n)
DZO_MODEL(__m512i, _mm512_slli_epi32, (__m512i a, unsigned n), a.v[i] << n)
DZO_MODEL(__m512i, _mm512_cvtepu16_epi32, (__m256i a), a.v[i])
DZO_MODEL(__m512i, _mm512_cvtepi16_epi32, (__m256i a), static_cast<uint32_t>(static_cast<int16_t>(a.v[i])))
DZO_MODEL(__m512i, _mm512_cvtepi8_epi32, (__m128i a), static_cast<uint32_t>(static_cast<int8_t>(a.v[i])))
DZO_MODEL(__m128i, _mm512_cvtepi32_epi8, (__m512i a), static_cast<uint8_t>(a.v[i]))
DZO_MODEL(__m256i, _mm512_cvtepi32_epi16, (__m512i a), static_cast<uint16_t>(a.v[i]))
DZO_MODEL(__m512, _mm512_cvtph_ps, (__m256i a), fp16_to_float(a.v[i]))
DZO_MODEL(__m256i, _mm512_cvtps_ph, (__m512 a, int), float_to_fp16(a.v[i]))
DZO_MODEL(__m512, _mm512_mask_mov_ps, (__m512 a, __mmask16 mask, __m512 b), mask >> i & 1 ? b.v[i] : a.v[i])
DZO_MODEL(__m512i, _mm512_mask_mov_epi32, (__m512i a, __mmask16 mask, __m512i b), mask >> i & 1 ? b.v[i] : a.v[i])
// Within each quarter of four lanes.
DZO_MODEL(__m512i, _mm512_unpacklo_epi32, (__m512i a, __m512i b), (i % 2 ? b : a).v[i / 4 * 4 + i % 4 / 2])
DZO_MODEL(__m512i, _mm512_unpackhi_epi32, (__m512i a, __m512i b), (i % 2 ? b : a).v[i / 4 * 4 + i % 4 / 2 + 2])
DZO_MODEL(__m512i, _mm512_unpacklo_epi64, (__m512i a, __m512i b), (i % 4 < 2 ? a : b).v[i / 4 * 4 + i % 2])
DZO_MODEL(__m512i, _mm512_unpackhi_epi64, (__m512i a, __m512i b), (i % 4 < 2 ? a : b).v[i / 4 * 4 + i % 2 + 2])
DZO_MODEL(__m512, _mm512_shuffle_ps, (__m512 a, __m512 b, int how),
          (i % 4 < 2 ? a : b).v[i / 4 * 4 + (how >> (i % 4 * 2) & 3)])
DZO_MODEL(__m512i, _mm512_shuffle_epi32, (__m512i a, int how), a.v[i / 4 * 4 + (how >> (i % 4 * 2) & 3)])
#undef DZO_MODEL

inline __m512i _mm512_castps_si512(__m512 a) { return model_cast<__m512i>(a); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return model_cast<__m512>(a); }
inline __m512i _mm512_set1_epi64(long long x) {
    return model_quads([&](int) { return static_cast<uint64_t>(x); });
}
inline __m512i _mm512_set_epi64(long long h, long long g, long long f, long long e, long long d, long long c,
                                long long b, long long a) {
    const long long from_low[] = {a, b, c, d, e, f, g, h};
    return model_quads([&](int i) { return static_cast<uint64_t>(from_low[i]); });
}
inline __m512i _mm512_add_epi64(__m512i a, __m512i b) {
    return model_quads([&](int i) { return quad(a, i) + quad(b, i); });
}
inline __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
    return model_quads([&](int i) { return static_cast<uint64_t>(a.v[2 * i]) * b.v[2 * i]; });
}
inline __m512i _mm512_srli_epi64(__m512i a, unsigned n) {
    return model_quads([&](int i) { return quad(a, i) >> n; });
}
inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
    return model_lanes<__m512i>([&](int i) {
        uint32_t out = 0;
        for (int row = 0; row < 8; ++row)
            if (table >> row & 1)
                out |= (row & 4 ? a.v[i] : ~a.v[i]) & (row & 2 ? b.v[i] : ~b.v[i]) & (row & 1 ? c.v[i] : ~c.v[i]);
        return out;
    });
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) { // _CMP_UNORD_Q alone
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i)
        mask |= (a.v[i] != a.v[i] || b.v[i] != b.v[i] ? 1u : 0u) << i;
    return static_cast<__mmask16>(mask);
}
inline __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i)
        mask |= (a.v[i] < b.v[i] ? 1u : 0u) << i;
    return static_cast<__mmask16>(mask);
}
inline __m512 _mm512_loadu_ps(const float* p) {
    __m512 out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline __m512i _mm512_loadu_si512(const void* p) {
    __m512i out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline __m256i _mm256_loadu_si256(const __m256i* p) {
    __m256i out;
    std::memcpy(&out, static_cast<const void*>(p), sizeof out);
    return out;
}
inline __m128i _mm_loadu_si128(const __m128i* p) {
    __m128i out;
    std::memcpy(&out, static_cast<const void*>(p), sizeof out);
    return out;
}
inline void _mm_storeu_si128(__m128i* p, __m128i x) { std::memcpy(static_cast<void*>(p), &x, sizeof x); }
inline void _mm512_storeu_ps(float* p, __m512 x) { std::memcpy(p, &x, sizeof x); }
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
inline void _mm256_storeu_si256(__m256i* p, __m256i x) { std::memcpy(static_cast<void*>(p), &x, sizeof x); }

} // namespace
} // namespace distzo2
