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

// Codes, as floats: their values are products with their scales.
template <class V, class Code, int kLargest>
struct Codes {
    using Raw = Code;
    static constexpr float kLimit = kLargest;
    DZO_HD static typename V::F load(const Raw* p) { return V::load_code(p); }
    DZO_HD static void store_exact(Raw* p, typename V::F x) { V::store_code(p, x); }
};

template <class V>
struct Storage<V, DType::kCode8> : Codes<V, int8_t, 127> {};

template <class V>
struct Storage<V, DType::kCode16> : Codes<V, int16_t, 32767> {};

// Where its bytes are.
inline const void* canonical_nan(DType dtype) {
    static constexpr uint32_t kFp32 = kNanFp32;
    static constexpr uint16_t kBf16 = kNanBf16, kFp16 = kNanFp16;
    return dtype == DType::kFp32 ? static_cast<const void*>(&kFp32) : dtype == DType::kBf16 ? &kBf16 : &kFp16;
}

constexpr int kSignsPerWord = 32;

// The elements of one word of signs, which share a scale, loaded as D and stored as O.
static_assert(kMinScaleGroup % kSignsPerWord == 0);
template <class V, DType D, DType O>
struct Block {
    using F = typename V::F;
    static constexpr int kParts = kSignsPerWord / V::kWidth;
    // Even elements apart from odd ones.
    static constexpr bool kPairs = (D == DType::kBf16 || is_code(D)) && O == DType::kBf16 && V::kHasBlocks;

    // scale: of codes.
    DZO_HD static void load(const typename Storage<V, D>::Raw* p, float scale, F* w) {
        if constexpr (kPairs)
            for (int j = 0; j < kParts; j += 2)
                V::load_pair(p + j * V::kWidth, w[j], w[j + 1]);
        else
            for (int j = 0; j < kParts; ++j)
                w[j] = Storage<V, D>::load(p + j * V::kWidth);
        if constexpr (is_code(D))
            for (int j = 0; j < kParts; ++j)
                w[j] = V::mul(w[j], V::set(scale));
    }

    DZO_HD static void signs(uint32_t word, typename V::SignMask* sign) {
        if constexpr (kPairs)
            V::sign_mask_pairs(word, sign);
        else
            for (int j = 0; j < kParts; ++j)
                sign[j] = V::sign_mask(word, j * V::kWidth);
    }

    DZO_HD static void store_nearest(typename Storage<V, O>::Raw* p, F* x) {
        if constexpr (V::kHasBlocks) {
            V::make_canonical(x);
            for (int j = 0; j < kParts; j += kPairs ? 2 : 1)
                if constexpr (O == DType::kFp32)
                    V::store(p + j * V::kWidth, x[j]);
                else if constexpr (O == DType::kFp16)
                    V::store_fp16_number(p + j * V::kWidth, x[j]);
                else
                    V::store_bf16_pair(p + j * V::kWidth, x[j], x[j + 1]);
        } else {
            for (int j = 0; j < kParts; ++j)
                Storage<V, O>::store_nearest(p + j * V::kWidth, x[j]);
        }
    }
};

} // namespace
} // namespace distzo2
