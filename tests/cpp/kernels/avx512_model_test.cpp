// The AVX-512 kernels, compiled over a model of their instructions, against the oracle: every op, for machines without
// AVX-512, which are most.
#include "testing.h"

#include "avx512_model.h"
#include "visit_cases.h"

#define DISTZO2_AVX512_MODEL
#include "kernels/cpu/simd_avx512.h"

#include "kernels/cpu/make_level.h"
#include "kernels/visits.h"

using namespace distzo2;

namespace {

const CpuLevel kModel = make_level<Lanes>();

int64_t num_elements(const Visit& visit) {
    int64_t numel = 0;
    for (const Segment& segment : visit.segments)
        numel += segment.numel;
    return numel;
}

// In two ranges, as threads would share it.
void run(Visit& visit, int64_t middle) {
    std::vector<uint8_t*> pointers;
    const Materialize view = visit.view(pointers);
    check(view);
    kModel.materialize(view, middle, num_elements(visit));
    kModel.materialize(view, 0, middle);
}

void check_visit(const Visit& visit, const char* what) {
    Visit expected = visit, actual = visit;
    expected.run_oracle();
    run(actual, num_elements(visit) / 3);
    CHECK(actual.weights == expected.weights, what, ": weights differ at byte ",
          first_difference(actual.weights, expected.weights));
    for (size_t e = 0; e < visit.outs.size(); ++e)
        CHECK(actual.outs[e] == expected.outs[e], what, ": out ", e, " differs at byte ",
              first_difference(actual.outs[e], expected.outs[e]));
}

} // namespace

TEST(random_programs) {
    Random random{41};
    for (int round = 0; round < 40; ++round)
        check_visit(random_visit(random), "random program");
}

TEST(full_step_odd_lengths_and_offsets) { full_steps({0, 1, 17, 129, 2600}, check_visit); }

TEST(rounding_of_every_16_bit_value) { every_16_bit_value(kFewShares, check_visit); }

TEST(perturbed_by_signs_of_every_value) { perturbed_by_signs(kFewShares, check_visit); }

TEST(updates_and_emits_of_many_terms) { many_terms(150, check_visit); }

TEST(many_missed_updates) { many_updates(50, check_visit); }

TEST(any_split_gives_the_same_bits) {
    Random random{42};
    for (int round = 0; round < 30; ++round) {
        Visit whole = random_visit(random), parts = cut(whole, random);
        run(whole, 0);
        run(parts, random.below(num_elements(parts) + 1));
        CHECK(parts.weights == whole.weights && parts.outs == whole.outs, "round ", round);
    }
}

TEST(special_values) {
    const uint32_t specials[] = {0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x7F7FFFFF, 0xFF7FFFFF,
                                 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x477FE000, 0x477FF000, 0x33800000};
    constexpr int64_t kNum = sizeof specials / sizeof specials[0];
    for (DType dtype : kDTypes)
        for (float decay : {0.0f, 0.5f}) {
            Visit visit;
            visit.add_segment(dtype, 30 * kNum, 1, 0, 0);
            visit.fill([&](const Segment&, int64_t i) { return bits_float(specials[i % kNum]); });
            visit.add_term(0, 1, 0, 2.0f);
            visit.add_update(1, 1, {{1e-3f, decay, 1.0f, 1.0f}});
            visit.add_term(0, 2, 0, 1e-3f);
            visit.add_emit(1, {1.0f});
            check_visit(visit, "special values");
        }
}

TEST(identity_updates_touch_nothing) {
    for (DType dtype : kDTypes) {
        Visit visit;
        visit.add_segment(dtype, 300, 0, 1, 0);
        Random random{8};
        for (uint8_t& byte : visit.weights)
            byte = static_cast<uint8_t>(random.next());
        visit.add_term(0, 1, 0, 3.0f);
        visit.add_update(1, 1, {{0.0f, 0.1f, 1.0f, 1.0f}});
        visit.add_update(2, 1, {{1.0f, 0.0f, 1.0f, 0.0f}});
        const std::vector<uint8_t> before = visit.weights;
        run(visit, 100);
        CHECK(visit.weights == before);
    }
}

TEST(generated_noise) {
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1})
            for (int64_t offset : kNoiseOffsets) {
                InPlace request{nullptr, dtype, kNoiseNumel, 23, family, 9, 6, 4, offset};
                const std::vector<uint8_t> expected = expected_noise(request);
                std::vector<uint8_t> out(expected.size());
                request.data = out.data();
                kModel.generate(request, 777, kNoiseNumel);
                kModel.generate(request, 0, 777);
                CHECK(out == expected, "offset ", offset);
            }
}

TEST(in_place_ops) {
    constexpr int64_t kNumel = 2222;
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1}) {
            Visit visit;
            visit.seed = 17;
            visit.add_segment(dtype, kNumel, 4, 999, 0);
            visit.fill_random(11);
            std::vector<uint8_t> perturbed = visit.weights, updated = visit.weights;
            InPlace place{perturbed.data(), dtype, kNumel, 17, family, 8, 4, 2, 999};
            kModel.materialize(PerturbVisit(place, 1e-3f).visit, 0, kNumel);
            place.data = updated.data();
            kModel.materialize(UpdateVisit(place, 1e-2f, 3.0f, 0.1f).visit, 0, kNumel);
            visit.add_term(family, 8, 2, 1e-3f);
            visit.add_emit(1, {1.0f});
            visit.run_oracle();
            CHECK(perturbed == visit.outs[0]);
            visit.add_term(family, 8, 2, 3.0f);
            visit.add_update(8, 1, {{1e-2f, 0.1f, 1.0f, 1.0f}});
            visit.run_oracle();
            CHECK(updated == visit.weights);
        }
}

TEST(lookups) {
    constexpr int64_t kRows = 7, kCols = 333;
    const std::vector<int64_t> ids = {6, 0, 3, 3};
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1})
            for (const auto& [scale, out_dtype] : {std::pair{1e-2f, dtype}, {0.0f, dtype}, {1e-2f, DType::kFp32}}) {
                Visit table;
                table.seed = 5;
                table.add_segment(dtype, kRows * kCols, 4, 1001, 0);
                table.fill_random(11);
                table.emit_as(out_dtype);
                table.add_term(family, 8, 2, scale);
                table.add_emit(1, {1.0f});
                table.run_oracle();
                const size_t row = static_cast<size_t>(kCols * dtype_bytes(out_dtype));
                std::vector<uint8_t> expected, out(ids.size() * row);
                for (int64_t id : ids)
                    expected.insert(expected.end(), table.outs[0].begin() + id * static_cast<int64_t>(row),
                                    table.outs[0].begin() + (id + 1) * static_cast<int64_t>(row));
                Lookup request;
                request.table = table.weights.data();
                request.out = out.data();
                request.ids = ids.data();
                request.num_ids = static_cast<int64_t>(ids.size());
                request.num_rows = kRows;
                request.cols = kCols;
                request.dtype = dtype;
                request.out_dtype = out_dtype;
                request.scale = scale;
                request.seed = 5;
                request.family = family;
                request.step = 8;
                request.param = 4;
                request.probe = 2;
                request.offset = 1001;
                kModel.lookup(request, 500, request.num_ids * kCols);
                kModel.lookup(request, 0, 500);
                CHECK(out == expected, "family ", family, " scale ", scale);
            }
}
