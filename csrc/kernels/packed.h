// Packed weights: how a matrix of codes and the scales of its groups lie in a buffer of bytes, and what a weight's
// value is. Plain rows with the layout of the torch op's CPU tensors (distzo2_core/packed.py writes them and says what
// each format means), and the value of one weight, one at a time, for host and device: what the tests and the ends of
// rows use, and what the fast kernels equal bit for bit.
//
//   affine   fma(s, float(q) - z, m)        s = outer * float(scale), float(scale) / outer, or float(scale)
//   levels   fma(s, level[q], m)            m = min_sign * (outer_min * float(min)), or -0.0, which changes no product
//   float8   fma(s, float(q), m)
//
// and gain * that where a matrix has gains, which lie in a buffer of their own: they differ between perturbed copies.
// q - z is an integer below 2^24, so that float(q) - z is exact.
#pragma once

#include "kernels/types.h"
#include "noise/rounding.h"

namespace distzo2 {

enum class PackedKind : int64_t {
    kNibbles32 = 0,
    kNibbles64 = 1,
    kNibblesLow = 2,
    kNibblesHigh = 3,
    kUint8 = 4,
    kInt8 = 5,
    kInt16 = 6,
    kQ5K = 7,
    kQ6K = 8,
    kFloat8E4M3 = 9,
    kFloat8E5M2 = 10,
    kFloat32 = 16,
    kBfloat16 = 17,
    kFloat16 = 18,
    kE8M0 = 19,
    kScaleK = 20,
    kMinK = 21,
};

constexpr int64_t kNoField = -1; // the kind of what a matrix does not have
constexpr int kNumLevels = 16;
constexpr int64_t kKBlock = 256;                           // weights of a block of GGUF's K formats
constexpr int64_t kKScales = 12;                           // bytes of its six-bit scales and minima, eight of each
constexpr int64_t kMaxPackedSide = (int64_t{1} << 31) - 1; // of rows, columns and blocks: devices count them in 32 bits

DZO_HD constexpr bool is_nibbles(PackedKind kind) { return kind <= PackedKind::kNibblesHigh; }
DZO_HD constexpr bool is_float8(PackedKind kind) {
    return kind == PackedKind::kFloat8E4M3 || kind == PackedKind::kFloat8E5M2;
}

// The value of (row, col) is at offset + row / rows * row_stride + col / block * block_stride +
// col % block / cols * stride, in bytes of the buffer.
struct PackedField {
    int64_t kind; // a PackedKind, or kNoField
    int64_t offset;
    int64_t row_stride;
    int64_t block_stride;
    int64_t stride;
    int64_t rows;
    int64_t cols;

    DZO_HD PackedKind type() const { return static_cast<PackedKind>(kind); }
    DZO_HD bool exists() const { return kind != kNoField; }
};

struct PackedMatrix {
    int64_t rows;
    int64_t cols;
    int64_t block;
    int64_t zero_point;
    int64_t min_sign;
    int64_t outer_divides;
    int64_t head_dim; // or 0
    int64_t has_levels;
    int64_t out_offset; // bytes
    int64_t out_dtype;  // a DType
    PackedField codes, scale, outer, zero, min, outer_min;
    PackedField gain; // float32, in the buffer of gains

    // Where the row of the parameter is stored: GGUF interleaves the halves of a head's rows.
    DZO_HD int64_t stored_row(int64_t row) const {
        if (head_dim == 0)
            return row;
        const uint32_t half = static_cast<uint32_t>(head_dim) / 2;
        const uint32_t in_head = static_cast<uint32_t>(row) % static_cast<uint32_t>(head_dim);
        return row - in_head + in_head % half * 2 + in_head / half;
    }
};

// Every matrix is decoded to out + out_offset, row by row.
struct Decode {
    const uint8_t* stored = nullptr;
    int64_t num_bytes = 0;
    uint8_t* out = nullptr;
    int64_t out_bytes = 0;
    const PackedMatrix* matrices = nullptr;
    const float* levels = nullptr; // [num_matrices][kNumLevels]
    int64_t num_matrices = 0;
    const uint8_t* gains = nullptr;
    int64_t gain_bytes = 0;
};

DZO_HD uint32_t read_u16(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }
DZO_HD uint32_t read_u32(const uint8_t* p) { return read_u16(p) | read_u16(p + 2) << 16; }

// Fp16 has a smaller range of exponents by a factor of 256 and room for three more bits of fraction.
DZO_HD float float8_e4m3_to_float(uint32_t b) {
    if ((b & 0x7F) == 0x7F)
        return bits_float(kNanFp32);
    return fp16_to_float(static_cast<uint16_t>((b & 0x80) << 8 | (b & 0x7F) << 7)) * 256.0f;
}
DZO_HD float float8_e5m2_to_float(uint32_t b) { return fp16_to_float(static_cast<uint16_t>(b << 8)); }

// 2^(b - 127), of which the smallest is subnormal.
DZO_HD float e8m0_to_float(uint32_t b) { return bits_float(b == 0 ? 0x00400000u : b == 255 ? kNanFp32 : b << 23); }

// The six-bit scale i, or minimum i, of GGUF's 12 bytes.
DZO_HD uint32_t k_scale(const uint8_t* p, int64_t i) {
    return i < 4 ? p[i] & 63u : (p[i + 4] & 15u) | p[i - 4] >> 6 << 4;
}
DZO_HD uint32_t k_min(const uint8_t* p, int64_t i) { return i < 4 ? p[i + 4] & 63u : p[i + 4] >> 4 | p[i] >> 6 << 4; }

// The value i, `stride` bytes apart, of a field.
DZO_HD float read_value(PackedKind kind, const uint8_t* p, int64_t stride, int64_t i) {
    const uint8_t* at = p + i * stride;
    switch (kind) {
    case PackedKind::kUint8:
        return static_cast<float>(*at);
    case PackedKind::kInt8:
        return static_cast<float>(static_cast<int8_t>(*at));
    case PackedKind::kFloat8E4M3:
        return float8_e4m3_to_float(*at);
    case PackedKind::kFloat8E5M2:
        return float8_e5m2_to_float(*at);
    case PackedKind::kBfloat16:
        return bf16_to_float(static_cast<uint16_t>(read_u16(at)));
    case PackedKind::kFloat16:
        return fp16_to_float(static_cast<uint16_t>(read_u16(at)));
    case PackedKind::kE8M0:
        return e8m0_to_float(*at);
    case PackedKind::kScaleK:
        return static_cast<float>(k_scale(p, i));
    case PackedKind::kMinK:
        return static_cast<float>(k_min(p, i));
    default:
        return bits_float(read_u32(at));
    }
}

// What code i of a block stands for, before a zero is subtracted; the number of a level where there are levels.
DZO_HD float read_code(PackedKind kind, const uint8_t* p, uint32_t i) {
    const uint32_t j = i % 32;
    switch (kind) {
    case PackedKind::kNibbles32:
        return static_cast<float>(p[i / 32 * 16 + j % 16] >> (j / 16 * 4) & 15u);
    case PackedKind::kNibbles64:
        return static_cast<float>(p[i / 64 * 32 + j] >> (i / 32 % 2 * 4) & 15u);
    case PackedKind::kNibblesLow:
        return static_cast<float>(p[i / 2] >> (i % 2 * 4) & 15u);
    case PackedKind::kNibblesHigh:
        return static_cast<float>(p[i / 2] >> (4 - i % 2 * 4) & 15u);
    case PackedKind::kInt16:
        return static_cast<float>(static_cast<int16_t>(read_u16(p + 2 * i)));
    case PackedKind::kQ5K:
        return static_cast<float>((p[32 + i / 64 * 32 + j] >> (i / 32 % 2 * 4) & 15u) | (p[j] >> i / 32 & 1u) << 4);
    case PackedKind::kQ6K: {
        const uint32_t quarter = i / 32 % 4, half = i / 128;
        const uint32_t low = p[64 * half + quarter % 2 * 32 + j] >> (quarter / 2 * 4) & 15u;
        return static_cast<float>(low | (p[128 + 32 * half + j] >> (2 * quarter) & 3u) << 4);
    }
    default: // bytes
        return read_value(kind, p, 1, i);
    }
}

// The bytes of a block's codes.
DZO_HD int64_t code_bytes(PackedKind kind, int64_t block) {
    switch (kind) {
    case PackedKind::kInt16:
        return 2 * block;
    case PackedKind::kQ5K:
        return block / 8 + block / 2;
    case PackedKind::kQ6K:
        return block / 4 + block / 2;
    default:
        return is_nibbles(kind) ? block / 2 : block;
    }
}

// The bytes of a field's value.
DZO_HD int64_t value_bytes(PackedKind kind) {
    switch (kind) {
    case PackedKind::kFloat32:
        return 4;
    case PackedKind::kBfloat16:
    case PackedKind::kFloat16:
        return 2;
    case PackedKind::kScaleK:
    case PackedKind::kMinK:
        return kKScales;
    default:
        return 1;
    }
}

DZO_HD float scale_of(float scale, bool has_outer, float outer, bool divides) {
    return !has_outer ? scale : divides ? scale / outer : mul_rn(outer, scale);
}

DZO_HD float field_value(const PackedMatrix& matrix, const PackedField& field, const uint8_t* stored, int64_t row,
                         int64_t col) {
    const auto block = static_cast<uint32_t>(matrix.block), at = static_cast<uint32_t>(col);
    const int64_t row_of = static_cast<uint32_t>(row) / static_cast<uint32_t>(field.rows);
    const uint8_t* p = stored + field.offset + row_of * field.row_stride + at / block * field.block_stride;
    return read_value(field.type(), p, field.stride, at % block / static_cast<uint32_t>(field.cols));
}

// s, z and m of a weight: of its group.
struct GroupScalarsOf {
    float s, z, m;
};

DZO_HD GroupScalarsOf group_scalars(const PackedMatrix& matrix, const uint8_t* stored, int64_t row, int64_t col) {
    const float outer = matrix.outer.exists() ? field_value(matrix, matrix.outer, stored, row, col) : 1.0f;
    const float scale = field_value(matrix, matrix.scale, stored, row, col);
    GroupScalarsOf group{scale_of(scale, matrix.outer.exists(), outer, matrix.outer_divides != 0),
                         static_cast<float>(matrix.zero_point), -0.0f};
    if (matrix.zero.exists())
        group.z = field_value(matrix, matrix.zero, stored, row, col);
    if (matrix.min.exists()) {
        const float min = field_value(matrix, matrix.min, stored, row, col);
        const bool outer_min = matrix.outer_min.exists();
        group.m =
            scale_of(min, outer_min, outer_min ? field_value(matrix, matrix.outer_min, stored, row, col) : 1.0f, false);
        group.m = matrix.min_sign < 0 ? -group.m : group.m;
    }
    return group;
}

// On a device by selections: an index that differs between threads would be read from memory.
DZO_HD float level_of(const float levels[kNumLevels], float q) {
    const auto code = static_cast<uint32_t>(q);
#if defined(__CUDA_ARCH__)
    float left[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        left[i] = code & 1 ? levels[2 * i + 1] : levels[2 * i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        left[i] = code & 2 ? left[2 * i + 1] : left[2 * i];
    const float low = code & 4 ? left[1] : left[0], high = code & 4 ? left[3] : left[2];
    return code & 8 ? high : low;
#else
    return levels[code];
#endif
}

// The value of one weight of a stored row.
DZO_HD float weight_value(const PackedMatrix& matrix, const float* levels, const uint8_t* stored, const uint8_t* gains,
                          int64_t row, int64_t col) {
    const GroupScalarsOf group = group_scalars(matrix, stored, row, col);
    const auto block = static_cast<uint32_t>(matrix.block), at = static_cast<uint32_t>(col);
    const uint8_t* codes =
        stored + matrix.codes.offset + row * matrix.codes.row_stride + at / block * matrix.codes.block_stride;
    const float q = read_code(matrix.codes.type(), codes, at % block);
    const bool plain = is_float8(matrix.codes.type());
    const float x = fma_rn(group.s, matrix.has_levels != 0 ? level_of(levels, q) : plain ? q : q - group.z, group.m);
    return matrix.gain.exists() ? mul_rn(field_value(matrix, matrix.gain, gains, row, col), x) : x;
}

} // namespace distzo2
