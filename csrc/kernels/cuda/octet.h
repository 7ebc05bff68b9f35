// What the CUDA kernels' threads work on: an octet, eight elements of a parameter from a multiple of eight on. Its
// noise, its storage in each dtype, and its place in a buffer. Host and device, so that tests without a GPU run it too.
#pragma once

#include "kernels/types.h"
#include "noise/rademacher.h"
#include "noise/rounding.h"

#if defined(__CUDA_ARCH__)
#define DZO_UNROLL _Pragma("unroll")
#define DZO_NO_UNROLL _Pragma("unroll 1")
#else
#define DZO_UNROLL
#define DZO_NO_UNROLL
#endif

namespace distzo2 {

// Two groups of normals, one of rounding bits, 16 or 32 bytes.
constexpr int kOctet = 8;

// The z of elements 8 * octet to 8 * octet + 7.
DZO_HD void normals_octet(const Draw& draw, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) {
    const uint64_t group = static_cast<uint64_t>(octet) * 2;
    const Normals4 low = normal_group(philox_group(draw, keys, group));
    const Normals4 high = normal_group(philox_group(draw, keys, group + 1));
    DZO_UNROLL
    for (int i = 0; i < 4; ++i) {
        z[i] = low.z[i];
        z[4 + i] = high.z[i];
    }
}

DZO_HD void signs_octet(const Draw& draw, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) {
    const uint64_t element = static_cast<uint64_t>(octet) * kOctet;
    const PhiloxWords words = philox_group(draw, keys, element / kSignsPerGroup);
    const uint32_t word = static_cast<uint32_t>(element % kSignsPerGroup) / 32;
    const uint32_t low = word & 1 ? words.w[1] : words.w[0], high = word & 1 ? words.w[3] : words.w[2];
    const uint32_t bits = (word & 2 ? high : low) >> (element % 32);
    DZO_UNROLL
    for (int i = 0; i < kOctet; ++i)
        z[i] = rademacher_from_lsb(bits >> i);
}

template <Purpose kFamily>
DZO_HD void family_octet(const Draw& draw, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) {
    if (kFamily == Purpose::kNormal)
        normals_octet(draw, keys, octet, z);
    else
        signs_octet(draw, keys, octet, z);
}

DZO_HD void noise_octet(const Draw& draw, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) {
    if (draw.tag >> 24 == static_cast<uint32_t>(Purpose::kNormal))
        normals_octet(draw, keys, octet, z);
    else
        signs_octet(draw, keys, octet, z);
}

// One factor of low-rank noise: its elements for a row, or a column, and the words that they are taken from.
struct Factor {
    float x[4]; // as many as the rank
    PhiloxWords words;
    float normals[4];
    uint64_t group = ~uint64_t{0}; // of the words

    DZO_HD void seek(const Draw& draw, const PhiloxKeys& keys, bool is_normal, uint64_t rank, uint64_t index) {
        const uint64_t first = index * rank, wanted = first / (is_normal ? kNormalsPerGroup : kSignsPerGroup);
        const bool is_new = wanted != group;
        if (is_new)
            words = philox_group(draw, keys, wanted);
        group = wanted;
        if (is_normal) {
            if (is_new) {
                const Normals4 four = normal_group(words);
                DZO_UNROLL
                for (int s = 0; s < 4; ++s)
                    normals[s] = four.z[s];
            }
            const float low = first & 1 ? normals[1] : normals[0], high = first & 1 ? normals[3] : normals[2];
            x[0] = first & 2 ? high : low;
            DZO_UNROLL
            for (int s = 1; s < 4; ++s)
                x[s] = normals[s];
        } else {
            const uint32_t low = first & 32 ? words.w[1] : words.w[0], high = first & 32 ? words.w[3] : words.w[2];
            const uint32_t bits = (first & 64 ? high : low) >> (first % 32);
            DZO_UNROLL
            for (int s = 0; s < 4; ++s)
                x[s] = rademacher_from_lsb(bits >> s);
        }
    }
};

// The shape that low-rank noise depends on, and that noise; `draw` has the family in the place of the purpose.
struct DeviceMatrix {
    int64_t rows, cols;

    DZO_HD void octet(Draw draw, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) const {
        const uint64_t rank = static_cast<uint64_t>(rank_of(draw.tag >> 24));
        const bool is_normal = kind_of(draw.tag >> 24) == Purpose::kNormal;
        draw.tag &= 0x00FFFFFFu;
        if (rank == 0 || cols == 0) {
            draw.tag |= static_cast<uint32_t>(is_normal ? Purpose::kNormal : Purpose::kRademacher) << 24;
            return noise_octet(draw, keys, octet, z);
        }
        Draw rows_draw = draw, cols_draw = draw;
        rows_draw.tag |= static_cast<uint32_t>(Purpose::kRows) << 24;
        cols_draw.tag |= static_cast<uint32_t>(Purpose::kCols) << 24;
        const uint64_t element = static_cast<uint64_t>(octet) * kOctet, num_cols = static_cast<uint64_t>(cols);
        uint64_t row = element / num_cols, col = element % num_cols, first_col = 0;
        Factor a, b;
        bool is_new_row = true;
        // One copy of the code of a draw; z moves along, since registers have no index.
        DZO_NO_UNROLL
        for (int i = 0; i < kOctet; ++i) {
            if (col == num_cols) {
                col = 0;
                ++row;
                is_new_row = true;
            }
            if (is_new_row) {
                a.seek(rows_draw, keys, is_normal, rank, row);
                first_col = row / static_cast<uint64_t>(rows) * num_cols;
                is_new_row = false;
            }
            b.seek(cols_draw, keys, is_normal, rank, first_col + col);
            float product = mul_rn(a.x[0], b.x[0]);
            if (rank == 4) {
                DZO_UNROLL
                for (int s = 1; s < 4; ++s)
                    product = fma_rn(a.x[s], b.x[s], product);
                product = mul_rn(product, 0.5f);
            }
            DZO_UNROLL
            for (int k = 1; k < kOctet; ++k)
                z[k - 1] = z[k];
            z[kOctet - 1] = product;
            ++col;
        }
    }
};

// In the place of a DeviceMatrix where all noise is dense.
struct NoMatrix {
    DZO_HD void octet(const Draw& draw, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) const {
        noise_octet(draw, keys, octet, z);
    }
};

struct alignas(16) Sixteen {
    uint32_t word[4];
};

// In one access: copying the struct would be four.
DZO_HD Sixteen load_sixteen(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    return Sixteen{{v.x, v.y, v.z, v.w}};
#else
    return *reinterpret_cast<const Sixteen*>(p);
#endif
}

DZO_HD void store_sixteen(uint8_t* p, const Sixteen& s) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint4*>(p) = make_uint4(s.word[0], s.word[1], s.word[2], s.word[3]);
#else
    *reinterpret_cast<Sixteen*>(p) = s;
#endif
}

// Whether any of the eight values is NaN. Values are compared in pairs: one instruction asks for both.
DZO_HD bool any_nan(const float x[kOctet]) {
#if defined(__CUDA_ARCH__)
    uint32_t found;
    asm("{\n\t.reg .pred p;\n\t"
        "setp.nan.f32 p, %1, %2;\n\t"
        "setp.nan.or.f32 p, %3, %4, p;\n\t"
        "setp.nan.or.f32 p, %5, %6, p;\n\t"
        "setp.nan.or.f32 p, %7, %8, p;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(found)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
    return found != 0;
#else
    bool found = false;
    DZO_UNROLL
    for (int i = 0; i < kOctet; ++i)
        found = found || x[i] != x[i];
    return found;
#endif
}

// Octets as they are stored: decode, encode to nearest, and round an update, which leaves the value and its encoding.
template <DType D>
struct OctetStorage;

template <>
struct OctetStorage<DType::kFp32> {
    static constexpr int kBytes = 4;
    struct Raw {
        Sixteen part[2];
    };
    DZO_HD static Raw load(const uint8_t* p) { return Raw{{load_sixteen(p), load_sixteen(p + 16)}}; }
    DZO_HD static void store(uint8_t* p, const Raw& raw) {
        store_sixteen(p, raw.part[0]);
        store_sixteen(p + 16, raw.part[1]);
    }
    DZO_HD static float decode_one(const uint8_t* p) { return *reinterpret_cast<const float*>(p); }
    DZO_HD static void encode_one(uint8_t* p, float x) { *reinterpret_cast<float*>(p) = x; }
    DZO_HD static float nearest_one(float x) { return canonical_fp32(x); }
    DZO_HD static float update_one(float x, uint32_t) { return canonical_fp32(x); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            w[i] = bits_float(raw.part[i / 4].word[i % 4]);
    }
    DZO_HD static Raw exact(const float w[kOctet]) {
        Raw raw;
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            raw.part[i / 4].word[i % 4] = float_bits(w[i]);
        return raw;
    }
    DZO_HD static Raw nearest(float x[kOctet]) {
        if (any_nan(x)) {
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                x[i] = canonical_fp32(x[i]);
        }
        return exact(x);
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords&) {
        if (any_nan(x)) {
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                x[i] = canonical_fp32(x[i]);
        }
    }
};

template <>
struct OctetStorage<DType::kBf16> {
    static constexpr int kBytes = 2;
    using Raw = Sixteen;
    DZO_HD static Raw load(const uint8_t* p) { return load_sixteen(p); }
    DZO_HD static void store(uint8_t* p, const Raw& raw) { store_sixteen(p, raw); }
    DZO_HD static float decode_one(const uint8_t* p) { return bf16_to_float(*reinterpret_cast<const uint16_t*>(p)); }
    DZO_HD static void encode_one(uint8_t* p, float x) {
        *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(float_bits(x) >> 16);
    }
    DZO_HD static float nearest_one(float x) { return bf16_to_float(float_to_bf16(x)); }
    DZO_HD static float update_one(float x, uint32_t r) { return bf16_to_float(float_to_bf16_stochastic(x, r)); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        DZO_UNROLL
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = bits_float(raw.word[i] << 16);
            w[2 * i + 1] = bits_float(raw.word[i] & 0xFFFF0000u);
        }
    }
    DZO_HD static Raw exact(const float w[kOctet]) {
        Raw raw;
        DZO_UNROLL
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_bits(w[2 * i]) >> 16 | (float_bits(w[2 * i + 1]) & 0xFFFF0000u);
        return raw;
    }
    DZO_HD static Raw nearest(float x[kOctet]) {
        Raw raw;
#if defined(__CUDA_ARCH__)
        if (!any_nan(x)) {
            DZO_UNROLL
            for (int i = 0; i < 4; ++i)
                asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
            return raw;
        }
#endif
        DZO_UNROLL
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_to_bf16(x[2 * i]) | static_cast<uint32_t>(float_to_bf16(x[2 * i + 1])) << 16;
        return raw;
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords& words) {
        if (any_nan(x)) {
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                x[i] = update_one(x[i], rounding_bits(words, static_cast<uint32_t>(i)));
            return;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            x[i] = bits_float((float_bits(x[i]) + rounding_bits(words, static_cast<uint32_t>(i))) & 0xFFFF0000u);
    }
};

template <>
struct OctetStorage<DType::kFp16> {
    static constexpr int kBytes = 2;
    using Raw = Sixteen;
    DZO_HD static Raw load(const uint8_t* p) { return load_sixteen(p); }
    DZO_HD static void store(uint8_t* p, const Raw& raw) { store_sixteen(p, raw); }
    DZO_HD static float half_to_float(uint32_t h) {
#if defined(__CUDA_ARCH__)
        float x;
        asm("{\n\t.reg .b16 h;\n\tcvt.u16.u32 h, %1;\n\tcvt.f32.f16 %0, h;\n\t}" : "=f"(x) : "r"(h));
        return x;
#else
        return fp16_to_float(static_cast<uint16_t>(h));
#endif
    }
    DZO_HD static float decode_one(const uint8_t* p) { return fp16_to_float(*reinterpret_cast<const uint16_t*>(p)); }
    DZO_HD static void encode_one(uint8_t* p, float x) { *reinterpret_cast<uint16_t*>(p) = float_to_fp16(x); }
    DZO_HD static float nearest_one(float x) { return fp16_to_float(float_to_fp16(x)); }
    DZO_HD static float update_one(float x, uint32_t r) { return fp16_to_float(float_to_fp16_stochastic(x, r)); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        DZO_UNROLL
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = half_to_float(raw.word[i] & 0xFFFFu);
            w[2 * i + 1] = half_to_float(raw.word[i] >> 16);
        }
    }
    DZO_HD static Raw exact(float w[kOctet]) { return nearest(w); }
    DZO_HD static Raw nearest(float x[kOctet]) {
        Raw raw;
#if defined(__CUDA_ARCH__)
        if (!any_nan(x)) {
            DZO_UNROLL
            for (int i = 0; i < 4; ++i)
                asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(raw.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
            return raw;
        }
#endif
        DZO_UNROLL
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_to_fp16(x[2 * i]) | static_cast<uint32_t>(float_to_fp16(x[2 * i + 1])) << 16;
        return raw;
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords& words) {
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            x[i] = half_to_float(float_to_fp16_stochastic(x[i], rounding_bits(words, static_cast<uint32_t>(i))));
    }
};

// Float32 that updates keep from falling below 0.
template <>
struct OctetStorage<DType::kNonNegative> : OctetStorage<DType::kFp32> {
    DZO_HD static void update(float x[kOctet], const PhiloxWords& words) {
        OctetStorage<DType::kFp32>::update(x, words);
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            x[i] = not_below_zero(x[i]);
    }
};

// Codes as floats: their values are products with their scales. Never emitted, so that there is no rounding.
template <class Code, int kLargest>
struct OctetCodes {
    static constexpr int kBytes = sizeof(Code), kInWord = 4 / kBytes;
    static constexpr float kLimit = kLargest;
    using Raw = Sixteen; // of which codes of 8 bits take a half
    DZO_HD static Raw load(const uint8_t* p) {
        if constexpr (kBytes == 2)
            return load_sixteen(p);
        const uint64_t half = *reinterpret_cast<const uint64_t*>(p);
        return Raw{{static_cast<uint32_t>(half), static_cast<uint32_t>(half >> 32)}};
    }
    DZO_HD static void store(uint8_t* p, const Raw& raw) {
        if constexpr (kBytes == 2)
            store_sixteen(p, raw);
        else
            *reinterpret_cast<uint64_t*>(p) = raw.word[0] | static_cast<uint64_t>(raw.word[1]) << 32;
    }
    DZO_HD static float decode_one(const uint8_t* p) { return *reinterpret_cast<const Code*>(p); }
    DZO_HD static void encode_one(uint8_t* p, float q) {
        *reinterpret_cast<Code*>(p) = static_cast<Code>(static_cast<int32_t>(q));
    }
    DZO_HD static void decode(const Raw& raw, float q[kOctet]) {
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            q[i] = static_cast<float>(static_cast<Code>(raw.word[i / kInWord] >> 8 * kBytes * (i % kInWord)));
    }
    DZO_HD static Raw exact(const float q[kOctet]) {
        Raw raw{};
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(q[i])) & ((1u << 8 * kBytes) - 1);
            raw.word[i / kInWord] |= bits << 8 * kBytes * (i % kInWord);
        }
        return raw;
    }
};

template <>
struct OctetStorage<DType::kCode8> : OctetCodes<int8_t, 127> {};

template <>
struct OctetStorage<DType::kCode16> : OctetCodes<int16_t, 32767> {};

// What an octet's elements share: the scale of codes, and nothing else.
template <DType D>
struct OctetScale {
    float scale;

    DZO_HD float value(float w) const { return is_code(D) ? mul_rn(w, scale) : w; }
    // Elements w after an update of their values by -lr * a; `rounding` draws the bits.
    DZO_HD void update(float w[kOctet], const float a[kOctet], float lr, const Draw& rounding, const PhiloxKeys& keys,
                       int64_t octet) const {
        PhiloxWords words{};
        if constexpr (is_code(D)) {
            words = philox_group(rounding, keys, static_cast<uint64_t>(octet));
            const float divisor = code_divisor(scale);
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                w[i] = step_code(w[i], mul_rn(-lr, a[i]), divisor, rounding_bits(words, static_cast<uint32_t>(i)),
                                 OctetStorage<D>::kLimit);
        } else {
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                w[i] = fma_rn(-lr, a[i], w[i]);
            if (dtype_bytes(D) != 4)
                words = philox_group(rounding, keys, static_cast<uint64_t>(octet));
            OctetStorage<D>::update(w, words);
        }
    }
};

// Elements first to last - 1 of an octet are the segment's. One that is whole and at a multiple of 16 bytes, which the
// buffers of a visit have in common, is moved in pieces of 16 bytes.
template <DType D>
struct OctetPlace {
    using Store = OctetStorage<D>;
    int64_t at; // of the octet's element 0, in bytes from the start of each buffer; before the segment's start for a
                // partial octet
    int first, last;
    bool whole;

    DZO_HD void load(const uint8_t* buffer, float w[kOctet]) const {
        const uint8_t* p = buffer + at;
        if (whole) {
            Store::decode(Store::load(p), w);
            return;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            w[i] = i >= first && i < last ? Store::decode_one(p + i * Store::kBytes) : 0.0f;
    }
    // Stores rne(x), or x itself where it is known to be a value of the type.
    template <bool kExact>
    DZO_HD void store(uint8_t* buffer, float x[kOctet]) const {
        uint8_t* p = buffer + at;
        if (whole) {
            if constexpr (kExact)
                Store::store(p, Store::exact(x));
            else
                Store::store(p, Store::nearest(x));
            return;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            if (i >= first && i < last) {
                if constexpr (kExact)
                    Store::encode_one(p + i * Store::kBytes, x[i]);
                else
                    Store::encode_one(p + i * Store::kBytes, Store::nearest_one(x[i]));
            }
    }
    DZO_HD OctetScale<D> scale(const uint8_t*, int64_t) const { return {1.0f}; }
    DZO_HD void emit(uint8_t* out, float x[kOctet]) const { store<false>(out, x); }
    DZO_HD void advance(int64_t octets) { at += octets * kOctet * Store::kBytes; }
};

// An octet that is emitted in a dtype of its own, at a place of its own. The dtype is looked at for each octet: three
// loops over octets in the place of nine.
template <DType D>
struct MixedPlace : OctetPlace<D> {
    int64_t out_at; // as `at`, in each out
    DType out_dtype;
    bool out_whole;
    int64_t scales_at; // of codes: the scale of an octet is 4 * (octet >> scale_shift) bytes further; else of w0
    int scale_shift;

    DZO_HD OctetScale<D> scale(const uint8_t* buffer, int64_t octet) const {
        if constexpr (is_code(D))
            return {*reinterpret_cast<const float*>(buffer + scales_at + 4 * (octet >> scale_shift))};
        return {1.0f};
    }
    // The octet's weights at the start.
    DZO_HD void load_start(const uint8_t* buffer, float w[kOctet]) const {
        OctetPlace<D> start = *this;
        start.at += scales_at;
        start.whole = start.whole && scales_at % 16 == 0;
        start.load(buffer, w);
    }
    template <DType O>
    DZO_HD void emit_as(uint8_t* out, float x[kOctet]) const {
        OctetPlace<O>{out_at, this->first, this->last, out_whole}.template store<false>(out, x);
    }
    DZO_HD void emit(uint8_t* out, float x[kOctet]) const {
        if (out_dtype == DType::kFp32)
            emit_as<DType::kFp32>(out, x);
        else if (out_dtype == DType::kBf16)
            emit_as<DType::kBf16>(out, x);
        else
            emit_as<DType::kFp16>(out, x);
    }
    DZO_HD void advance(int64_t octets) {
        OctetPlace<D>::advance(octets);
        out_at += octets * kOctet * dtype_bytes(out_dtype);
    }
};

} // namespace distzo2
