// Signs on the CPU: their words, kept from tile to tile, and perturbation by them. Included by one translation unit for
// each instruction set; internal linkage throughout.
#pragma once

#include "kernels/cpu/noise.h"
#include "kernels/cpu/storage.h"
#include "noise/rademacher.h"

namespace distzo2 {
namespace {

// The sign bits of a stretch of one draw, kept from tile to tile: its blocks of Philox words are independent chains
// of operations side by side, and one of them alone would be waited for at every tile. What jumps about in a parameter
// takes one block at a time.
template <class V, int kBlocks = 4>
class SignWords {
  public:
    // The words of elements first, first + 1, ...: 32 of them each, up to the end of the tile of `first`, a multiple
    // of 32.
    DZO_HD const uint32_t* at(typename V::Philox& philox, const Draw& draw, int64_t first) {
        const int64_t start = first / kSpan * kSpan;
        if (start != start_ || draw.param != draw_.param || draw.step != draw_.step || draw.tag != draw_.tag)
            fill(philox, draw, start);
        return words_ + (first - start) / 32;
    }

  private:
    static constexpr int64_t kSpan = int64_t{kBlocks} * V::kWidth * kSignsPerGroup;
    static_assert(kSpan % kTile == 0);

    DZO_HD void fill(typename V::Philox& philox, const Draw& draw, int64_t start) {
        typename V::U w[kBlocks][4];
        philox.seek(draw, static_cast<uint64_t>(start) / kSignsPerGroup);
        for (int block = 0; block < kBlocks; ++block)
            philox.next(w[block]);
        for (int block = 0; block < kBlocks; ++block) {
            V::to_memory_order(w[block]);
            for (int j = 0; j < 4; ++j)
                V::store_bits(words_ + (4 * block + j) * V::kWidth, w[block][j]);
        }
        start_ = start;
        draw_ = draw;
    }

    int64_t start_ = -1;
    Draw draw_{};
    alignas(64) uint32_t words_[kSpan / 32];
};

// Calls consume(i, z) for the vectors of elements i below count, whose sign bits are in `words`.
template <class V, class Consume>
DZO_HD void for_signs(const uint32_t* words, int count, Consume consume) {
    for (int i = 0; i < count; i += 32, ++words)
        for (int bit = 0; bit < 32; bit += V::kWidth)
            consume(i + bit, V::signs(*words, bit));
}

// N copies of `count` elements, a multiple of 128: out[n] = rne(w + k[n]) where the sign is +1, else rne(w - k[n]). It
// is fma(k[n], z, w) to the bit: k[n] * z is exact, each form rounds once, and every NaN is made canonical. scales: of
// codes, one for each word.
template <class V, DType D, DType O, int N>
DZO_HD void perturb_by_signs(const uint32_t* words, int count, const typename Storage<V, D>::Raw* weights,
                             const float* scales, const typename V::F* k, typename Storage<V, O>::Raw* const* out) {
    using F = typename V::F;
    using Elements = Block<V, D, O>;
    constexpr int kAhead = kTile, kLine = 64 / sizeof(*weights); // elements
    F minus[N];
    for (int n = 0; n < N; ++n)
        minus[n] = V::from_bits(V::xor_bits(V::bits(k[n]), V::set_bits(0x80000000u)));
    for (int i = 0; i < count; i += kSignsPerWord) {
        for (int line = 0; line < kSignsPerWord; line += kLine)
            __builtin_prefetch(weights + i + kAhead + line, 1);
        typename V::SignMask sign[Elements::kParts];
        F w[Elements::kParts], x[Elements::kParts];
        Elements::signs(words[i / kSignsPerWord], sign);
        Elements::load(weights + i, is_code(D) ? scales[i / kSignsPerWord] : 1.0f, w);
        for (int n = 0; n < N; ++n) {
            for (int j = 0; j < Elements::kParts; ++j)
                x[j] = V::add(w[j], V::choose(sign[j], k[n], minus[n]));
            Elements::store_nearest(out[n] + i, x);
        }
    }
}

} // namespace
} // namespace distzo2
