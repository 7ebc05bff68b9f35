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
    check_equal(actual, expected, what);
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

TEST(special_values_of_every_dtype) { special_values(check_visit); }

TEST(identity_updates_touch_nothing) { identity_updates(check_visit); }

TEST(noise) {
    generated_noise([](InPlace request, const std::vector<uint8_t>& expected) {
        std::vector<uint8_t> out(expected.size());
        request.data = out.data();
        kModel.generate(request, 777, request.numel);
        kModel.generate(request, 0, 777);
        CHECK(out == expected, "offset ", request.offset);
    });
}

TEST(in_place_ops_are_visits) {
    in_place_ops(
        [](const InPlace& place, float scale) { kModel.materialize(PerturbVisit(place, scale).visit, 0, place.numel); },
        [](const InPlace& place, float lr, float coef, float weight_decay) {
            kModel.materialize(UpdateVisit(place, lr, coef, weight_decay).visit, 0, place.numel);
        });
}

TEST(rows_of_the_perturbed_table) {
    lookups({133}, [](const Lookup& request) {
        kModel.lookup(request, 500, request.num_ids * request.cols);
        kModel.lookup(request, 0, 500);
    });
}
