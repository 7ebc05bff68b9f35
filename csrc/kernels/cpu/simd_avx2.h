// Eight float32 lanes of AVX2 + FMA + F16C: what cpu_tiles.h is built from. Included by the AVX2 translation unit
// alone; everything has internal linkage, so that no function compiled for this instruction set can be picked by the
// linker for another file.
#pragma once

#include <immintrin.h>

#include "noise/rounding.h"

namespace distzo2 {
namespace {

#define DZO_LANES static inline __attribute__((always_inline))

struct Lanes {
    static constexpr int kWidth = 8;
    static constexpr bool kHasBlocks = true; // 32 elements at a time: make_canonical and the like
    using F = __m256;
    using U = __m256i;
    using SignMask = __m256i; // the lanes' highest bits

    DZO_LANES F set(float x) { return _mm256_set1_ps(x); }
    DZO_LANES U set_bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    DZO_LANES F load(const float* p) { return _mm256_loadu_ps(p); }
    DZO_LANES U load_bits(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const U*>(p)); }
    DZO_LANES void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    DZO_LANES void store_bits(uint32_t* p, U x) { _mm256_storeu_si256(reinterpret_cast<U*>(p), x); }
    DZO_LANES F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    DZO_LANES F add(F a, F b) { return _mm256_add_ps(a, b); }
    DZO_LANES F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    DZO_LANES F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    DZO_LANES F sqrt(F a) { return _mm256_sqrt_ps(a); }
    DZO_LANES U bits(F x) { return _mm256_castps_si256(x); }
    DZO_LANES F from_bits(U x) { return _mm256_castsi256_ps(x); }
    DZO_LANES U add(U a, U b) { return _mm256_add_epi32(a, b); }
    DZO_LANES U sub(U a, U b) { return _mm256_sub_epi32(a, b); }
    DZO_LANES U and_bits(U a, U b) { return _mm256_and_si256(a, b); }
    DZO_LANES U xor_bits(U a, U b) { return _mm256_xor_si256(a, b); }
    DZO_LANES F from_i32(U x) { return _mm256_cvtepi32_ps(x); }

    // u of normal.h: fma(float(w), 2^-32, 2^-33). In units of 2^-32: (2^39 + hi * 2^16) - (2^39 + 2^23) is exact, and
    // adding 2^23 + lo rounds once, to nearest even, as the conversion of the unsigned word does.
    DZO_LANES F unit_interval(U w) {
        const F lo = from_bits(_mm256_blend_epi16(w, set_bits(0x3B000000), 0xAA));
        const F hi = from_bits(_mm256_blend_epi16(_mm256_srli_epi32(w, 16), set_bits(0x43000000), 0xAA));
        return _mm256_add_ps(_mm256_add_ps(_mm256_sub_ps(hi, set(0x1p7f + 0x1p-9f)), lo), set(0x1p-33f));
    }

    DZO_LANES F canonical(F x) {
        return _mm256_blendv_ps(x, from_bits(set_bits(kNanFp32)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }

    // +1 or -1 from bits first .. first + 7 of a word.
    DZO_LANES F signs(uint32_t word, int first) { return choose(sign_mask(word, first), set(1.0f), set(-1.0f)); }

    // 16-bit storage.
    DZO_LANES __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    DZO_LANES void store_half(uint16_t* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
    DZO_LANES __m128i narrow(U x) { // each lane is below 2^16
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08));
    }
    DZO_LANES U load_u16(const uint16_t* p) { return _mm256_cvtepu16_epi32(load_half(p)); }
    DZO_LANES F load_bf16(const uint16_t* p) { return from_bits(_mm256_slli_epi32(load_u16(p), 16)); }
    DZO_LANES F load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(load_half(p)); }
    DZO_LANES void store_bf16_nearest(uint16_t* p, F x) {
        const U b = bits(canonical(x));
        const U odd = and_bits(_mm256_srli_epi32(b, 16), set_bits(1));
        store_half(p, narrow(_mm256_srli_epi32(add(add(b, set_bits(0x7FFF)), odd), 16)));
    }
    DZO_LANES void store_fp16_nearest(uint16_t* p, F x) { store_fp16_number(p, canonical(x)); }

    // Blocks of 32 elements. NaN is rare: one branch for all of them.
    DZO_LANES void make_canonical(F x[4]) {
        const F nan = _mm256_or_ps(_mm256_cmp_ps(x[0], x[1], _CMP_UNORD_Q), _mm256_cmp_ps(x[2], x[3], _CMP_UNORD_Q));
        if (__builtin_expect(_mm256_movemask_ps(nan), 0))
            for (int j = 0; j < 4; ++j)
                x[j] = canonical(x[j]);
    }
    DZO_LANES void store_fp16_number(uint16_t* p, F x) {
        store_half(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    // Sixteen elements of bf16 as two vectors, of the even and of the odd ones: nothing is unpacked or packed. Or
    // codes.
    DZO_LANES void load_pair(const uint16_t* p, F& even, F& odd) {
        const U both = _mm256_loadu_si256(reinterpret_cast<const U*>(p));
        even = from_bits(_mm256_slli_epi32(both, 16));
        odd = from_bits(and_bits(both, set_bits(0xFFFF0000u)));
    }
    DZO_LANES void code_pair(U both, F& even, F& odd) {
        even = from_i32(_mm256_srai_epi32(_mm256_slli_epi32(both, 16), 16));
        odd = from_i32(_mm256_srai_epi32(both, 16));
    }
    DZO_LANES void load_pair(const int16_t* p, F& even, F& odd) {
        code_pair(_mm256_loadu_si256(reinterpret_cast<const U*>(p)), even, odd);
    }
    DZO_LANES void load_pair(const int8_t* p, F& even, F& odd) {
        code_pair(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), even, odd);
    }
    // Numbers, to nearest even: up if the dropped half exceeds 0x8000, or equals it and the kept one is odd.
    DZO_LANES void store_bf16_pair(uint16_t* p, F even, F odd) {
        const U kept = _mm256_blend_epi16(_mm256_srli_epi32(bits(even), 16), bits(odd), 0xAA);
        const U dropped = _mm256_blend_epi16(bits(even), _mm256_slli_epi32(bits(odd), 16), 0xAA);
        const U up = _mm256_subs_epu16(dropped, _mm256_andnot_si256(kept, set_bits(0x00010001u))); // its highest bits
        _mm256_storeu_si256(reinterpret_cast<U*>(p), _mm256_add_epi16(kept, _mm256_srli_epi16(up, 15)));
    }
    // Bits first .. first + 7 of a word.
    DZO_LANES U sign_mask(uint32_t word, int first) {
        return _mm256_sllv_epi32(set_bits(word),
                                 sub(_mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31), set_bits(first)));
    }
    // Of each half of a word the even bits, then the odd ones.
    DZO_LANES void sign_mask_pairs(uint32_t word, U mask[4]) {
        const U even = _mm256_set_epi32(17, 19, 21, 23, 25, 27, 29, 31);
        for (int j = 0; j < 4; ++j)
            mask[j] = _mm256_sllv_epi32(set_bits(word), sub(even, set_bits(j / 2 * 16 + j % 2)));
    }
    DZO_LANES F choose(SignMask sign, F plus, F minus) { return _mm256_blendv_ps(minus, plus, from_bits(sign)); }

    DZO_LANES void store_bf16_exact(uint16_t* p, F x) { store_half(p, narrow(_mm256_srli_epi32(bits(x), 16))); }
    DZO_LANES void store_fp16_exact(uint16_t* p, F x) { store_fp16_number(p, x); }

    // Stochastic rounding to values of the 16-bit type; r has 16 random bits in each lane.
    DZO_LANES F stochastic_bf16(F x, U r) {
        return from_bits(and_bits(add(bits(canonical(x)), r), set_bits(0xFFFF0000u)));
    }
    DZO_LANES F stochastic_fp16(F x, U r) {
        const U b = bits(x);
        const U magnitude = and_bits(b, set_bits(0x7FFFFFFFu));
        const U sign = and_bits(_mm256_srli_epi32(b, 16), set_bits(0x8000u));
        const U tiny = _mm256_srli_epi32(add(_mm256_cvttps_epi32(mul(from_bits(magnitude), set(0x1p40f))), r), 16);
        const U shifted = _mm256_srli_epi32(add(magnitude, _mm256_srli_epi32(r, 3)), 13);
        const U normal = _mm256_min_epu32(sub(shifted, set_bits(112u << 10)), set_bits(0x7C00u));
        const U is_tiny = _mm256_cmpgt_epi32(set_bits(0x38800000u), magnitude);
        const U half = _mm256_or_si256(_mm256_blendv_epi8(normal, tiny, is_tiny), sign);
        const F value = _mm256_cvtph_ps(narrow(half));
        return _mm256_blendv_ps(value, from_bits(set_bits(kNanFp32)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }

    // Codes as floats; step_code of rounding.h, r as above.
    DZO_LANES F load_code(const int16_t* p) {
        return from_i32(_mm256_cvtepi16_epi32(load_half(reinterpret_cast<const uint16_t*>(p))));
    }
    DZO_LANES F load_code(const int8_t* p) {
        return from_i32(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    DZO_LANES __m128i code_half(F x) {
        const U words = _mm256_cvttps_epi32(x);
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packs_epi32(words, words), 0x08));
    }
    DZO_LANES void store_code(int16_t* p, F x) { store_half(reinterpret_cast<uint16_t*>(p), code_half(x)); }
    DZO_LANES void store_code(int8_t* p, F x) {
        const __m128i half = code_half(x);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
    }
    DZO_LANES F step_code(F q, F change, F divisor, U r, float limit) {
        const F exact = fma(from_i32(r), set(0x1p-16f), _mm256_div_ps(change, divisor));
        const F step = _mm256_round_ps(exact, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        const F next = add(q, _mm256_and_ps(step, _mm256_cmp_ps(step, step, _CMP_ORD_Q)));
        return _mm256_max_ps(_mm256_min_ps(next, set(limit)), set(-limit));
    }
    DZO_LANES F not_below_zero(F x) { return from_bits(_mm256_max_epi32(bits(x), set_bits(0))); } // of canonical x

    // Lane l of a Philox block holds group kOrder[l] of eight; with this order, four vectors transposed within their
    // 128-bit halves come out in memory order.
    DZO_LANES void to_memory_order(U w[4]) {
        const U t0 = _mm256_unpacklo_epi32(w[0], w[1]);
        const U t1 = _mm256_unpackhi_epi32(w[0], w[1]);
        const U t2 = _mm256_unpacklo_epi32(w[2], w[3]);
        const U t3 = _mm256_unpackhi_epi32(w[2], w[3]);
        w[0] = _mm256_unpacklo_epi64(t0, t2);
        w[1] = _mm256_unpackhi_epi64(t0, t2);
        w[2] = _mm256_unpacklo_epi64(t1, t3);
        w[3] = _mm256_unpackhi_epi64(t1, t3);
    }

    // Eight consecutive groups of a draw at a time, in 64-bit lanes whose low half is a Philox word: the high half of
    // a product needs no masking, since the next multiplication reads low halves only. Write A_r = M0 c0, B_r = M1 c2
    // for the products of round r. The next round's words are hi(B_r) ^ lo(B_{r-1}) ^ k0_r, and lo(B_r) is used a round
    // later, when k0_{r+1} joins it; so one xor of B_r with (k0_r << 32 | k0_{r+1}) in even rounds serves two rounds.
    // c1, c2 and c3 are the same for all groups, so the first two rounds are mostly scalars.
    struct Philox {
        U even_a[5], even_b[5]; // of rounds 4, 6, 8: (k_r << 32 | k_{r+1}); even_b[1] is round 2's
        U first_a, second_b, third_a;
        U m0, m1;
        U product[2]; // A_0 of the groups in each half of the block
        U stride;

        DZO_LANES U wide(uint32_t high, uint32_t low) {
            return _mm256_set1_epi64x(static_cast<long long>(static_cast<uint64_t>(high) << 32 | low));
        }

        inline __attribute__((always_inline)) explicit Philox(uint64_t seed) {
            uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
            for (int i = 0; i < 5; ++i) {
                even_a[i] = wide(k1, k1 + kPhiloxW1);
                even_b[i] = wide(k0, k0 + kPhiloxW0);
                k0 += 2 * kPhiloxW0;
                k1 += 2 * kPhiloxW1;
            }
            key0 = static_cast<uint32_t>(seed);
            key1 = static_cast<uint32_t>(seed >> 32);
            m0 = _mm256_set1_epi64x(kPhiloxM0);
            m1 = _mm256_set1_epi64x(kPhiloxM1);
            stride = _mm256_set1_epi64x(static_cast<long long>(8ull * kPhiloxM0));
        }

        // The next block begins at `group`, which is a multiple of 8.
        inline __attribute__((always_inline)) void seek(const Draw& draw, uint64_t group) {
            const uint32_t c3 = draw.tag | static_cast<uint32_t>(group >> 32);
            const uint64_t b0 = static_cast<uint64_t>(kPhiloxM1) * draw.step;
            const uint32_t c0 = static_cast<uint32_t>(b0 >> 32) ^ draw.param ^ key0;
            const uint64_t a1 = static_cast<uint64_t>(kPhiloxM0) * c0;
            first_a = wide(c3 ^ key1, static_cast<uint32_t>(a1 >> 32) ^ (key1 + kPhiloxW1));
            second_b = wide(static_cast<uint32_t>(b0) ^ (key0 + kPhiloxW0), 0);
            third_a = wide(static_cast<uint32_t>(a1) ^ (key1 + 2 * kPhiloxW1), key1 + 3 * kPhiloxW1);
            const U q = _mm256_set1_epi64x(static_cast<uint32_t>(group));
            product[0] = _mm256_mul_epu32(_mm256_add_epi64(q, _mm256_set_epi64x(3, 1, 2, 0)), m0);
            product[1] = _mm256_mul_epu32(_mm256_add_epi64(q, _mm256_set_epi64x(7, 5, 6, 4)), m0);
        }

        DZO_LANES U high(U x) { return _mm256_srli_epi64(x, 32); }
        DZO_LANES U low_words(U x, U y) { return bits(_mm256_shuffle_ps(from_bits(x), from_bits(y), 0x88)); }
        DZO_LANES U high_words(U x, U y) { return bits(_mm256_shuffle_ps(from_bits(x), from_bits(y), 0xDD)); }

        // Lanes hold groups 0 2 4 6 1 3 5 7. The two halves are interleaved step by step: the scheduler sees about 64
        // operations.
        inline __attribute__((always_inline)) void next(U w[4]) {
            U a[2], b[2], c0[2], c2[2], a_before[2], b_before[2];
            for (int h = 0; h < 2; ++h)
                a[h] = xor_bits(product[h], first_a); // c2 = hi; after round 1, c2 = lo
            for (int h = 0; h < 2; ++h)
                product[h] = _mm256_add_epi64(product[h], stride);
            for (int h = 0; h < 2; ++h)
                b_before[h] = _mm256_mul_epu32(high(a[h]), m1);
            for (int h = 0; h < 2; ++h)
                b[h] = xor_bits(_mm256_mul_epu32(a[h], m1), even_b[1]);
            for (int h = 0; h < 2; ++h)
                c0[h] = high(xor_bits(b_before[h], second_b));
            // Round 2: c3 is a constant, folded into third_a.
            for (int h = 0; h < 2; ++h)
                a[h] = xor_bits(_mm256_mul_epu32(c0[h], m0), third_a);
            for (int h = 0; h < 2; ++h)
                c0[h] = xor_bits(high(b[h]), b_before[h]);
            for (int h = 0; h < 2; ++h)
                c2[h] = high(a[h]);
            for (int pair = 2; pair < 5; ++pair) {
                for (int h = 0; h < 2; ++h)
                    a_before[h] = a[h], a[h] = _mm256_mul_epu32(c0[h], m0);
                for (int h = 0; h < 2; ++h)
                    b_before[h] = b[h], b[h] = _mm256_mul_epu32(c2[h], m1);
                for (int h = 0; h < 2; ++h)
                    c2[h] = xor_bits(high(a[h]), a_before[h]);
                for (int h = 0; h < 2; ++h)
                    c0[h] = xor_bits(high(b[h]), b_before[h]);
                for (int h = 0; h < 2; ++h)
                    b_before[h] = b[h], b[h] = xor_bits(_mm256_mul_epu32(c2[h], m1), even_b[pair]);
                for (int h = 0; h < 2; ++h)
                    a_before[h] = a[h], a[h] = xor_bits(_mm256_mul_epu32(c0[h], m0), even_a[pair]);
                for (int h = 0; h < 2; ++h)
                    c0[h] = xor_bits(high(b[h]), b_before[h]);
                for (int h = 0; h < 2; ++h)
                    c2[h] = xor_bits(high(a[h]), a_before[h]);
            }
            for (int h = 0; h < 2; ++h)
                a_before[h] = a[h], a[h] = _mm256_mul_epu32(c0[h], m0);
            for (int h = 0; h < 2; ++h)
                b_before[h] = b[h], b[h] = _mm256_mul_epu32(c2[h], m1);
            w[0] = xor_bits(high_words(b[0], b[1]), low_words(b_before[0], b_before[1]));
            w[1] = low_words(b[0], b[1]);
            w[2] = xor_bits(high_words(a[0], a[1]), low_words(a_before[0], a_before[1]));
            w[3] = low_words(a[0], a[1]);
        }

        uint32_t key0, key1;
    };
};

} // namespace
} // namespace distzo2
