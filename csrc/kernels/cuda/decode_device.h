// Decoding on a GPU: a block of threads takes a row, a thread its octets in turn. Where fields change at octets and at
// powers of two, as in every known format, an octet's scalars are read once and its codes in words; else weights are
// decoded one by one. Host and device, so that tests without a GPU run it too.
#pragma once

#include "kernels/cuda/octet.h"
#include "kernels/packed.h"

namespace distzo2 {

constexpr uint32_t kOneGroup = 31; // a shift by which every column gives 0

struct DeviceDecode {
    const uint8_t* stored;
    const uint8_t* gains;
    uint8_t* out; // of the matrix
    PackedMatrix matrix;
    float levels[kNumLevels];
    uint32_t quick;                                           // by octets
    uint32_t block, scale, outer, zero, min, outer_min, gain; // powers of two: columns of each
};

// log2 of `cols` that share a value in a block, if the octets of a block do.
inline bool find_shift(int64_t cols, int64_t block, uint32_t& shift) {
    shift = kOneGroup;
    if (cols >= block)
        return true;
    shift = static_cast<uint32_t>(__builtin_ctzll(static_cast<uint64_t>(cols)));
    return shift >= 3 && cols == int64_t{1} << shift;
}

inline DeviceDecode device_decode(const Decode& request, int64_t index) {
    DeviceDecode decode{};
    const PackedMatrix& matrix = decode.matrix = request.matrices[index];
    decode.stored = request.stored;
    decode.gains = request.gains;
    decode.out = request.out + matrix.out_offset;
    for (int i = 0; i < kNumLevels; ++i)
        decode.levels[i] = request.levels[index * kNumLevels + i];
    bool quick = find_shift(matrix.block, matrix.cols, decode.block);
    const auto find = [&](const PackedField& field, uint32_t& shift) {
        quick = (!field.exists() || find_shift(field.cols, matrix.block, shift)) && quick;
    };
    find(matrix.scale, decode.scale);
    find(matrix.outer, decode.outer);
    find(matrix.zero, decode.zero);
    find(matrix.min, decode.min);
    find(matrix.outer_min, decode.outer_min);
    find(matrix.gain, decode.gain);
    decode.quick = quick ? 1 : 0;
    return decode;
}

// Four bytes at any address.
DZO_HD uint32_t load_word(const uint8_t* p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (at % 4 == 0)
        return *reinterpret_cast<const uint32_t*>(p);
    if (at % 2 == 0)
        return *reinterpret_cast<const uint16_t*>(p) | static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(p)[1])
                                                           << 16;
    return read_u32(p);
}

struct EightBytes {
    uint32_t word[2];
    DZO_HD explicit EightBytes(const uint8_t* p) : word{load_word(p), load_word(p + 4)} {}
    DZO_HD uint32_t bits(int k, uint32_t shift, uint32_t mask) const {
        return word[k / 4] >> (8 * (k % 4)) >> shift & mask;
    }
};

// What codes i to i + 7 of a block stand for, i being a multiple of 8: read_code of each.
DZO_HD void read_octet(PackedKind kind, const uint8_t* p, uint32_t i, float q[kOctet]) {
    const uint32_t j = i % 32, chunk = i / 32;
    if (kind == PackedKind::kNibblesLow || kind == PackedKind::kNibblesHigh) {
        const uint32_t word = load_word(p + i / 2), first = kind == PackedKind::kNibblesLow ? 0 : 4;
        DZO_UNROLL
        for (int k = 0; k < kOctet; ++k)
            q[k] = static_cast<float>(word >> (8 * (k / 2)) >> (k % 2 == 0 ? first : 4 - first) & 15u);
    } else if (kind == PackedKind::kNibbles32 || kind == PackedKind::kNibbles64) {
        const bool whole = kind == PackedKind::kNibbles64;
        const EightBytes bytes(p + (whole ? i / 64 * 32 + j : chunk * 16 + j % 16));
        const uint32_t shift = (whole ? chunk % 2 : j / 16) * 4;
        DZO_UNROLL
        for (int k = 0; k < kOctet; ++k)
            q[k] = static_cast<float>(bytes.bits(k, shift, 15));
    } else if (kind == PackedKind::kQ5K) {
        const EightBytes bytes(p + 32 + i / 64 * 32 + j), fifth(p + j);
        DZO_UNROLL
        for (int k = 0; k < kOctet; ++k)
            q[k] = static_cast<float>(bytes.bits(k, chunk % 2 * 4, 15) | fifth.bits(k, chunk, 1) << 4);
    } else if (kind == PackedKind::kQ6K) {
        const uint32_t quarter = chunk % 4, half = i / 128;
        const EightBytes bytes(p + 64 * half + quarter % 2 * 32 + j), high(p + 128 + 32 * half + j);
        DZO_UNROLL
        for (int k = 0; k < kOctet; ++k)
            q[k] = static_cast<float>(bytes.bits(k, quarter / 2 * 4, 15) | high.bits(k, 2 * quarter, 3) << 4);
    } else if (kind == PackedKind::kInt16) {
        DZO_UNROLL
        for (int k = 0; k < kOctet; k += 2) {
            const uint32_t word = load_word(p + 2 * (i + k));
            q[k] = static_cast<float>(static_cast<int32_t>(word << 16) >> 16);
            q[k + 1] = static_cast<float>(static_cast<int32_t>(word) >> 16);
        }
    } else {
        const EightBytes bytes(p + i);
        DZO_UNROLL
        for (int k = 0; k < kOctet; ++k) {
            const uint32_t byte = bytes.bits(k, 0, 255);
            if (kind == PackedKind::kUint8)
                q[k] = static_cast<float>(byte);
            else if (kind == PackedKind::kInt8)
                q[k] = static_cast<float>(static_cast<int32_t>(byte << 24) >> 24);
            else
                q[k] = kind == PackedKind::kFloat8E4M3 ? float8_e4m3_to_float(byte) : float8_e5m2_to_float(byte);
        }
    }
}

// A field of one stored row.
struct RowField {
    const PackedField& field;
    const uint8_t* row;
    DZO_HD RowField(const PackedField& field, const uint8_t* stored, uint32_t at)
        : field(field),
          row(stored + field.offset + int64_t{at / static_cast<uint32_t>(field.rows)} * field.row_stride) {}
    DZO_HD float value(uint32_t block, uint32_t in_block, uint32_t shift) const {
        return read_value(field.type(), row + block * field.block_stride, field.stride, in_block >> shift);
    }
    DZO_HD float float32(uint32_t block, uint32_t in_block, uint32_t shift) const {
        return bits_float(load_word(row + block * field.block_stride + (in_block >> shift) * field.stride));
    }
};

template <DType O>
DZO_HD void decode_row_thread(const DeviceDecode& decode, uint32_t row, uint32_t thread, uint32_t num_threads) {
    using Store = OctetStorage<O>;
    const PackedMatrix& matrix = decode.matrix;
    const auto cols = static_cast<uint32_t>(matrix.cols);
    const auto stored_row = static_cast<uint32_t>(matrix.stored_row(row));
    const RowField codes(matrix.codes, decode.stored, stored_row), scale(matrix.scale, decode.stored, stored_row);
    const RowField outer(matrix.outer, decode.stored, stored_row), zero(matrix.zero, decode.stored, stored_row);
    const RowField min(matrix.min, decode.stored, stored_row), outer_min(matrix.outer_min, decode.stored, stored_row);
    const RowField gain(matrix.gain, decode.gains, stored_row);
    uint8_t* const out = decode.out + int64_t{row} * cols * Store::kBytes;
    for (uint32_t col = thread * kOctet; col < cols; col += num_threads * kOctet) {
        uint8_t* const to = out + int64_t{col} * Store::kBytes;
        const uint32_t num = cols - col < kOctet ? cols - col : kOctet;
        if (decode.quick == 0 || num < kOctet) {
            for (uint32_t k = 0; k < num; ++k) {
                const float x = weight_value(matrix, decode.levels, decode.stored, decode.gains, stored_row, col + k);
                Store::encode_one(to + k * Store::kBytes, Store::nearest_one(x));
            }
            continue;
        }
        const uint32_t block = col >> decode.block, i = decode.block == kOneGroup ? col : col - (block << decode.block);
        float s = scale.value(block, i, decode.scale), z = static_cast<float>(matrix.zero_point), m = -0.0f;
        if (matrix.outer.exists())
            s = scale_of(s, true, outer.value(block, i, decode.outer), matrix.outer_divides != 0);
        if (matrix.zero.exists())
            z = zero.value(block, i, decode.zero);
        if (matrix.min.exists()) {
            m = min.value(block, i, decode.min);
            m = matrix.outer_min.exists() ? mul_rn(outer_min.value(block, i, decode.outer_min), m) : m;
            m = matrix.min_sign < 0 ? -m : m;
        }
        const bool plain = is_float8(matrix.codes.type());
        float x[kOctet];
        read_octet(matrix.codes.type(), codes.row + block * matrix.codes.block_stride, i, x);
        DZO_UNROLL
        for (int k = 0; k < kOctet; ++k)
            x[k] = fma_rn(s, matrix.has_levels != 0 ? level_of(decode.levels, x[k]) : plain ? x[k] : x[k] - z, m);
        if (matrix.gain.exists()) {
            const float g = gain.float32(block, i, decode.gain);
            DZO_UNROLL
            for (int k = 0; k < kOctet; ++k)
                x[k] = mul_rn(g, x[k]);
        }
        if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
            Store::store(to, Store::nearest(x));
        } else {
            DZO_UNROLL
            for (int k = 0; k < kOctet; ++k)
                Store::encode_one(to + k * Store::kBytes, Store::nearest_one(x[k]));
        }
    }
}

} // namespace distzo2
