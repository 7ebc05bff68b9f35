// What decode.h is built from with AVX2. Internal linkage throughout.
#pragma once

#include <type_traits>

#include "kernels/cpu/simd_avx2.h"

#include "kernels/cpu/packed_x86.h"

namespace distzo2 {
namespace {

struct P : Lanes, X86Codes {
    static constexpr int kParts = 4, kTableParts = 2;
    using Lanes::bits;

    // Rounded values, low and high bytes apart: those of the first 16 codes in the lower half, of the others in the
    // upper one.
    struct BytesTable {
        __m256i low, high;
    };
    struct FloatTable {
        F values[2][2];
    };
    template <DType O>
    using Table = std::conditional_t<O == DType::kFp32, FloatTable, BytesTable>;

    // The bits of sixteen values in the 16-bit type.
    template <DType O>
    DZO_LANES __m256i rounded(F a, F b) {
        if constexpr (O == DType::kFp16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            return _mm256_set_m128i(_mm256_cvtps_ph(b, kNearest), _mm256_cvtps_ph(a, kNearest));
        } else {
            const U even = _mm256_packus_epi32(nearest(a), nearest(b));
            return _mm256_permute4x64_epi64(even, 0xD8);
        }
    }
    DZO_LANES U nearest(F x) {
        const U b = Lanes::bits(x), odd = and_bits(_mm256_srli_epi32(b, 16), set_bits(1));
        return _mm256_srli_epi32(add(add(b, set_bits(0x7FFF)), odd), 16);
    }

    template <DType O>
    DZO_LANES __m256i bytes_apart(const F* x) {
        const __m256i words = rounded<O>(canonical(x[0]), canonical(x[1]));
        const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xFF)), high = _mm256_srli_epi16(words, 8);
        return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
    }

    template <DType O>
    DZO_LANES void make_table(const F* first, const F* second, Table<O>& table) {
        if constexpr (O == DType::kFp32) {
            for (int j = 0; j < kTableParts; ++j) {
                table.values[0][j] = canonical(first[j]);
                table.values[1][j] = canonical(second[j]);
            }
        } else {
            const __m256i a = bytes_apart<O>(first), b = first == second ? a : bytes_apart<O>(second);
            table.low = _mm256_permute2x128_si256(a, b, 0x20);
            table.high = _mm256_permute2x128_si256(a, b, 0x31);
        }
    }

    template <DType O, class Raw>
    DZO_LANES void look_up(const Table<O>& table, __m256i codes, Raw* out) {
        if constexpr (O == DType::kFp32) {
            U eights[kParts];
            widen<false>(codes, eights);
            for (int j = 0; j < kParts; ++j) {
                const F* values = table.values[j / 2];
                const F low = _mm256_permutevar8x32_ps(values[0], eights[j]);
                const F high = _mm256_permutevar8x32_ps(values[1], eights[j]);
                store(out + j * kWidth, _mm256_blendv_ps(low, high, from_bits(_mm256_slli_epi32(eights[j], 28))));
            }
        } else {
            const __m256i low = _mm256_shuffle_epi8(table.low, codes), high = _mm256_shuffle_epi8(table.high, codes);
            const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
            store_words(out, _mm256_permute2x128_si256(a, b, 0x20));
            store_words(out + 16, _mm256_permute2x128_si256(a, b, 0x31));
        }
    }

    // Bytes as integers of 32 bits.
    template <bool kSigned>
    DZO_LANES void widen(__m256i codes, U* x) {
        const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
        const __m128i eights[] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
        for (int j = 0; j < kParts; ++j)
            x[j] = kSigned ? _mm256_cvtepi8_epi32(eights[j]) : _mm256_cvtepu8_epi32(eights[j]);
    }
    DZO_LANES void store_words(uint16_t* out, __m256i words) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
    }

    // Sixteen float8 as fp16, those of e4m3 divided by 256, which has its range.
    template <PackedKind K>
    DZO_LANES __m256i to_half(__m128i codes) {
        if constexpr (K == PackedKind::kFloat8E5M2)
            return _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8);
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7); // sign, sign, 4 bits, 3 bits
        const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x3F80));
        const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3F80));
        const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xBFFF)));
        return _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7E00)));
    }

    template <PackedKind K>
    DZO_LANES void load_numbers(const uint8_t* p, int64_t in_block, F* x) {
        if constexpr (K == PackedKind::kInt16) {
            for (int j = 0; j < kParts; ++j)
                x[j] = from_i32(_mm256_cvtepi16_epi32(load_128(p + 64 * in_block + 16 * j)));
        } else if constexpr (is_float8(K)) {
            for (int j = 0; j < kParts; j += 2) {
                const __m256i half = to_half<K>(load_128(p + 32 * in_block + 8 * j));
                x[j] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
                x[j + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
            }
            if constexpr (K == PackedKind::kFloat8E4M3)
                for (int j = 0; j < kParts; ++j)
                    x[j] = mul(x[j], set(256.0f));
        } else {
            U numbers[kParts];
            widen<K == PackedKind::kInt8>(load_codes<K>(p, in_block), numbers);
            for (int j = 0; j < kParts; ++j)
                x[j] = from_i32(numbers[j]);
        }
    }

    template <DType O, class Raw>
    DZO_LANES void store_block(Raw* out, F* x) {
        make_canonical(x);
        for (int j = 0; j < kParts; j += 2) {
            if constexpr (O == DType::kFp32) {
                store(out + j * kWidth, x[j]);
                store(out + (j + 1) * kWidth, x[j + 1]);
            } else {
                store_words(out + j * kWidth, rounded<O>(x[j], x[j + 1]));
            }
        }
    }
};

} // namespace
} // namespace distzo2
