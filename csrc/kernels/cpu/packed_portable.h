// What decode.h is built from in plain C++: codes are taken one by one. Internal linkage throughout.
#pragma once

#include "kernels/cpu/simd_portable.h"
#include "kernels/packed.h"

namespace distzo2 {
namespace {

struct P : Lanes {
    static constexpr int kParts = 32 / kWidth, kTableParts = 16 / kWidth;

    struct Codes {
        uint8_t v[32];
    };

    template <DType O>
    struct Table {
        float values[2][16];
    };

    // Without its instruction an fma is a call: where there is no minimum, a product has the same bits.
    DZO_LANES F fma(F a, F b, F c) {
        return float_bits(c.v[0]) == 0x80000000u ? Lanes::mul(a, b) : Lanes::fma(a, b, c);
    }

    template <PackedKind K>
    DZO_LANES Codes load_codes(const uint8_t* p, int64_t in_block) {
        Codes codes;
        for (uint32_t i = 0; i < 32; ++i)
            codes.v[i] = static_cast<uint8_t>(read_code(K, p, static_cast<uint32_t>(32 * in_block) + i));
        return codes;
    }

    template <PackedKind K>
    DZO_LANES void load_numbers(const uint8_t* p, int64_t in_block, F* x) {
        for (uint32_t i = 0; i < 32; ++i)
            x[i / kWidth].v[i % kWidth] = read_code(K, p, static_cast<uint32_t>(32 * in_block) + i);
    }

    template <DType O>
    DZO_LANES void make_table(const F* first, const F* second, Table<O>& table) {
        for (int j = 0; j < kTableParts; ++j) {
            store(table.values[0] + j * kWidth, first[j]);
            store(table.values[1] + j * kWidth, second[j]);
        }
    }

    template <DType O, class Raw>
    DZO_LANES void look_up(const Table<O>& table, const Codes& codes, Raw* out) {
        F x[kParts];
        for (int i = 0; i < 32; ++i)
            x[i / kWidth].v[i % kWidth] = table.values[i / 16][codes.v[i]];
        store_block<O>(out, x);
    }

    template <DType O, class Raw>
    DZO_LANES void store_block(Raw* out, const F* x) {
        for (int j = 0; j < kParts; ++j) {
            if constexpr (O == DType::kFp32)
                store(out + j * kWidth, canonical(x[j]));
            else if constexpr (O == DType::kBf16)
                store_bf16_nearest(out + j * kWidth, x[j]);
            else
                store_fp16_nearest(out + j * kWidth, x[j]);
        }
    }
};

} // namespace
} // namespace distzo2
