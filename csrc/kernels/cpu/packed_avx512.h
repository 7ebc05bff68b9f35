// What decode.h is built from with AVX-512. Internal linkage throughout.
#pragma once

#include <type_traits>

#include "kernels/cpu/simd_avx512.h"

#include "kernels/cpu/packed_x86.h"

namespace distzo2 {
namespace {

struct P : Lanes, X86Codes {
    static constexpr int kParts = 2, kTableParts = 1;
    using Lanes::bits;

    // Rounded values of the first 16 codes, then of the second.
    struct WordTable {
        __m512i words;
        bool halves;
    };
    struct FloatTable {
        F values[2];
    };
    template <DType O>
    using Table = std::conditional_t<O == DType::kFp32, FloatTable, WordTable>;

    // The bits of 32 values, none of them NaN, in the 16-bit type. To bf16: up if the dropped half exceeds 0x8000, or
    // equals it and the kept one is odd.
    template <DType O>
    DZO_LANES __m512i rounded(F a, F b) {
        if constexpr (O == DType::kFp16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a, kNearest));
            return _mm512_inserti64x4(low, _mm512_cvtps_ph(b, kNearest), 1);
        } else {
            const __m512i low_words = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
                                                       30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
            const __m512i one = _mm512_set1_epi16(1);
            const __m512i dropped = _mm512_permutex2var_epi16(bits(a), low_words, bits(b));
            const __m512i kept = _mm512_permutex2var_epi16(bits(a), _mm512_or_si512(low_words, one), bits(b));
            const __m512i up = _mm512_subs_epu16(dropped, _mm512_andnot_si512(kept, one)); // its highest bits
            return _mm512_add_epi16(kept, _mm512_srli_epi16(up, 15));
        }
    }

    // The same of 16 values, twice: fewer instructions.
    DZO_LANES __m512i rounded_bf16_twice(F a) {
        const U b = bits(a), odd = and_bits(_mm512_srli_epi32(b, 16), set_bits(1));
        const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(add(add(b, set_bits(0x7FFF)), odd), 16));
        return _mm512_castsi256_si512(words);
    }

    template <DType O>
    DZO_LANES void make_table(const F* first, const F* second, Table<O>& table) {
        if constexpr (O == DType::kFp32) {
            table.values[0] = canonical(*first);
            table.values[1] = canonical(*second);
        } else {
            table.halves = first != second; // known when compiling
            F a = *first, b = *second;
            if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), 0)) {
                a = canonical(a);
                b = canonical(b);
            }
            if (table.halves || O == DType::kFp16)
                table.words = rounded<O>(a, b);
            else
                table.words = rounded_bf16_twice(a);
        }
    }

    template <DType O, class Raw>
    DZO_LANES void look_up(const Table<O>& table, __m256i codes, Raw* out) {
        if constexpr (O == DType::kFp32) {
            const U first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
            const U second = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
            store(out, _mm512_permutexvar_ps(first, table.values[0]));
            store(out + kWidth, _mm512_permutexvar_ps(second, table.values[1]));
        } else {
            if (table.halves)
                codes = _mm256_or_si256(codes, _mm256_set_epi64x(0x1010101010101010, 0x1010101010101010, 0, 0));
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table.words));
        }
    }

    // Float8 as fp16; of e4m3, divided by 256, which has its range.
    template <PackedKind K>
    DZO_LANES __m512i to_half(__m256i codes) {
        if constexpr (K == PackedKind::kFloat8E5M2)
            return _mm512_slli_epi16(_mm512_cvtepu8_epi16(codes), 8);
        const __m512i exponents = _mm512_set1_epi16(0x3F80);
        const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7); // sign, sign, 4 bits, 3 bits
        const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(wide, exponents), exponents);
        const __m512i half = _mm512_and_si512(wide, _mm512_set1_epi16(static_cast<short>(0xBFFF)));
        return _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7E00));
    }

    template <PackedKind K>
    DZO_LANES void load_numbers(const uint8_t* p, int64_t in_block, F* x) {
        if constexpr (K == PackedKind::kInt16) {
            x[0] = from_i32(_mm512_cvtepi16_epi32(load_256(p + 64 * in_block)));
            x[1] = from_i32(_mm512_cvtepi16_epi32(load_256(p + 64 * in_block + 32)));
        } else if constexpr (is_float8(K)) {
            const __m512i half = to_half<K>(load_256(p + 32 * in_block));
            x[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
            x[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
            if constexpr (K == PackedKind::kFloat8E4M3)
                for (int j = 0; j < kParts; ++j)
                    x[j] = mul(x[j], set(256.0f));
        } else {
            const __m256i codes = load_codes<K>(p, in_block);
            const __m128i halves[] = {_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)};
            for (int j = 0; j < kParts; ++j)
                x[j] = from_i32(K == PackedKind::kInt8 ? _mm512_cvtepi8_epi32(halves[j])
                                                       : _mm512_cvtepu8_epi32(halves[j]));
        }
    }

    template <DType O, class Raw>
    DZO_LANES void store_block(Raw* out, F* x) {
        if (__builtin_expect(_mm512_cmp_ps_mask(x[0], x[1], _CMP_UNORD_Q), 0)) {
            x[0] = canonical(x[0]);
            x[1] = canonical(x[1]);
        }
        if constexpr (O == DType::kFp32) {
            store(out, x[0]);
            store(out + kWidth, x[1]);
        } else {
            _mm512_storeu_si512(out, rounded<O>(x[0], x[1]));
        }
    }
};

} // namespace
} // namespace distzo2
