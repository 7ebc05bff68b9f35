// Visits that the test of the CPU kernels and that of the AVX-512 kernels over a model share: every 16-bit value with
// the points around it, odd places, splits, many terms, many updates.
#pragma once

#include <cmath>

#include "visit_fixture.h"

namespace distzo2 {

// Every bit pattern of a 16-bit dtype, one segment and one group for each exponent: with a coefficient of `share` and a
// group's scale of the spacing of its values, w + z is that share of the way to the neighbour above or below.
struct EveryValue {
    Visit visit;
    std::vector<float> spacings; // of each group

    explicit EveryValue(DType dtype) {
        const int fraction_bits = dtype == DType::kBf16 ? 7 : 10, num_exponents = dtype == DType::kBf16 ? 256 : 32;
        const int smallest_exponent = dtype == DType::kBf16 ? -126 : -14;
        visit.num_groups = num_exponents;
        for (int exponent = 0; exponent < num_exponents; ++exponent) {
            visit.add_segment(dtype, int64_t{2} << fraction_bits, exponent, 3 * exponent, exponent);
            // Exponent 0 has the spacing of 1; the last one, of infinity and NaN, gets that of the largest values.
            const int power = std::min(std::max(exponent, 1), num_exponents - 2) - 1;
            spacings.push_back(std::ldexp(1.0f, power + smallest_exponent - fraction_bits));
        }
        for (const Segment& segment : visit.segments)
            for (int64_t i = 0; i < segment.numel; ++i) {
                const int64_t fraction = i / 2;
                const uint16_t half = static_cast<uint16_t>((i % 2) << 15 | segment.group << fraction_bits | fraction);
                std::memcpy(visit.weights.data() + segment.byte_offset + 2 * i, &half, 2);
            }
    }

    void add_update(int64_t step, float share) {
        std::vector<UpdateGroup> groups;
        for (float spacing : spacings)
            groups.push_back({1.0f, 0.0f, 0.0f, spacing});
        visit.add_term(1, step, 0, share);
        visit.add_update(step, 1, groups);
    }
    void add_emit(int64_t step, float share) {
        visit.add_term(1, step, 0, share);
        visit.add_emit(1, spacings);
    }
};

// Ties, their two sides and the end of the interval, in the bits that both dtypes leave; then finer ones and the rest.
inline const std::vector<float> kFewShares = {0.5f - 0x1p-13f, 0.5f, 0.5f + 0x1p-13f, 1 - 0x1p-13f};
inline const std::vector<float> kManyShares = {0.5f - 0x1p-13f, 0.5f,  0.5f + 0x1p-13f, 1 - 0x1p-13f, 0.5f - 0x1p-16f,
                                               0x1p-16f,        0.25f, 0.8125f,         1.0f};

// Rounding in all its kinds, by the kernels themselves. check(visit, what).
template <class Check>
void every_16_bit_value(const std::vector<float>& shares, Check check) {
    Random random{12};
    for (DType dtype : {DType::kBf16, DType::kFp16}) {
        for (DType out : kDTypes) {
            EveryValue emitted(dtype);
            emitted.visit.emit_as(out);
            for (float share : shares)
                emitted.add_emit(1, share);
            check(emitted.visit, "nearest, of every value");
        }
        for (float share : shares) {
            EveryValue updated(dtype);
            updated.visit.seed = random.next();
            updated.add_update(1, share);
            check(updated.visit, "stochastic, of every value");
        }
    }
}

// One copy or two by one tensor of signs, on whole tiles, have a loop of their own: every 16-bit value, and float32 of
// all exponents with zeros, infinities and NaN among them; also an infinite coefficient, which makes NaN of infinities.
template <class Check>
void perturbed_by_signs(const std::vector<float>& shares, Check check) {
    constexpr float kHuge = 3e38f; // its square is infinite
    const auto one_and_two = [&](const Visit& visit, const std::vector<float>& scales, float share) {
        for (DType out : kDTypes) {
            Visit copies = visit;
            copies.emit_as(out);
            for (float signed_share : {share, -share}) {
                copies.add_term(1, 1, 0, signed_share);
                copies.add_emit(1, scales);
                check(copies, "perturbed by signs");
            }
        }
    };
    for (DType dtype : {DType::kBf16, DType::kFp16}) {
        const EveryValue values(dtype);
        for (float share : shares)
            one_and_two(values.visit, values.spacings, share);
        one_and_two(values.visit, std::vector<float>(values.spacings.size(), kHuge), kHuge);
    }
    Random random{29};
    Visit floats;
    floats.add_segment(DType::kFp32, 8192, 3, 0, 0);
    floats.fill([&](const Segment&, int64_t i) {
        const uint32_t bits = static_cast<uint32_t>(random.next()), mask = i % 16 ? 0xFFFFFFFFu : 0xFF800000u;
        return bits_float(i % 64 == 0 ? bits & 0x80000000u : i % 16 == 1 ? bits | 0x7F800000u : bits & mask);
    });
    for (float scale : {1e-42f, 1e-20f, 1e-3f, 1.0f, 1e20f, kHuge})
        one_and_two(floats, {1.0f}, scale);
    one_and_two(floats, {kHuge}, kHuge);
}

// Odd lengths at odd offsets, with the carries of the counters of normals (2^34) and of rounding (2^35), and the last
// element that a parameter may have.
template <class Check>
void full_steps(const std::vector<int64_t>& lengths, Check check) {
    const int64_t offsets[] = {
        0, 1, 3, 4, 7, 130, 1021, 4096, (int64_t{1} << 34) - 517, (int64_t{1} << 35) - 517, (int64_t{1} << 38) - 2600};
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1}) {
            Visit visit;
            visit.seed = 0xFEDCBA9876543210;
            int64_t param = -1;
            for (int64_t numel : lengths)
                for (int64_t offset : offsets)
                    visit.add_segment(dtype, numel, ++param, offset, 0, numel % 3);
            visit.fill_random(5);
            visit.add_term(family, 41, 0, 0.75f);
            visit.add_update(41, 1, {kPlain});
            visit.add_term(family, 42, 1, 1e-3f);
            visit.add_emit(1, {1.0f});
            visit.add_term(family, 42, 1, -1e-3f);
            visit.add_emit(1, {1.0f});
            check(visit, "full step");
        }
}

// Special values of every dtype, with rates and coefficients of all sizes.
template <class Check>
void special_values(Check check) {
    const uint32_t specials[] = {0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF,
                                 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x477FE000, 0x477FF000,
                                 0x33800000, 0x387FE000, 0x38800000, 0x2F000000, 0x7F7F8000, 0x477FEFFF};
    constexpr int64_t kNum = sizeof specials / sizeof specials[0];
    for (DType dtype : kDTypes)
        for (float lr : {1e-3f, 1e30f, 1e-42f})
            for (float decay : {0.0f, 0.5f})
                for (const auto& scales : {std::vector{1e-3f, -1e-3f}, std::vector{0.0f, 1e38f, 1e-42f}}) {
                    Visit visit;
                    visit.add_segment(dtype, 25 * kNum, 1, 0, 0);
                    visit.fill([&](const Segment&, int64_t i) { return bits_float(specials[i % kNum]); });
                    visit.add_term(0, 1, 0, 2.0f);
                    visit.add_update(1, 1, {{lr, decay, 0.0f, 1.0f}});
                    for (float scale : scales) {
                        visit.add_term(0, 2, 0, scale);
                        visit.add_emit(1, {1.0f});
                    }
                    check(visit, "special values");
                }
}

// The identity leaves bits that no rounding would leave: NaN payloads and -0.
template <class Check>
void identity_updates(Check check) {
    for (DType dtype : kDTypes) {
        Visit visit;
        visit.num_groups = 2;
        visit.add_segment(dtype, 300, 0, 1, 0);
        visit.add_segment(dtype, 300, 1, 1, 1);
        Random random{8};
        for (uint8_t& byte : visit.weights)
            byte = static_cast<uint8_t>(random.next());
        visit.add_term(0, 1, 0, 3.0f);
        visit.add_update(1, 1, {{0.0f, 0.1f, 0.0f, 1.0f}, {0.5f, 0.0f, 0.0f, 0.0f}}); // lr 0; scale 0 and no decay
        visit.add_term(0, 2, 0, 0.0f);
        visit.add_update(2, 1, {{1.0f, 0.0f, 0.0f, 1.0f}, {1.0f, 0.0f, 0.0f, 1.0f}});
        Visit expected = visit;
        expected.run_oracle();
        CHECK(expected.weights == visit.weights);
        check(visit, "the identity");
    }
}

// Noise at no lane's and no tile's boundary, over the carry of the normals' counter, and at the end. check(request
// without memory, the bytes to come).
template <class Check>
void generated_noise(Check check) {
    constexpr int64_t kNumel = 2345;
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1})
            for (int64_t offset : {int64_t{0}, int64_t{1}, int64_t{126}, int64_t{1020}, (int64_t{1} << 34) - 1000,
                                   (int64_t{1} << 38) - kNumel}) {
                Visit oracle; // 0 + 1 * z is z
                oracle.seed = 23;
                oracle.add_segment(dtype, kNumel, 6, offset, 0);
                oracle.fill([](const Segment&, int64_t) { return 0.0f; });
                oracle.add_term(family, 9, 4, 1.0f);
                oracle.add_emit(1, {1.0f});
                oracle.run_oracle();
                check(InPlace{nullptr, dtype, kNumel, 23, family, 9, 6, 4, offset}, oracle.outs[0]);
            }
}

// perturb(place, scale) and update(place, lr, coef, weight_decay) against the visits that they are.
template <class Perturb, class Step>
void in_place_ops(Perturb perturb, Step update) {
    constexpr int64_t kNumel = 2222;
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1}) {
            Visit visit;
            visit.seed = 17;
            visit.add_segment(dtype, kNumel, 4, 999, 0);
            visit.fill_random(11);
            std::vector<uint8_t> perturbed = visit.weights, updated = visit.weights;
            perturb(InPlace{perturbed.data(), dtype, kNumel, 17, family, 8, 4, 2, 999}, 1e-3f);
            update(InPlace{updated.data(), dtype, kNumel, 17, family, 8, 4, 2, 999}, 1e-2f, 3.0f, 0.1f);
            visit.add_term(family, 8, 2, 1e-3f);
            visit.add_emit(1, {1.0f});
            visit.run_oracle();
            CHECK(perturbed == visit.outs[0]);
            visit.add_term(family, 8, 2, 3.0f);
            visit.add_update(8, 1, {{1e-2f, 0.1f, 0.0f, 1.0f}});
            visit.run_oracle();
            CHECK(updated == visit.weights);
        }
}

// Rows of tables of these widths against those of the table perturbed as a whole. look_up(request) fills request.out.
template <class LookUp>
void lookups(const std::vector<int64_t>& widths, LookUp look_up) {
    constexpr int64_t kRows = 9;
    std::vector<int64_t> ids = {4, 0, 8, 8, 3, 4};
    for (int64_t i = 0; i < 40; ++i) // more than one batch of parts of rows
        ids.push_back(i * i % kRows);
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1})
            for (int64_t cols : widths)
                for (int64_t offset : {int64_t{0}, int64_t{3}, (int64_t{1} << 34) - 200})
                    for (const auto& [scale, out_dtype] : {std::pair{0.0f, dtype},
                                                           {-1e-3f, dtype},
                                                           {-1e-3f, DType::kFp32},
                                                           {-1e-3f, DType::kBf16},
                                                           {0.0f, DType::kFp16}}) {
                        const auto row_bytes = cols * dtype_bytes(out_dtype);
                        Visit whole;
                        whole.seed = 77;
                        whole.add_segment(dtype, kRows * cols, 5, offset, 0);
                        whole.fill_random(3);
                        whole.emit_as(out_dtype);
                        whole.add_term(family, 6, 2, scale);
                        whole.add_emit(1, {1.0f});
                        whole.run();
                        std::vector<uint8_t> expected;
                        for (int64_t id : ids) {
                            const auto row = whole.outs[0].begin() + id * row_bytes;
                            expected.insert(expected.end(), row, row + row_bytes);
                        }
                        std::vector<uint8_t> got(expected.size());
                        const auto num_ids = static_cast<int64_t>(ids.size());
                        look_up(Lookup{whole.weights.data(), got.data(), ids.data(), num_ids, kRows, cols, dtype, scale,
                                       77, family, 6, 5, 2, offset, out_dtype});
                        CHECK(got == expected, "cols ", cols, " offset ", offset);
                    }
}

// The same visit with its segments cut into pieces, at tiles' boundaries and elsewhere.
inline Visit cut(const Visit& whole, Random& random) {
    Visit parts = whole;
    parts.segments.clear();
    for (const Segment& segment : whole.segments)
        for (int64_t begin = 0; begin < segment.numel;) {
            const int64_t left = segment.numel - begin, to_tile = 1024 - (segment.element_offset + begin) % 1024;
            int64_t wanted = random.below(3) == 0 ? to_tile : 1 + random.below(random.below(2) == 0 ? 9 : 700);
            Segment part = segment;
            const int64_t each = segment.scale_group;
            if (each > 0)
                wanted = (wanted + each - 1) / each * each;
            const int64_t of_start = part.scale_offset > 0 ? begin * dtype_bytes(static_cast<DType>(part.dtype)) : 0;
            part.scale_offset += each > 0 ? 4 * (begin / each) : of_start;
            part.byte_offset += begin * dtype_bytes(static_cast<DType>(segment.dtype));
            part.out_offset += begin * dtype_bytes(static_cast<DType>(segment.out_dtype));
            part.element_offset += begin;
            part.numel = std::min(left, wanted);
            parts.segments.push_back(part);
            begin += part.numel;
        }
    return parts;
}

// An update and an emit of num_terms terms each, some of them left out.
template <class Check>
void many_terms(int64_t num_terms, Check check) {
    for (DType dtype : kDTypes) {
        Visit visit;
        visit.add_segment(dtype, 77, 3, 5, 0);
        visit.fill_random(1);
        Random random{2};
        for (int64_t j = 0; j < num_terms; ++j)
            visit.add_term(j % 2, j / 4, j % 4, j % 11 == 0 ? 0.0f : random.uniform(-0.1f, 0.1f));
        visit.add_update(700, num_terms, {{1e-3f, 0.01f, 0.0f, 1.0f}});
        for (int64_t j = 0; j < num_terms; ++j)
            visit.add_term(j % 2, 2000 + j / 4, j % 4, j % 13 == 0 ? 0.0f : random.uniform(-1e-4f, 1e-4f));
        visit.add_emit(num_terms, {1.0f});
        check(visit, "many terms");
    }
}

// A block that was last visited long ago.
template <class Check>
void many_updates(int64_t num_updates, Check check) {
    for (DType dtype : kDTypes) {
        Visit visit;
        visit.num_groups = 2;
        visit.add_segment(dtype, 200, 3, 5, 0);
        visit.add_segment(dtype, 30, 4, 1020, 1);
        visit.fill_random(1);
        Random random{3};
        for (int64_t step = 0; step < num_updates; ++step) {
            const int64_t num_terms = step % 4;
            for (int64_t j = 0; j < num_terms; ++j)
                visit.add_term(j % 2, step, j, random.uniform(-1, 1));
            const float lr = step % 5 == 0 ? 0.0f : 1e-3f; // the identity for group 0 of some steps
            visit.add_update(step, num_terms, {{lr, 0.0f, 0.0f, 1.0f}, {1e-3f, 0.01f, 0.0f, 0.5f}});
        }
        visit.add_term(0, num_updates, 0, 1e-3f);
        visit.add_emit(1, {1.0f, 1.0f});
        check(visit, "many updates");
    }
}

} // namespace distzo2
