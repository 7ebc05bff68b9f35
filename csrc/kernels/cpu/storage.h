// The stored types on the CPU: a vector at a time in memory order, and 32 elements at a time in whatever order the
// lanes of V find cheapest, which the signs of the block follow. Included by one translation unit for each instruction
// set; internal linkage throughout.
#pragma once

#include <type_traits>

#include "kernels/types.h"
#include "noise/rounding.h"

namespace distzo2 {
namespace {

template <class V, DType D>
struct Storage;

template <class V>
struct Storage<V, DType::kFp32> {
    using Raw = float;
    DZO_HD static typename V::F load(const Raw* p) { return V::load(p); }
    DZO_HD static void store_exact(Raw* p, typename V::F x) { V::store(p, x); }
    DZO_HD static void store_nearest(Raw* p, typename V::F x) { V::store(p, V::canonical(x)); }
    DZO_HD static typename V::F round_update(typename V::F x, const uint16_t*) { return V::canonical(x); }
};

template <class V>
struct Storage<V, DType::kBf16> {
    using Raw = uint16_t;
    DZO_HD static typename V::F load(const Raw* p) { return V::load_bf16(p); }
    DZO_HD static void store_exact(Raw* p, typename V::F x) { V::store_bf16_exact(p, x); }
    DZO_HD static void store_nearest(Raw* p, typename V::F x) { V::store_bf16_nearest(p, x); }
    DZO_HD static typename V::F round_update(typename V::F x, const uint16_t* r) {
        return V::stochastic_bf16(x, V::load_u16(r));
    }
};

template <class V>
struct Storage<V, DType::kFp16> {
    using Raw = uint16_t;
    DZO_HD static typename V::F load(const Raw* p) { return V::load_fp16(p); }
    DZO_HD static void store_exact(Raw* p, typename V::F x) { V::store_fp16_exact(p, x); }
    DZO_HD static void store_nearest(Raw* p, typename V::F x) { V::store_fp16_nearest(p, x); }
    DZO_HD static typename V::F round_update(typename V::F x, const uint16_t* r) {
        return V::stochastic_fp16(x, V::load_u16(r));
    }
};

template <DType D>
DZO_HD typename std::conditional<D == DType::kFp32, float, uint16_t>::type canonical_nan() {
    if constexpr (D == DType::kFp32)
        return bits_float(kNanFp32);
    else
        return D == DType::kBf16 ? kNanBf16 : kNanFp16;
}

constexpr int kSignsPerWord = 32;

// The elements of one word of signs.
template <class V, DType D>
struct Block {
    using F = typename V::F;
    using Store = Storage<V, D>;
    using Raw = typename Store::Raw;
    static constexpr int kParts = kSignsPerWord / V::kWidth;
    static constexpr bool kPairs = D == DType::kBf16 && V::kHasBlocks; // even elements apart from odd ones

    DZO_HD static void load(const Raw* p, F* w) {
        if constexpr (kPairs)
            for (int j = 0; j < kParts; j += 2)
                V::load_bf16_pair(p + j * V::kWidth, w[j], w[j + 1]);
        else
            for (int j = 0; j < kParts; ++j)
                w[j] = Store::load(p + j * V::kWidth);
    }

    DZO_HD static void signs(uint32_t word, typename V::SignMask* sign) {
        if constexpr (kPairs)
            V::sign_mask_pairs(word, sign);
        else
            for (int j = 0; j < kParts; ++j)
                sign[j] = V::sign_mask(word, j * V::kWidth);
    }

    DZO_HD static void store_nearest(Raw* p, F* x) {
        if constexpr (V::kHasBlocks) {
            V::make_canonical(x);
            for (int j = 0; j < kParts; j += kPairs ? 2 : 1)
                if constexpr (D == DType::kFp32)
                    V::store(p + j * V::kWidth, x[j]);
                else if constexpr (D == DType::kFp16)
                    V::store_fp16_number(p + j * V::kWidth, x[j]);
                else
                    V::store_bf16_pair(p + j * V::kWidth, x[j], x[j + 1]);
        } else {
            for (int j = 0; j < kParts; ++j)
                Store::store_nearest(p + j * V::kWidth, x[j]);
        }
    }
};

} // namespace
} // namespace distzo2
