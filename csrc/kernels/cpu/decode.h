// Decoding packed weights on the CPU, 32 weights at a time. Codes of four bits have 16 values a group: they are made,
// rounded and looked up. Others are computed one by one. Included by one translation unit for each instruction set,
// with P what its packed_*.h offers; internal linkage throughout. Rows that do not suit, of which no known format has
// any, are decoded weight by weight.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/cpu/storage.h"
#include "kernels/packed.h"

namespace distzo2 {
namespace {

constexpr int64_t kCodes = 32;      // decoded together
constexpr int64_t kMaxGroups = 128; // whose scalars are made together

inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// How many weights of a row share all scalars, and how many are decoded between two looks at the fields: all of a tile.
struct GroupShape {
    int64_t group; // a multiple of 32, or 16; 0: not decoded by groups
    int64_t tile;  // weights: whole groups and blocks

    explicit GroupShape(const PackedMatrix& matrix) : group(0), tile(0) {
        const int64_t cols = matrix.cols, block = matrix.block;
        int64_t shared = block < cols ? block : 0;
        const PackedField* const fields[] = {&matrix.scale, &matrix.outer,     &matrix.zero,
                                             &matrix.min,   &matrix.outer_min, &matrix.gain};
        for (const PackedField* field : fields)
            if (field->exists() && field->cols < block)
                shared = gcd(shared, field->cols);
        if (shared == 0) // one group
            shared = (cols + kCodes - 1) / kCodes * kCodes;
        const int64_t unit = shared % kCodes == 0 ? shared : 16;
        if (shared % 16 != 0 || (block < cols && block % kCodes != 0))
            return;
        int64_t groups = kMaxGroups;
        if (block < cols) {
            if (block / unit > kMaxGroups)
                return;
            groups = kMaxGroups / (block / unit) * (block / unit);
        }
        for (const PackedField* field : fields) { // a tile, and a block of many, begin with a new value of each field
            if (!field->exists() || field->cols >= block)
                continue;
            if (groups * unit % field->cols != 0 || (block < cols && block % field->cols != 0))
                return;
        }
        group = unit;
        tile = groups * unit;
    }
};

// s, z, m and the gain of the groups of a tile, and one more, for the second half of 32 codes at the end of a row.
struct TileScalars {
    alignas(64) float s[kMaxGroups + 1] = {}, z[kMaxGroups + 1] = {}, m[kMaxGroups + 1] = {}, gain[kMaxGroups + 1] = {};
};

// The eight scales, or minima, of GGUF's 12 bytes: k_scale and k_min of each.
inline void unpack_k(const uint8_t* p, bool minima, uint8_t values[8]) {
    uint32_t word[3];
    std::memcpy(word, p, sizeof word);
    const uint32_t own = word[minima ? 1 : 0], shared = minima ? word[2] >> 4 : word[2];
    const uint64_t high = (shared & 0x0F0F0F0Fu) | (own >> 6 & 0x03030303u) << 4;
    const uint64_t eight = high << 32 | (own & 0x3F3F3F3Fu);
    std::memcpy(values, &eight, sizeof eight);
}

// Values of a field that are read together: of each of `blocks` from number `block` on, `num` from number `first` on.
struct Run {
    const uint8_t* p;
    int64_t block_stride, blocks, stride, first, num, block = 0;
    const uint8_t* start(int64_t i) const { return p + (block + i) * block_stride; }
};

template <class Word>
void gather(const Run& run, Word* to) {
    for (int64_t block = 0; block < run.blocks; ++block, to += run.num) {
        const uint8_t* const p = run.start(block) + run.first * run.stride;
        int64_t i = 0;
        for (; run.stride == sizeof(Word) && i + 8 <= run.num; i += 8)
            std::memcpy(to + i, p + i * run.stride, 8 * sizeof(Word));
        for (; i < run.num; ++i)
            std::memcpy(to + i, p + i * run.stride, sizeof(Word));
    }
}

template <PackedKind K>
void convert_bytes(const uint8_t* bytes, int64_t num, float* values) {
    for (int64_t i = 0; i < num; i += kCodes) {
        typename P::F x[P::kParts];
        P::load_numbers<K>(bytes + i, 0, x);
        for (int part = 0; part < P::kParts; ++part)
            P::store(values + i + part * P::kWidth, x[part]);
    }
}

// Up to kMaxGroups values; what follows them is overwritten.
inline void read_values(PackedKind kind, const Run& run, float* values) {
    const int64_t num = run.blocks * run.num;
    if (kind == PackedKind::kFloat32)
        return gather(run, values);
    if (kind == PackedKind::kFloat16 || kind == PackedKind::kBfloat16) {
        alignas(64) uint16_t halves[kMaxGroups];
        gather(run, halves);
        for (int64_t i = 0; i < num; i += P::kWidth)
            P::store(values + i, kind == PackedKind::kFloat16 ? P::load_fp16(halves + i) : P::load_bf16(halves + i));
        return;
    }
    alignas(64) uint8_t gathered[kMaxGroups];
    const bool in_place = run.blocks == 1 && run.stride == 1 && num % kCodes == 0;
    const uint8_t* const bytes = in_place ? run.p + run.first : gathered;
    if (kind == PackedKind::kScaleK || kind == PackedKind::kMinK) {
        for (int64_t block = 0; block < run.blocks; ++block) {
            uint8_t six_bits[8];
            unpack_k(run.start(block), kind == PackedKind::kMinK, six_bits);
            gather({six_bits, 0, 1, 1, run.first, run.num}, gathered + block * run.num);
        }
    } else if (!in_place) {
        gather(run, gathered);
    }
    if (kind == PackedKind::kInt8)
        return convert_bytes<PackedKind::kInt8>(bytes, num, values);
    if (kind == PackedKind::kFloat8E4M3)
        return convert_bytes<PackedKind::kFloat8E4M3>(bytes, num, values);
    if (kind == PackedKind::kFloat8E5M2)
        return convert_bytes<PackedKind::kFloat8E5M2>(bytes, num, values);
    if (kind != PackedKind::kE8M0)
        return convert_bytes<PackedKind::kUint8>(bytes, num, values);
    for (int64_t i = 0; i < num; ++i)
        values[i] = e8m0_to_float(bytes[i]);
}

// The values of a field of `num` groups from column `at` of a stored row on.
inline void read_field(const PackedMatrix& matrix, const PackedField& field, const uint8_t* stored, int64_t row,
                       int64_t at, int64_t group, int64_t num, float* values) {
    const auto narrow = [](int64_t x) { return static_cast<uint32_t>(x); }; // division takes half the time
    const uint32_t block = narrow(matrix.block), cols = narrow(std::min(field.cols, matrix.block)), col = narrow(at);
    const uint8_t* p = stored + field.offset + narrow(row) / narrow(field.rows) * field.row_stride;
    const uint32_t repeat = cols <= group ? 1 : cols / narrow(group); // groups that share a value
    const uint32_t num_values = matrix.block == matrix.cols && cols == block ? 1 : (narrow(num) + repeat - 1) / repeat;
    const uint32_t per_block = block / cols;
    Run run{p, 0, 1, field.stride, col / cols, num_values};
    if (block < matrix.cols && cols == block)
        run.stride = field.block_stride;
    else if (block < matrix.cols && (field.stride == 0 || field.block_stride != per_block * field.stride))
        run = {p, field.block_stride, num_values / per_block, field.stride, 0, per_block, col / block};
    read_values(field.type(), run, values);
    if (num_values == 1)
        std::fill_n(values, num, float{values[0]});
    else if (repeat > 1)
        for (int64_t i = num_values; i-- > 0;) // from the end: in place
            std::fill_n(values + i * repeat, repeat, float{values[i]});
}

[[gnu::noinline]] inline void read_scalars(const PackedMatrix& matrix, const Decode& request, int64_t row, int64_t col,
                                           int64_t group, int64_t num, TileScalars& to) {
    const uint8_t* const stored = request.stored;
    alignas(64) float outer[kMaxGroups];
    read_field(matrix, matrix.scale, stored, row, col, group, num, to.s);
    if (matrix.outer.exists()) {
        read_field(matrix, matrix.outer, stored, row, col, group, num, outer);
        for (int64_t i = 0; i < num; ++i)
            to.s[i] = matrix.outer_divides != 0 ? to.s[i] / outer[i] : outer[i] * to.s[i];
    }
    if (matrix.zero.exists())
        read_field(matrix, matrix.zero, stored, row, col, group, num, to.z);
    if (matrix.gain.exists())
        read_field(matrix, matrix.gain, request.gains, row, col, group, num, to.gain);
    if (!matrix.min.exists())
        return;
    read_field(matrix, matrix.min, stored, row, col, group, num, to.m);
    const float sign = matrix.min_sign < 0 ? -1.0f : 1.0f; // exact
    if (matrix.outer_min.exists()) {
        read_field(matrix, matrix.outer_min, stored, row, col, group, num, outer);
        for (int64_t i = 0; i < num; ++i)
            to.m[i] = sign * (outer[i] * to.m[i]);
    } else {
        for (int64_t i = 0; i < num; ++i)
            to.m[i] = sign * to.m[i];
    }
}

// 32 codes at a time of one tile. kHalves: two groups of 16 in each.
template <PackedKind K, DType O, bool kHalves, bool kGains>
class TileDecoder {
  public:
    using F = typename P::F;
    using Raw = typename Storage<P, O>::Raw;

    // levels: less the zero, unless each group has its own.
    TileDecoder(const TileScalars& scalars, const float* levels, bool has_zeros)
        : scalars_(scalars), has_zeros_(has_zeros) {
        if constexpr (is_nibbles(K))
            for (int j = 0; j < P::kTableParts; ++j)
                levels_[j] = P::load(levels + j * P::kWidth);
    }

    // codes: of the block that the tile begins in, at its 32 codes number `in_block`.
    void run(const uint8_t* codes, int64_t in_block, int64_t per_block, int64_t block_stride, int64_t group,
             int64_t num, Raw* out) {
        int64_t i = 0;
        if constexpr (K == PackedKind::kQ5K || K == PackedKind::kQ6K) // by blocks, the shifts of codes being constants
            if (kHalves || (group & (group - 1)) == 0) {
                const int shift = __builtin_ctzll(static_cast<uint64_t>(kHalves ? kCodes : group));
                for (; i < num; i += kKBlock, codes += block_stride) {
#pragma GCC unroll 8
                    for (int64_t c = 0; c < kKBlock / kCodes; ++c) {
                        prepare((i + c * kCodes) >> shift);
                        decode(codes, c, out + i + c * kCodes);
                    }
                }
            }
        for (int64_t g = 0; i < num; ++g) {
            prepare(g);
            const int64_t end = kHalves ? i + kCodes : i + group;
            for (; i < end && i < num; i += kCodes) {
                if (num - i >= kCodes) [[likely]]
                    decode(codes, in_block, out + i);
                else
                    decode_last(codes, in_block, num - i, out + i);
                if (++in_block == per_block) {
                    codes += block_stride;
                    in_block = 0;
                }
            }
        }
    }

  private:
    DZO_HD F value(int half, F x) const {
        x = P::fma(s_[half], x, m_[half]);
        return kGains ? P::mul(gain_[half], x) : x;
    }

    DZO_HD void prepare(int64_t g) {
        const int64_t first = kHalves ? 2 * g : g, second = kHalves ? first + 1 : first;
        s_[0] = P::set(scalars_.s[first]), z_[0] = P::set(scalars_.z[first]), m_[0] = P::set(scalars_.m[first]);
        if constexpr (kHalves)
            s_[1] = P::set(scalars_.s[second]), z_[1] = P::set(scalars_.z[second]), m_[1] = P::set(scalars_.m[second]);
        if constexpr (kGains)
            gain_[0] = P::set(scalars_.gain[first]), gain_[kHalves] = P::set(scalars_.gain[second]);
        if constexpr (is_nibbles(K)) {
            F values[1 + kHalves][P::kTableParts];
            for (int half = 0; half <= kHalves; ++half)
                for (int j = 0; j < P::kTableParts; ++j)
                    values[half][j] = value(half, has_zeros_ ? P::sub(levels_[j], z_[half]) : levels_[j]);
            P::template make_table<O>(values[0], values[kHalves], table_);
        }
    }

    DZO_HD void decode(const uint8_t* codes, int64_t in_block, Raw* out) const {
        if constexpr (is_nibbles(K)) {
            P::template look_up<O>(table_, P::template load_codes<K>(codes, in_block), out);
        } else {
            F x[P::kParts];
            P::template load_numbers<K>(codes, in_block, x);
            for (int j = 0; j < P::kParts; ++j) {
                constexpr int kPartsOfHalf = P::kParts / 2;
                const int half = kHalves ? j / kPartsOfHalf : 0;
                x[j] = value(half, is_float8(K) ? x[j] : P::sub(x[j], z_[half]));
            }
            P::template store_block<O>(out, x);
        }
    }

    // Fewer than 32, by way of a copy: only kinds whose codes lie in the order of their weights end so.
    void decode_last(const uint8_t* codes, int64_t in_block, int64_t num, Raw* out) const {
        if constexpr (K == PackedKind::kNibbles32 || K == PackedKind::kNibbles64 || K == PackedKind::kQ5K ||
                      K == PackedKind::kQ6K)
            return;
        else {
            uint8_t padded[2 * kCodes] = {};
            Raw decoded[kCodes];
            std::memcpy(padded, codes + code_bytes(K, in_block * kCodes), static_cast<size_t>(code_bytes(K, num)));
            decode(padded, 0, decoded);
            std::memcpy(out, decoded, static_cast<size_t>(num) * sizeof(Raw));
        }
    }

    const TileScalars& scalars_;
    const bool has_zeros_;
    F levels_[P::kTableParts];
    F s_[1 + kHalves], z_[1 + kHalves], m_[1 + kHalves], gain_[1 + kHalves];
    typename P::template Table<O> table_;
};

// The weights of a row, one by one.
template <DType O>
void decode_weights(const PackedMatrix& matrix, const float* levels, const Decode& request, int64_t row, uint8_t* out) {
    for (int64_t col = 0; col < matrix.cols; ++col) {
        const float value = weight_value(matrix, levels, request.stored, request.gains, row, col);
        if constexpr (O == DType::kFp32)
            reinterpret_cast<float*>(out)[col] = canonical_fp32(value);
        else
            reinterpret_cast<uint16_t*>(out)[col] = O == DType::kBf16 ? float_to_bf16(value) : float_to_fp16(value);
    }
}

template <PackedKind K, DType O, bool kHalves, bool kGains>
void decode_row(const PackedMatrix& matrix, const GroupShape& shape, const float* levels, const Decode& request,
                int64_t row, TileScalars& scalars, uint8_t* out) {
    using Raw = typename Storage<P, O>::Raw;
    TileDecoder<K, O, kHalves, kGains> decoder(scalars, levels, matrix.zero.exists() && matrix.has_levels == 0);
    const uint8_t* codes = request.stored + matrix.codes.offset + row * matrix.codes.row_stride;
    for (int64_t col = 0; col < matrix.cols; col += shape.tile) {
        const int64_t num = matrix.cols - col < shape.tile ? matrix.cols - col : shape.tile;
        read_scalars(matrix, request, row, col, shape.group, (num + shape.group - 1) / shape.group, scalars);
        decoder.run(codes + col / matrix.block * matrix.codes.block_stride, col % matrix.block / kCodes,
                    (matrix.block + kCodes - 1) / kCodes, matrix.codes.block_stride, shape.group, num,
                    reinterpret_cast<Raw*>(out) + col);
    }
}

using DecodeRow = void (*)(const PackedMatrix&, const GroupShape&, const float*, const Decode&, int64_t, TileScalars&,
                           uint8_t*);

template <DType O, bool kHalves, bool kGains>
DecodeRow row_decoder(PackedKind kind) {
    switch (kind) {
    case PackedKind::kNibbles32:
        return &decode_row<PackedKind::kNibbles32, O, kHalves, kGains>;
    case PackedKind::kNibbles64:
        return &decode_row<PackedKind::kNibbles64, O, kHalves, kGains>;
    case PackedKind::kNibblesLow:
        return &decode_row<PackedKind::kNibblesLow, O, kHalves, kGains>;
    case PackedKind::kNibblesHigh:
        return &decode_row<PackedKind::kNibblesHigh, O, kHalves, kGains>;
    case PackedKind::kUint8:
        return &decode_row<PackedKind::kUint8, O, kHalves, kGains>;
    case PackedKind::kInt8:
        return &decode_row<PackedKind::kInt8, O, kHalves, kGains>;
    case PackedKind::kInt16:
        return &decode_row<PackedKind::kInt16, O, kHalves, kGains>;
    case PackedKind::kQ5K:
        return &decode_row<PackedKind::kQ5K, O, kHalves, kGains>;
    case PackedKind::kQ6K:
        return &decode_row<PackedKind::kQ6K, O, kHalves, kGains>;
    case PackedKind::kFloat8E4M3:
        return &decode_row<PackedKind::kFloat8E4M3, O, kHalves, kGains>;
    default:
        return &decode_row<PackedKind::kFloat8E5M2, O, kHalves, kGains>;
    }
}

template <DType O>
void decode_rows(const Decode& request, int64_t index, int64_t first, int64_t last) {
    const PackedMatrix& matrix = request.matrices[index];
    const GroupShape shape(matrix);
    const bool halves = shape.group == 16;
    constexpr DecodeRow (*kDecoders[])(PackedKind) = {row_decoder<O, false, false>, row_decoder<O, false, true>,
                                                      row_decoder<O, true, false>, row_decoder<O, true, true>};
    const DecodeRow decode = kDecoders[2 * halves + matrix.gain.exists()](matrix.codes.type());
    TileScalars scalars;
    const float zero = matrix.has_levels != 0 || matrix.zero.exists() ? 0.0f : static_cast<float>(matrix.zero_point);
    float levels[kNumLevels]; // what codes of four bits stand for
    for (int i = 0; i < kNumLevels; ++i)
        levels[i] = (matrix.has_levels != 0 ? request.levels[index * kNumLevels + i] : static_cast<float>(i)) - zero;
    for (int64_t i = 0; i <= kMaxGroups; ++i) {
        scalars.z[i] = zero;
        scalars.m[i] = -0.0f;
    }
    for (int64_t row = first; row < last; ++row) {
        uint8_t* out = request.out + matrix.out_offset + row * matrix.cols * dtype_bytes(O);
        if (shape.group == 0)
            decode_weights<O>(matrix, levels, request, matrix.stored_row(row), out);
        else
            decode(matrix, shape, levels, request, matrix.stored_row(row), scalars, out);
    }
}

// A row belongs to the range that its first weight is in, of the weights of all matrices.
inline void run_decode(const Decode& request, int64_t begin, int64_t end) {
    int64_t start = 0; // of the matrix, in that count
    for (int64_t index = 0; index < request.num_matrices && start < end; ++index) {
        const PackedMatrix& matrix = request.matrices[index];
        const int64_t numel = matrix.rows * matrix.cols;
        const int64_t lo = begin > start ? begin - start : 0, hi = end - start < numel ? end - start : numel;
        start += numel;
        if (lo >= hi)
            continue;
        const int64_t first = (lo + matrix.cols - 1) / matrix.cols, last = (hi + matrix.cols - 1) / matrix.cols;
        if (matrix.out_dtype == static_cast<int64_t>(DType::kFp32))
            decode_rows<DType::kFp32>(request, index, first, last);
        else if (matrix.out_dtype == static_cast<int64_t>(DType::kBf16))
            decode_rows<DType::kBf16>(request, index, first, last);
        else
            decode_rows<DType::kFp16>(request, index, first, last);
    }
}

} // namespace
} // namespace distzo2
