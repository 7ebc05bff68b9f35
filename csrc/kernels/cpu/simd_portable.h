// Eight float32 lanes in plain C++, for any processor; the compiler turns the loops into what vectors it has. The
// scalar functions of csrc/noise do the rounding. Included by the portable translation unit alone; internal linkage
// throughout.
#pragma once

#include "noise/rademacher.h"
#include "noise/rounding.h"

namespace distzo2 {
namespace {

#define DZO_LANES static inline __attribute__((always_inline))
#define DZO_FOR_LANES(type, expression)                                                                                \
    do {                                                                                                               \
        type out_;                                                                                                     \
        for (int i = 0; i < kWidth; ++i)                                                                               \
            out_.v[i] = (expression);                                                                                  \
        return out_;                                                                                                   \
    } while (false)

struct Lanes {
    static constexpr int kWidth = 8;
    static constexpr bool kHasBlocks = false;
    struct F {
        float v[kWidth];
    };
    struct U {
        uint32_t v[kWidth];
    };
    using SignMask = U; // 1 or 0

    DZO_LANES F set(float x) { DZO_FOR_LANES(F, x); }
    DZO_LANES U set_bits(uint32_t x) { DZO_FOR_LANES(U, x); }
    DZO_LANES F load(const float* p) { DZO_FOR_LANES(F, p[i]); }
    DZO_LANES U load_bits(const uint32_t* p) { DZO_FOR_LANES(U, p[i]); }
    DZO_LANES void store(float* p, F x) { __builtin_memcpy(p, x.v, sizeof x.v); }
    DZO_LANES void store_bits(uint32_t* p, U x) { __builtin_memcpy(p, x.v, sizeof x.v); }
    DZO_LANES F fma(F a, F b, F c) { DZO_FOR_LANES(F, fma_rn(a.v[i], b.v[i], c.v[i])); }
    DZO_LANES F add(F a, F b) { DZO_FOR_LANES(F, a.v[i] + b.v[i]); }
    DZO_LANES F mul(F a, F b) { DZO_FOR_LANES(F, a.v[i] * b.v[i]); }
    DZO_LANES F sub(F a, F b) { DZO_FOR_LANES(F, a.v[i] - b.v[i]); }
    DZO_LANES F sqrt(F a) { DZO_FOR_LANES(F, sqrt_rn(a.v[i])); }
    DZO_LANES U bits(F x) { DZO_FOR_LANES(U, float_bits(x.v[i])); }
    DZO_LANES F from_bits(U x) { DZO_FOR_LANES(F, bits_float(x.v[i])); }
    DZO_LANES U add(U a, U b) { DZO_FOR_LANES(U, a.v[i] + b.v[i]); }
    DZO_LANES U sub(U a, U b) { DZO_FOR_LANES(U, a.v[i] - b.v[i]); }
    DZO_LANES U and_bits(U a, U b) { DZO_FOR_LANES(U, a.v[i] & b.v[i]); }
    DZO_LANES U xor_bits(U a, U b) { DZO_FOR_LANES(U, a.v[i] ^ b.v[i]); }
    DZO_LANES F from_i32(U x) { DZO_FOR_LANES(F, static_cast<float>(static_cast<int32_t>(x.v[i]))); }
    DZO_LANES F unit_interval(U w) { DZO_FOR_LANES(F, fma_rn(static_cast<float>(w.v[i]), 0x1p-32f, 0x1p-33f)); }
    DZO_LANES F canonical(F x) { DZO_FOR_LANES(F, canonical_fp32(x.v[i])); }
    DZO_LANES F signs(uint32_t word, int first) { DZO_FOR_LANES(F, rademacher_from_lsb(word >> (first + i))); }
    DZO_LANES SignMask sign_mask(uint32_t word, int first) { DZO_FOR_LANES(U, word >> (first + i) & 1); }
    DZO_LANES F choose(SignMask sign, F plus, F minus) { DZO_FOR_LANES(F, sign.v[i] ? plus.v[i] : minus.v[i]); }

    DZO_LANES U load_u16(const uint16_t* p) { DZO_FOR_LANES(U, p[i]); }
    DZO_LANES F load_bf16(const uint16_t* p) { DZO_FOR_LANES(F, bf16_to_float(p[i])); }
    DZO_LANES F load_fp16(const uint16_t* p) { DZO_FOR_LANES(F, fp16_to_float(p[i])); }
    DZO_LANES void store_bf16_nearest(uint16_t* p, F x) {
        for (int i = 0; i < kWidth; ++i)
            p[i] = float_to_bf16(x.v[i]);
    }
    DZO_LANES void store_fp16_nearest(uint16_t* p, F x) {
        for (int i = 0; i < kWidth; ++i)
            p[i] = float_to_fp16(x.v[i]);
    }
    DZO_LANES void store_bf16_exact(uint16_t* p, F x) { store_bf16_nearest(p, x); }
    DZO_LANES void store_fp16_exact(uint16_t* p, F x) { store_fp16_nearest(p, x); }
    DZO_LANES F stochastic_bf16(F x, U r) { DZO_FOR_LANES(F, bf16_to_float(float_to_bf16_stochastic(x.v[i], r.v[i]))); }
    DZO_LANES F stochastic_fp16(F x, U r) { DZO_FOR_LANES(F, fp16_to_float(float_to_fp16_stochastic(x.v[i], r.v[i]))); }

    template <class Code>
    DZO_LANES F load_code(const Code* p) {
        DZO_FOR_LANES(F, static_cast<float>(p[i]));
    }
    template <class Code>
    DZO_LANES void store_code(Code* p, F x) {
        for (int i = 0; i < kWidth; ++i)
            p[i] = static_cast<Code>(x.v[i]);
    }
    DZO_LANES F step_code(F q, F change, F divisor, U r, float limit) {
        DZO_FOR_LANES(F, distzo2::step_code(q.v[i], change.v[i], divisor.v[i], r.v[i], limit));
    }
    DZO_LANES F not_below_zero(F x) { DZO_FOR_LANES(F, distzo2::not_below_zero(x.v[i])); }

    // w[j] holds word j of eight groups; out in memory order, group after group.
    DZO_LANES void to_memory_order(U w[4]) {
        uint32_t flat[4 * kWidth];
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < kWidth; ++i)
                flat[4 * i + j] = w[j].v[i];
        for (int j = 0; j < 4; ++j)
            w[j] = load_bits(flat + j * kWidth);
    }

    class Philox {
      public:
        explicit Philox(uint64_t seed) : seed_(seed) {}

        void seek(const Draw& draw, uint64_t group) {
            draw_ = draw;
            group_ = group;
        }

        // The next kWidth groups, lane i holding the i-th.
        DZO_HD void next(U w[4]) {
            for (int i = 0; i < kWidth; ++i) {
                const PhiloxWords words = philox_group(draw_, seed_, group_ + static_cast<uint64_t>(i));
                for (int j = 0; j < 4; ++j)
                    w[j].v[i] = words.w[j];
            }
            group_ += kWidth;
        }

      private:
        uint64_t seed_;
        uint64_t group_ = 0;
        Draw draw_{};
    };
};

#undef DZO_FOR_LANES

} // namespace
} // namespace distzo2
