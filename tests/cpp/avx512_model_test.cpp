// The AVX-512 kernels, compiled over a model of their instructions, against the oracle and the other kernels: for
// machines without AVX-512, which are most.
#include "testing.h"

#include "avx512_model.h"
#include "visit_fixture.h"

#define DISTZO2_AVX512_MODEL
#include "kernels/simd_avx512.h"

#include "kernels/cpu_tiles.h"

using namespace distzo2;

namespace {

void check_visit(const Visit& visit, const char* what) {
    Visit expected = visit, actual = visit;
    expected.run_oracle();
    std::vector<uint8_t*> pointers;
    const Materialize view = actual.view(pointers);
    check(view);
    int64_t numel = 0;
    for (const Segment& segment : visit.segments)
        numel += segment.numel;
    make_level<Lanes>().materialize(view, 0, numel);
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

TEST(full_step) {
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1}) {
            Visit visit;
            visit.seed = 0x0123456789ABCDEF;
            for (int64_t offset : {int64_t{0}, int64_t{1}, int64_t{1021}, (int64_t{1} << 34) - 517})
                for (int64_t numel : {1, 17, 129, 2600})
                    visit.add_segment(dtype, numel, numel, offset, 0, numel % 3);
            visit.fill_random(3);
            visit.add_term(family, 41, 0, 0.75f);
            visit.add_update(41, 1, {kPlain});
            visit.add_term(family, 42, 1, 1e-3f);
            visit.add_emit(1, {1.0f});
            visit.add_term(family, 42, 1, -1e-3f);
            visit.add_emit(1, {1.0f});
            check_visit(visit, "full step");
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
