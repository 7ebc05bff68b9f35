// Decoding packed weights: every instruction set, and the device's octets run on the host, against one weight at a
// time, bit for bit, over kinds of codes, sizes of groups and splits into ranges; and that nothing beside a matrix is
// written.
#include "testing.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/level.h"
#include "kernels/cuda/decode_device.h"
#include "kernels/kernels.h"

using namespace distzo2;

namespace {

constexpr DType kDTypes[] = {DType::kFp32, DType::kBf16, DType::kFp16};

void store(DType dtype, uint8_t* out, int64_t index, float value) {
    if (dtype == DType::kFp32) {
        const uint32_t bits = float_bits(canonical_fp32(value));
        std::memcpy(out + 4 * index, &bits, 4);
    } else {
        const uint16_t bits = dtype == DType::kBf16 ? float_to_bf16(value) : float_to_fp16(value);
        std::memcpy(out + 2 * index, &bits, 2);
    }
}

// A matrix of this kind of codes over random bytes: float32 scales, and minima, of groups, and a zero a row; gains of
// twice as many weights where `gained`.
struct Case {
    Case(PackedKind kind, int64_t rows, int64_t cols, int64_t group, DType dtype, bool gained = false) {
        const int64_t block = kind == PackedKind::kQ5K || kind == PackedKind::kQ6K ? kKBlock : cols;
        const int64_t in_block = code_bytes(kind, block), groups = (cols + group - 1) / group;
        const int64_t code_row = cols / block * in_block, scales = rows * code_row;
        const PackedField none{kNoField, 0, 0, 0, 0, 1, 1};
        const auto kind_of = [](PackedKind each) { return static_cast<int64_t>(each); };
        const int64_t per_block = (block < cols ? block / group : 0) * 4;
        matrix = {rows, cols, block, 3,    -1,   0,    2,   0, 8, static_cast<int64_t>(dtype),
                  none, none, none,  none, none, none, none};
        matrix.codes = {kind_of(kind), 0, code_row, in_block, 0, 1, 1};
        matrix.scale = {kind_of(PackedKind::kFloat32), scales, groups * 4, per_block, 4, 1, group};
        matrix.min = {kind_of(PackedKind::kFloat16), scales + 1, groups * 4, per_block, 4, 1, group};
        matrix.zero = {kind_of(PackedKind::kInt8), scales, 1, 0, 0, 2, cols};
        const int64_t wide = std::min(2 * group, block), gains_in_block = (block + wide - 1) / wide;
        const int64_t gain_row = cols / block * gains_in_block * 4;
        if (gained)
            matrix.gain = {kind_of(PackedKind::kFloat32), 3, gain_row, gains_in_block * 4, 4, 1, wide};
        std::mt19937 random(static_cast<unsigned>(cols + group));
        gains.resize(gained ? static_cast<size_t>(3 + rows * gain_row) : 0);
        for (uint8_t& byte : gains)
            byte = static_cast<uint8_t>(random());
        stored.resize(static_cast<size_t>(scales + rows * groups * 4));
        for (uint8_t& byte : stored)
            byte = static_cast<uint8_t>(random());
        out.assign(static_cast<size_t>(8 + rows * cols * dtype_bytes(dtype) + 8), 0xA5);
    }

    Decode request() {
        return {stored.data(),
                static_cast<int64_t>(stored.size()),
                out.data(),
                static_cast<int64_t>(out.size()),
                &matrix,
                levels,
                1,
                gains.data(),
                static_cast<int64_t>(gains.size())};
    }

    std::vector<uint8_t> expected() const {
        std::vector<uint8_t> made = out;
        for (int64_t row = 0; row < matrix.rows; ++row)
            for (int64_t col = 0; col < matrix.cols; ++col)
                store(static_cast<DType>(matrix.out_dtype), made.data() + matrix.out_offset, row * matrix.cols + col,
                      weight_value(matrix, levels, stored.data(), gains.data(), matrix.stored_row(row), col));
        return made;
    }

    PackedMatrix matrix;
    float levels[kNumLevels] = {};
    std::vector<uint8_t> stored, gains, out;
};

template <class Body>
void for_each_case(Body body) {
    const int64_t kinds[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    for (int64_t kind : kinds)
        for (DType dtype : kDTypes)
            for (int64_t group : {16, 32, 64, 256, 8, 24, 96})
                for (int64_t cols : {256, 4608, 94}) {
                    const bool whole = kind < 2 || kind == 7 || kind == 8; // codes in blocks
                    if (whole && (cols % 256 != 0 || (cols > 256 && 256 % group != 0)))
                        continue;
                    for (bool gained : {false, true})
                        body(Case(static_cast<PackedKind>(kind), 4, cols, group, dtype, gained), kind, group);
                }
}

} // namespace

TEST(every_instruction_set) {
    const SimdLevel before = simd_level();
    for (SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
        if (!simd_available(level))
            continue;
        set_simd_level(level);
        for_each_case([&](Case given, int64_t kind, int64_t group) {
            const std::vector<uint8_t> expected = given.expected();
            decode_cpu(given.request());
            CHECK(given.out == expected, simd_name(level), " kind ", kind, " group ", group, " cols ",
                  given.matrix.cols);
        });
    }
    set_simd_level(before);
}

TEST(ranges_are_cut_at_rows) {
    Case given(PackedKind::kNibblesLow, 6, 94, 32, DType::kBf16);
    const std::vector<uint8_t> expected = given.expected();
    for (int64_t begin = 0, end = 0; begin < 6 * 94; begin = end) {
        end = std::min<int64_t>(6 * 94, begin + 1 + begin % 71);
        decode_portable(given.request(), begin, end);
    }
    CHECK(given.out == expected);
}

TEST(octets_of_a_device) {
    for_each_case([&](Case given, int64_t kind, int64_t group) {
        const std::vector<uint8_t> expected = given.expected();
        const DeviceDecode decode = device_decode(given.request(), 0);
        CHECK_EQ(decode.quick, (group % 24 == 0 && group < given.matrix.block ? 0u : 1u));
        for (uint32_t row = 0; row < 4; ++row)
            for (uint32_t thread = 0; thread < 32; ++thread) {
                if (given.matrix.out_dtype == 0)
                    decode_row_thread<DType::kFp32>(decode, row, thread, 32);
                else if (given.matrix.out_dtype == 1)
                    decode_row_thread<DType::kBf16>(decode, row, thread, 32);
                else
                    decode_row_thread<DType::kFp16>(decode, row, thread, 32);
            }
        CHECK(given.out == expected, "kind ", kind, " group ", group, " cols ", given.matrix.cols);
    });
}
