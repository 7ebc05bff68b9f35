// Codes of packed weights in AVX2 registers, for AVX2 and AVX-512 alike: 32 of them as bytes, in the order of their
// weights. Internal linkage throughout.
#pragma once

#include <immintrin.h>

#include "kernels/packed.h"

namespace distzo2 {
namespace {

struct X86Codes {
    using Codes = __m256i;

    DZO_LANES __m128i load_128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    DZO_LANES __m256i load_256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

    // `mask` of each byte after a shift to the right by `shift` bits.
    DZO_LANES __m256i bits(__m256i bytes, int64_t shift, char mask) {
        return _mm256_and_si256(_mm256_srli_epi16(bytes, static_cast<int>(shift)), _mm256_set1_epi8(mask));
    }

    // Codes 32 * in_block to 32 * in_block + 31 of a block.
    template <PackedKind K>
    DZO_LANES __m256i load_codes(const uint8_t* p, int64_t in_block) {
        if constexpr (K == PackedKind::kNibbles32) {
            const __m256i both = _mm256_broadcastsi128_si256(load_128(p + 16 * in_block));
            return _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_set_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15));
        } else if constexpr (K == PackedKind::kNibbles64) {
            return bits(load_256(p + in_block / 2 * 32), in_block % 2 * 4, 15);
        } else if constexpr (K == PackedKind::kNibblesLow) {
            const __m256i pair = _mm256_cvtepu8_epi16(load_128(p + 16 * in_block));
            return _mm256_and_si256(_mm256_or_si256(pair, _mm256_slli_epi16(pair, 4)), _mm256_set1_epi8(15));
        } else if constexpr (K == PackedKind::kNibblesHigh) {
            const __m256i pair = _mm256_cvtepu8_epi16(load_128(p + 16 * in_block));
            const __m256i apart = _mm256_or_si256(_mm256_srli_epi16(pair, 4), _mm256_slli_epi16(pair, 8));
            return _mm256_and_si256(apart, _mm256_set1_epi8(15));
        } else if constexpr (K == PackedKind::kQ5K) {
            const __m256i low = bits(load_256(p + 32 + in_block / 2 * 32), in_block % 2 * 4, 15);
            return _mm256_or_si256(low, _mm256_slli_epi16(bits(load_256(p), in_block, 1), 4));
        } else if constexpr (K == PackedKind::kQ6K) {
            const int64_t half = in_block / 4, quarter = in_block % 4;
            const __m256i low = bits(load_256(p + 64 * half + quarter % 2 * 32), quarter / 2 * 4, 15);
            return _mm256_or_si256(low, _mm256_slli_epi16(bits(load_256(p + 128 + 32 * half), 2 * quarter, 3), 4));
        } else {
            return load_256(p + 32 * in_block);
        }
    }
};

} // namespace
} // namespace distzo2
