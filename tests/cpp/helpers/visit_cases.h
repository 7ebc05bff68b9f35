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
            groups.push_back({1.0f, 0.0f, 1.0f, spacing});
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

// Where noise is generated: at no lane's and no tile's boundary, over the carry of the normals' counter, and at the
// end.
constexpr int64_t kNoiseNumel = 2345;
constexpr int64_t kNoiseOffsets[] = {0, 1, 126, 1020, (int64_t{1} << 34) - 1000, (int64_t{1} << 38) - kNoiseNumel};

// What generating noise gives: 0 + 1 * z is z.
inline std::vector<uint8_t> expected_noise(const InPlace& request) {
    Visit oracle;
    oracle.seed = request.seed;
    oracle.add_segment(request.dtype, request.numel, request.param, request.offset, 0);
    oracle.fill([](const Segment&, int64_t) { return 0.0f; });
    oracle.add_term(request.family, request.step, request.probe, 1.0f);
    oracle.add_emit(1, {1.0f});
    oracle.run_oracle();
    return oracle.outs[0];
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
            part.scale_offset += each > 0 ? 4 * (begin / each) : 0;
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
        visit.add_update(700, num_terms, {{1e-3f, 0.01f, 1.0f, 1.0f}});
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
            visit.add_update(step, num_terms, {{lr, 0.0f, 1.0f, 1.0f}, {1e-3f, 0.01f, 1.0f, 0.5f}});
        }
        visit.add_term(0, num_updates, 0, 1e-3f);
        visit.add_emit(1, {1.0f, 1.0f});
        check(visit, "many updates");
    }
}

} // namespace distzo2
