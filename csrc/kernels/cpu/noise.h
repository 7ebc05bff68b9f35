// Noise of a tile on the CPU: the draws of normal.h and rounding.h in the lanes of V, in memory order. Included by
// one translation unit for each instruction set; internal linkage throughout.
#pragma once

#include "kernels/types.h"
#include "noise/rounding.h"

namespace distzo2 {
namespace {

// Elements that one pass works on: its buffers stay in the first-level cache. Tiles begin at multiples of this in the
// parameter, so that no tile crosses a carry into the counter's high bits.
constexpr int kTile = 1024;

// body(lo, hi) for the tiles of elements [begin, end) of a parameter.
template <class Body>
void for_tiles(int64_t begin, int64_t end, Body body) {
    for (int64_t lo = begin; lo < end;) {
        const int64_t next = (lo / kTile + 1) * kTile;
        const int64_t hi = next < end ? next : end;
        body(lo, hi);
        lo = hi;
    }
}

// normal.h in three passes over a tile: words, radii, angles. Each pass has several independent chains of operations
// side by side, since a processor's scheduler looks only some 64 operations ahead: faster by a third, on Zen 3, than
// from words to normals in one pass.
template <class V>
struct NormalTile {
    static constexpr int kBlock = 4 * V::kWidth; // elements of one block of Philox words
    static constexpr int kChains = 4;            // of make_radii
    using F = typename V::F;
    using U = typename V::U;

    alignas(64) uint32_t
        radius_words[kTile / 2]; // words 0 and 2 of the groups, a vector of each in turn; then the radii
    alignas(64) uint32_t angle_words[kTile / 2]; // words 1 and 3

    // The words of elements begin .. end - 1 of the tile, from the group that philox has sought. Zeros follow them, up
    // to where make_radii ends.
    DZO_HD void fill_words(typename V::Philox& philox, int begin, int end) {
        for (int i = begin / 2; i < end / 2; i += kBlock / 2) {
            U w[4];
            philox.next(w);
            V::store_bits(radius_words + i, w[0]);
            V::store_bits(angle_words + i, w[1]);
            V::store_bits(radius_words + i + V::kWidth, w[2]);
            V::store_bits(angle_words + i + V::kWidth, w[3]);
        }
        for (int i = end / 2; i % (kChains * V::kWidth) != 0; i += V::kWidth)
            V::store_bits(radius_words + i, V::set_bits(0));
    }

    DZO_HD void make_radii(int count) {
        for (int i = 0; i < count / 2; i += kChains * V::kWidth) {
            U b[kChains], e[kChains];
            F f[kChains], q[kChains];
#define DZO_EACH(statement)                                                                                            \
    for (int j = 0; j < kChains; ++j)                                                                                  \
    statement
            DZO_EACH(b[j] = V::bits(V::unit_interval(V::load_bits(radius_words + i + j * V::kWidth))));
            DZO_EACH(e[j] = V::and_bits(V::sub(b[j], V::set_bits(kSqrtHalfBits)), V::set_bits(0xFF800000u)));
            DZO_EACH(f[j] = V::sub(V::set(1.0f), V::from_bits(V::sub(b[j], e[j]))));
            DZO_EACH(q[j] = V::fma(V::set(kQ6), f[j], V::set(kQ5)));
            DZO_EACH(q[j] = V::fma(q[j], f[j], V::set(kQ4)));
            DZO_EACH(q[j] = V::fma(q[j], f[j], V::set(kQ3)));
            DZO_EACH(q[j] = V::fma(q[j], f[j], V::set(kQ2)));
            DZO_EACH(q[j] = V::fma(q[j], f[j], V::set(kQ1)));
            DZO_EACH(q[j] = V::fma(q[j], f[j], V::set(kQ0)));
            DZO_EACH(q[j] = V::mul(f[j], q[j]));
            DZO_EACH(q[j] = V::sqrt(V::fma(V::from_i32(e[j]), V::set(kLogScale), q[j])));
            DZO_EACH(V::store_bits(radius_words + i + j * V::kWidth, V::bits(q[j])));
#undef DZO_EACH
        }
    }

    // consume(i, z) for the vectors of the tile in memory order.
    template <class Consume>
    DZO_HD void turn(int count, Consume consume) {
        for (int i = 0; i < count / 2; i += kBlock / 2) {
            U w[2], lanes[4];
            F y[2], t[2], s[2], c[2], r[2];
#define DZO_EACH(statement)                                                                                            \
    for (int j = 0; j < 2; ++j)                                                                                        \
    statement
            DZO_EACH(w[j] = V::load_bits(angle_words + i + j * V::kWidth));
            DZO_EACH(y[j] = V::mul(V::from_i32(V::add(w[j], w[j])), V::set(0x1p-31f)));
            DZO_EACH(t[j] = V::mul(y[j], y[j]));
            DZO_EACH(s[j] = V::fma(V::set(kS4), t[j], V::set(kS3)));
            DZO_EACH(c[j] = V::fma(V::set(kC4), t[j], V::set(kC3)));
            DZO_EACH(s[j] = V::fma(s[j], t[j], V::set(kS2)));
            DZO_EACH(c[j] = V::fma(c[j], t[j], V::set(kC2)));
            DZO_EACH(s[j] = V::fma(s[j], t[j], V::set(kS1)));
            DZO_EACH(c[j] = V::fma(c[j], t[j], V::set(kC1)));
            DZO_EACH(s[j] = V::fma(s[j], t[j], V::set(kS0)));
            DZO_EACH(c[j] = V::fma(c[j], t[j], V::set(kC0)));
            DZO_EACH(w[j] = V::and_bits(V::add(w[j], V::set_bits(0x40000000u)), V::set_bits(0x80000000u)));
            DZO_EACH(r[j] = V::from_bits(V::xor_bits(V::load_bits(radius_words + i + j * V::kWidth), w[j])));
            DZO_EACH(s[j] = V::mul(y[j], s[j]));
            DZO_EACH(lanes[2 * j] = V::bits(V::mul(r[j], c[j])));
            DZO_EACH(lanes[2 * j + 1] = V::bits(V::mul(r[j], s[j])));
#undef DZO_EACH
            V::to_memory_order(lanes);
            for (int j = 0; j < 4; ++j)
                consume(2 * i + j * V::kWidth, V::from_bits(lanes[j]));
        }
    }
};

// Calls consume(i, z) for the vectors of elements first + i, i = 0, kWidth, ... below count. first and count are
// multiples of kBlock, and the range lies within one tile.
template <class V, class Consume>
DZO_HD void for_normals(typename V::Philox& philox, const Draw& draw, int64_t first, int count, Consume consume) {
    NormalTile<V> tile;
    philox.seek(draw, static_cast<uint64_t>(first) / kNormalsPerGroup);
    tile.fill_words(philox, 0, count);
    tile.make_radii(count);
    tile.turn(count, consume);
}

// The 16 rounding bits of elements first .. first + count - 1; may write up to a block beyond.
template <class V>
DZO_HD void rounding_tile(typename V::Philox& philox, const Draw& draw, int64_t first, int count, uint16_t* out) {
    constexpr int kBlock = kRoundingsPerGroup * V::kWidth;
    philox.seek(draw, static_cast<uint64_t>(first) / kRoundingsPerGroup);
    for (int i = 0; i < count; i += kBlock) {
        typename V::U w[4];
        philox.next(w);
        V::to_memory_order(w);
        for (int j = 0; j < 4; ++j)
            V::store_bits(reinterpret_cast<uint32_t*>(out + i) + j * V::kWidth, w[j]);
    }
}

} // namespace
} // namespace distzo2
