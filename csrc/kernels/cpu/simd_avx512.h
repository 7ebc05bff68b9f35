// Sixteen float32 lanes of AVX-512 (F, BW, VL, DQ): what cpu_tiles.h is built from. Included by the AVX-512 translation
// unit alone; internal linkage throughout, as in simd_avx2.h, whose scheme of Philox rounds this follows with one
// three-way xor for each word.
#pragma once

// GCC 12's AVX-512 intrinsics pass values that are undefined on purpose, and it warns of them at each use (GCC bug
// 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if !defined(DISTZO2_AVX512_MODEL) // a test compiles this file over a model of the intrinsics
#include <immintrin.h>
#endif

#include "noise/rounding.h"

namespace distzo2 {
namespace {

#define DZO_LANES static inline __attribute__((always_inline))

struct Lanes {
    static constexpr int kWidth = 16;
    static constexpr bool kHasBlocks = false;
    using F = __m512;
    using U = __m512i;
    using SignMask = __mmask16;

    DZO_LANES F set(float x) { return _mm512_set1_ps(x); }
    DZO_LANES U set_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    DZO_LANES F load(const float* p) { return _mm512_loadu_ps(p); }
    DZO_LANES U load_bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
    DZO_LANES void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    DZO_LANES void store_bits(uint32_t* p, U x) { _mm512_storeu_si512(p, x); }
    DZO_LANES F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    DZO_LANES F add(F a, F b) { return _mm512_add_ps(a, b); }
    DZO_LANES F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    DZO_LANES F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    DZO_LANES F sqrt(F a) { return _mm512_sqrt_ps(a); }
    DZO_LANES U bits(F x) { return _mm512_castps_si512(x); }
    DZO_LANES F from_bits(U x) { return _mm512_castsi512_ps(x); }
    DZO_LANES U add(U a, U b) { return _mm512_add_epi32(a, b); }
    DZO_LANES U sub(U a, U b) { return _mm512_sub_epi32(a, b); }
    DZO_LANES U and_bits(U a, U b) { return _mm512_and_si512(a, b); }
    DZO_LANES U xor_bits(U a, U b) { return _mm512_xor_si512(a, b); }
    DZO_LANES F from_i32(U x) { return _mm512_cvtepi32_ps(x); }
    DZO_LANES F unit_interval(U w) { return fma(_mm512_cvtepu32_ps(w), set(0x1p-32f), set(0x1p-33f)); }
    DZO_LANES __mmask16 is_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
    DZO_LANES F canonical(F x) { return _mm512_mask_mov_ps(x, is_nan(x), from_bits(set_bits(kNanFp32))); }

    // +1 or -1 from bits first .. first + 15 of a word.
    DZO_LANES F signs(uint32_t word, int first) { return choose(sign_mask(word, first), set(1.0f), set(-1.0f)); }
    DZO_LANES SignMask sign_mask(uint32_t word, int first) { return static_cast<SignMask>(word >> first); }
    DZO_LANES F choose(SignMask sign, F plus, F minus) { return _mm512_mask_mov_ps(minus, sign, plus); }

    // 16-bit storage.
    DZO_LANES __m256i load_half(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    DZO_LANES void store_half(uint16_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
    DZO_LANES U load_u16(const uint16_t* p) { return _mm512_cvtepu16_epi32(load_half(p)); }
    DZO_LANES F load_bf16(const uint16_t* p) { return from_bits(_mm512_slli_epi32(load_u16(p), 16)); }
    DZO_LANES F load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(load_half(p)); }
    DZO_LANES void store_bf16_nearest(uint16_t* p, F x) {
        const U b = bits(canonical(x));
        const U odd = and_bits(_mm512_srli_epi32(b, 16), set_bits(1));
        store_half(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(add(add(b, set_bits(0x7FFF)), odd), 16)));
    }
    DZO_LANES void store_fp16_nearest(uint16_t* p, F x) {
        store_half(p, _mm512_cvtps_ph(canonical(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    DZO_LANES void store_bf16_exact(uint16_t* p, F x) {
        store_half(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(x), 16)));
    }
    DZO_LANES void store_fp16_exact(uint16_t* p, F x) {
        store_half(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    // Stochastic rounding to values of the 16-bit type; r has 16 random bits in each lane.
    DZO_LANES F stochastic_bf16(F x, U r) {
        return from_bits(and_bits(add(bits(canonical(x)), r), set_bits(0xFFFF0000u)));
    }
    DZO_LANES F stochastic_fp16(F x, U r) {
        const U b = bits(x);
        const U magnitude = and_bits(b, set_bits(0x7FFFFFFFu));
        const U sign = and_bits(_mm512_srli_epi32(b, 16), set_bits(0x8000u));
        const U tiny = _mm512_srli_epi32(add(_mm512_cvttps_epi32(mul(from_bits(magnitude), set(0x1p40f))), r), 16);
        const U shifted = _mm512_srli_epi32(add(magnitude, _mm512_srli_epi32(r, 3)), 13);
        const U normal = _mm512_min_epu32(sub(shifted, set_bits(112u << 10)), set_bits(0x7C00u));
        const __mmask16 is_tiny = _mm512_cmplt_epu32_mask(magnitude, set_bits(0x38800000u));
        const U half = _mm512_or_si512(_mm512_mask_mov_epi32(normal, is_tiny, tiny), sign);
        const F value = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
        return _mm512_mask_mov_ps(value, is_nan(x), from_bits(set_bits(kNanFp32)));
    }

    // Codes as floats; step_code of rounding.h, r as above.
    DZO_LANES F load_code(const int16_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(load_half(reinterpret_cast<const uint16_t*>(p))));
    }
    DZO_LANES F load_code(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    DZO_LANES void store_code(int16_t* p, F x) {
        store_half(reinterpret_cast<uint16_t*>(p), _mm512_cvtepi32_epi16(_mm512_cvttps_epi32(x)));
    }
    DZO_LANES void store_code(int8_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x)));
    }
    DZO_LANES F step_code(F q, F change, F divisor, U r, float limit) {
        const F exact = fma(_mm512_cvtepi32_ps(r), set(0x1p-16f), _mm512_div_ps(change, divisor));
        const F step = _mm512_roundscale_ps(exact, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        const F next = add(q, _mm512_mask_mov_ps(step, is_nan(step), set(0.0f)));
        return _mm512_max_ps(_mm512_min_ps(next, set(limit)), set(-limit));
    }
    DZO_LANES F not_below_zero(F x) { return from_bits(_mm512_max_epi32(bits(x), set_bits(0))); } // of canonical x

    // Lanes hold groups 0 4 8 12 1 5 9 13 2 ...; transposed within the 128-bit quarters, they come out in memory order.
    DZO_LANES void to_memory_order(U w[4]) {
        const U t0 = _mm512_unpacklo_epi32(w[0], w[1]);
        const U t1 = _mm512_unpackhi_epi32(w[0], w[1]);
        const U t2 = _mm512_unpacklo_epi32(w[2], w[3]);
        const U t3 = _mm512_unpackhi_epi32(w[2], w[3]);
        w[0] = _mm512_unpacklo_epi64(t0, t2);
        w[1] = _mm512_unpackhi_epi64(t0, t2);
        w[2] = _mm512_unpacklo_epi64(t1, t3);
        w[3] = _mm512_unpackhi_epi64(t1, t3);
    }

    // Sixteen consecutive groups of a draw at a time, in 64-bit lanes whose low half is a Philox word; see
    // simd_avx2.h.
    struct Philox {
        U key0[10], key1[10]; // round keys in both halves of a lane
        U m0, m1, stride;
        U tag, c0_after_2, c2_after_2, c3_after_2;
        U product[2]; // M0 c0 of the groups in each half of the block
        uint32_t k0, k1;

        DZO_LANES U wide(uint32_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
        DZO_LANES U high(U x) { return _mm512_srli_epi64(x, 32); }
        DZO_LANES U xor3(U a, U b, U c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
        DZO_LANES U low_words(U x, U y) { return bits(_mm512_shuffle_ps(from_bits(x), from_bits(y), 0x88)); }
        DZO_LANES U high_words(U x, U y) { return bits(_mm512_shuffle_ps(from_bits(x), from_bits(y), 0xDD)); }

        inline __attribute__((always_inline)) explicit Philox(uint64_t seed)
            : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {
            for (uint32_t i = 0; i < 10; ++i) {
                key0[i] = wide(k0 + i * kPhiloxW0);
                key1[i] = wide(k1 + i * kPhiloxW1);
            }
            m0 = wide(kPhiloxM0);
            m1 = wide(kPhiloxM1);
            stride = _mm512_set1_epi64(static_cast<long long>(16ull * kPhiloxM0));
        }

        // The next block begins at `group`, which is a multiple of 16. c1, c2 and c3 are the same for all groups, so
        // the first two rounds are mostly scalars.
        inline __attribute__((always_inline)) void seek(const Draw& draw, uint64_t group) {
            const uint64_t b0 = static_cast<uint64_t>(kPhiloxM1) * draw.step;
            const uint64_t a1 = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(b0 >> 32) ^ draw.param ^ k0);
            tag = wide((draw.tag | static_cast<uint32_t>(group >> 32)) ^ k1);
            c0_after_2 = wide(static_cast<uint32_t>(b0) ^ (k0 + kPhiloxW0));
            c2_after_2 = wide(static_cast<uint32_t>(a1 >> 32) ^ (k1 + kPhiloxW1));
            c3_after_2 = wide(static_cast<uint32_t>(a1) ^ (k1 + 2 * kPhiloxW1));
            const U q = wide(static_cast<uint32_t>(group));
            product[0] = _mm512_mul_epu32(_mm512_add_epi64(q, _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)), m0);
            product[1] = _mm512_mul_epu32(_mm512_add_epi64(q, _mm512_set_epi64(15, 11, 14, 10, 13, 9, 12, 8)), m0);
        }

        inline __attribute__((always_inline)) void next(U w[4]) {
            U a[2], b[2], c0[2], c2[2], a_before[2], b_before[2];
            for (int h = 0; h < 2; ++h) {
                a[h] = product[h];
                product[h] = _mm512_add_epi64(product[h], stride);
            }
            for (int h = 0; h < 2; ++h) // round 1
                b_before[h] = _mm512_mul_epu32(xor_bits(high(a[h]), tag), m1);
            for (int h = 0; h < 2; ++h) { // round 2
                c0[h] = xor_bits(high(b_before[h]), c0_after_2);
                c2[h] = xor_bits(a[h], c2_after_2);
            }
            for (int h = 0; h < 2; ++h) {
                a[h] = _mm512_mul_epu32(c0[h], m0);
                b[h] = _mm512_mul_epu32(c2[h], m1);
            }
            for (int h = 0; h < 2; ++h) {
                c0[h] = xor3(high(b[h]), b_before[h], key0[2]);
                c2[h] = xor_bits(high(a[h]), c3_after_2);
            }
            for (int round = 3; round < 9; ++round) {
                for (int h = 0; h < 2; ++h) {
                    a_before[h] = a[h];
                    b_before[h] = b[h];
                    a[h] = _mm512_mul_epu32(c0[h], m0);
                    b[h] = _mm512_mul_epu32(c2[h], m1);
                }
                for (int h = 0; h < 2; ++h) {
                    c0[h] = xor3(high(b[h]), b_before[h], key0[round]);
                    c2[h] = xor3(high(a[h]), a_before[h], key1[round]);
                }
            }
            for (int h = 0; h < 2; ++h) {
                a_before[h] = a[h];
                b_before[h] = b[h];
                a[h] = _mm512_mul_epu32(c0[h], m0);
                b[h] = _mm512_mul_epu32(c2[h], m1);
            }
            w[0] = xor3(high_words(b[0], b[1]), low_words(b_before[0], b_before[1]), last_key(key0[9]));
            w[1] = low_words(b[0], b[1]);
            w[2] = xor3(high_words(a[0], a[1]), low_words(a_before[0], a_before[1]), last_key(key1[9]));
            w[3] = low_words(a[0], a[1]);
        }

        // The key of the last round, in every 32-bit lane.
        DZO_LANES U last_key(U key) { return _mm512_shuffle_epi32(key, _MM_PERM_CCAA); }
    };
};

} // namespace
} // namespace distzo2
