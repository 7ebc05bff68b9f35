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

    // The bits of 32 values in the 16-bit type.
    template <DType O>
    DZO_LANES __m512i rounded(F a, F b) {
        if constexpr (O == DType::kFp16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a, kNearest));
            return _mm512_inserti64x4(low, _mm512_cvtps_ph(b, kNearest), 1);
        } else {
            return _mm512_permutex2var_epi16(nearest(a), high_halves(), nearest(b));
        }
    }
    // In the upper half of each lane.
    DZO_LANES U nearest(F x) {
        const U b = Lanes::bits(x), odd = and_bits(_mm512_srli_epi32(b, 16), set_bits(1));
        return add(add(b, set_bits(0x7FFF)), odd);
    }
    // Of 32 lanes, the first 16 from one vector.
    DZO_LANES __m512i high_halves() {
        return _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
                                19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    }

    template <DType O>
    DZO_LANES void make_table(const F* first, const F* second, Table<O>& table) {
        if constexpr (O == DType::kFp32) {
            table.values[0] = canonical(*first);
            table.values[1] = canonical(*second);
        } else {
            table.halves = first != second;
            const F a = canonical(*first);
            table.words = rounded<O>(a, table.halves ? canonical(*second) : a);
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
            if (table.halves) // known when compiling
                codes = _mm256_or_si256(codes, _mm256_set_epi64x(0x1010101010101010, 0x1010101010101010, 0, 0));
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table.words));
        }
    }

    template <PackedKind K>
    DZO_LANES void load_numbers(const uint8_t* p, int64_t in_block, F* x) {
        if constexpr (K == PackedKind::kInt16) {
            x[0] = from_i32(_mm512_cvtepi16_epi32(load_256(p + 64 * in_block)));
            x[1] = from_i32(_mm512_cvtepi16_epi32(load_256(p + 64 * in_block + 32)));
        } else if constexpr (is_float8(K)) {
            for (int j = 0; j < kParts; ++j) {
                x[j] = _mm512_cvtph_ps(to_half<K>(load_128(p + 32 * in_block + 16 * j)));
                if constexpr (K == PackedKind::kFloat8E4M3)
                    x[j] = mul(x[j], set(256.0f));
            }
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
