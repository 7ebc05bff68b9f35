// A visit to packed weights: every instruction set against an element-by-element oracle, bit for bit, over dtypes, odd
// lengths and offsets, splits, many terms, groups and special values; and that what must not be touched is not.
#include "testing.h"

#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "visit_cases.h"

using namespace distzo2;

namespace {

template <class Body>
void for_each_level(Body body) {
    const SimdLevel before = simd_level();
    for (SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512})
        if (simd_available(level)) {
            set_simd_level(level);
            body(level);
        }
    set_simd_level(before);
}

// Every level gives the oracle's bytes, padding included.
void check_visit(const Visit& visit, const char* what) {
    Visit expected = visit;
    expected.run_oracle();
    for_each_level([&](SimdLevel level) {
        Visit actual = visit;
        actual.run();
        CHECK(actual.weights == expected.weights, what, ' ', simd_name(level), ": weights differ at byte ",
              first_difference(actual.weights, expected.weights));
        for (size_t e = 0; e < visit.outs.size(); ++e)
            CHECK(actual.outs[e] == expected.outs[e], what, ' ', simd_name(level), ": out ", e, " differs at byte ",
                  first_difference(actual.outs[e], expected.outs[e]));
    });
}

} // namespace

TEST(full_step_odd_lengths_and_offsets) {
    full_steps({0, 1, 2, 3, 5, 31, 33, 127, 128, 129, 1000, 1023, 1025, 2600}, check_visit);
}

TEST(random_programs) {
    Random random{99};
    for (int round = 0; round < 60; ++round)
        check_visit(random_visit(random), "random program");
}

TEST(rounding_of_every_16_bit_value) { every_16_bit_value(kManyShares, check_visit); }

TEST(perturbed_by_signs_of_every_value) { perturbed_by_signs(kManyShares, check_visit); }

TEST(updates_and_emits_of_thousands_of_terms) { many_terms(4099, check_visit); }

TEST(hundreds_of_missed_updates) { many_updates(301, check_visit); }

TEST(special_values) {
    const uint32_t specials[] = {0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF,
                                 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x477FE000, 0x477FF000,
                                 0x33800000, 0x387FE000, 0x38800000, 0x2F000000, 0x7F7F8000, 0x477FEFFF};
    constexpr int64_t kNum = sizeof specials / sizeof specials[0];
    for (DType dtype : kDTypes)
        for (float lr : {1e-3f, 1e30f, 1e-42f})
            for (float decay : {0.0f, 0.5f}) {
                Visit visit;
                visit.add_segment(dtype, 25 * kNum, 1, 0, 0);
                visit.fill([&](const Segment&, int64_t i) { return bits_float(specials[i % kNum]); });
                visit.add_term(0, 1, 0, 2.0f);
                visit.add_update(1, 1, {{lr, decay, 1.0f, 1.0f}});
                for (float scale : {1e-3f, -1e-3f, 0.0f, 1e38f, 1e-42f}) {
                    visit.add_term(0, 2, 0, scale);
                    visit.add_emit(1, {1.0f});
                }
                check_visit(visit, "special values");
            }
}

// The identity leaves bits that no rounding would leave: NaN payloads and -0.
TEST(identity_updates_touch_nothing) {
    for (DType dtype : kDTypes) {
        Visit visit;
        visit.num_groups = 2;
        visit.add_segment(dtype, 300, 0, 1, 0);
        visit.add_segment(dtype, 300, 1, 1, 1);
        Random random{8};
        for (uint8_t& byte : visit.weights)
            byte = static_cast<uint8_t>(random.next());
        visit.add_term(0, 1, 0, 3.0f);
        visit.add_update(1, 1, {{0.0f, 0.1f, 1.0f, 1.0f}, {0.5f, 0.0f, 1.0f, 0.0f}}); // lr 0; scale 0 and no decay
        visit.add_term(0, 2, 0, 0.0f);
        visit.add_update(2, 1, {{1.0f, 0.0f, 1.0f, 1.0f}, {1.0f, 0.0f, 1.0f, 1.0f}});
        const std::vector<uint8_t> before = visit.weights;
        for_each_level([&](SimdLevel) {
            visit.run();
            CHECK(visit.weights == before);
        });
    }
}

// Elements regenerate their own noise wherever they are cut.
TEST(any_split_gives_the_same_bits) {
    Random random{6};
    for (int round = 0; round < 40; ++round) {
        const Visit visit = random_visit(random), pieces = cut(visit, random);
        for_each_level([&](SimdLevel level) {
            Visit whole = visit, parts = pieces;
            whole.run();
            parts.run();
            CHECK(parts.weights == whole.weights && parts.outs == whole.outs, simd_name(level), " round ", round);
        });
    }
}

TEST(threads_and_hooks_give_the_same_bits) {
    Visit visit;
    visit.add_segment(DType::kBf16, 100001, 0, 3, 0);
    visit.add_segment(DType::kFp32, 70003, 1, 0, 0);
    visit.fill_random(3);
    visit.add_term(0, 5, 0, 1.0f);
    visit.add_update(5, 1, {kPlain});
    visit.add_term(0, 6, 0, 1e-3f);
    visit.add_emit(1, {1.0f});
    Visit serial = visit, uneven = visit;
    set_parallel_for(
        [](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) { body(context, begin, end); });
    serial.run();
    set_parallel_for([](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
        std::vector<std::thread> threads;
        for (int64_t at = begin; at < end; at += 33333)
            threads.emplace_back(body, context, at, std::min(end, at + 33333));
        for (std::thread& thread : threads)
            thread.join();
    });
    uneven.run();
    set_parallel_for(nullptr);
    visit.run();
    CHECK(visit.weights == serial.weights && visit.outs == serial.outs);
    CHECK(uneven.weights == serial.weights && uneven.outs == serial.outs);
}

TEST(not_written_back) {
    Visit visit;
    visit.add_segment(DType::kBf16, 3000, 0, 3, 0);
    visit.fill_random(4);
    visit.add_term(0, 5, 0, 1.0f);
    visit.add_update(5, 1, {{1e-2f, 0.0f, 1.0f, 1.0f}});
    visit.add_emit(0, {1.0f});
    visit.write_back = false;
    Visit written = visit;
    written.write_back = true;
    const std::vector<uint8_t> before = visit.weights;
    visit.run();
    written.run();
    CHECK(visit.weights == before);
    CHECK(visit.outs == written.outs);
    CHECK(written.weights != before);
    CHECK(written.weights == written.outs[0]);
}

// Updates missed over several visits, applied at once, are the same as one by one.
TEST(deferred_updates) {
    for (DType dtype : kDTypes) {
        Visit at_once;
        at_once.add_segment(dtype, 4321, 2, 11, 0);
        at_once.fill_random(7);
        Visit stepwise = at_once;
        for (int64_t step = 0; step < 7; ++step) {
            Visit one = stepwise;
            for (Visit* visit : {&at_once, &one}) {
                visit->add_term(step % 2, step, 0, 1.0f + static_cast<float>(step));
                visit->add_update(step, 1, {{1e-3f, 0.01f, 1.0f, 1.0f}});
            }
            one.run();
            stepwise.weights = one.weights;
        }
        at_once.run();
        CHECK(at_once.weights == stepwise.weights);
    }
}

TEST(in_place_ops_are_visits) {
    for (DType dtype : kDTypes)
        for_each_level([&](SimdLevel) {
            Visit visit;
            visit.seed = 17;
            visit.add_segment(dtype, 2222, 4, 999, 0);
            visit.fill_random(11);
            std::vector<uint8_t> perturbed = visit.weights, updated = visit.weights;
            InPlace place{perturbed.data(), dtype, 2222, 17, 0, 8, 4, 2, 999};
            perturb_cpu(place, 1e-3f);
            place.data = updated.data();
            update_cpu(place, 1e-2f, 3.0f, 0.1f);
            visit.add_term(0, 8, 2, 1e-3f);
            visit.add_emit(1, {1.0f});
            visit.add_term(0, 8, 2, 3.0f);
            Visit update = visit;
            visit.run();
            CHECK(perturbed == visit.outs[0]);
            update.add_update(8, 1, {{1e-2f, 0.1f, 1.0f, 1.0f}});
            update.run();
            CHECK(updated == update.weights);
        });
}

TEST(generated_noise) {
    for (DType dtype : kDTypes)
        for (int64_t family : {0, 1})
            for (int64_t offset : kNoiseOffsets) {
                InPlace request{nullptr, dtype, kNoiseNumel, 23, family, 9, 6, 4, offset};
                const std::vector<uint8_t> expected = expected_noise(request);
                for_each_level([&](SimdLevel level) {
                    std::vector<uint8_t> out(expected.size());
                    request.data = out.data();
                    generate_cpu(request);
                    CHECK(out == expected, simd_name(level), " offset ", offset);
                });
            }
}

#if defined(__x86_64__)
// torch.set_flush_denormal sets these bits in a thread.
TEST(flush_to_zero_does_not_change_bits) {
    Visit visit;
    visit.add_segment(DType::kFp32, 500, 0, 0, 0);
    visit.fill([](const Segment&, int64_t i) { return static_cast<float>(i) * 1e-41f; });
    visit.add_term(0, 1, 0, 1e-40f);
    visit.add_emit(1, {1.0f});
    Visit expected = visit;
    expected.run_oracle();
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040 | 0x6000); // FTZ, DAZ, round towards zero
    for_each_level([&](SimdLevel) { visit.run(); });
    CHECK_EQ(_mm_getcsr() & ~0x3Fu, (saved | 0x8040 | 0x6000) & ~0x3Fu);
    _mm_setcsr(saved);
    CHECK(visit.outs == expected.outs);
}
#endif

TEST(refusals) {
    Visit good;
    good.add_segment(DType::kBf16, 10, 0, 0, 0);
    good.add_segment(DType::kFp32, 10, 1, 0, 0);
    good.add_term(0, 1, 0, 1.0f);
    good.add_update(1, 1, {kPlain});
    good.add_emit(1, {1.0f});
    const auto refused = [&](auto change, const char* text) {
        Visit bad = good;
        change(bad);
        const std::vector<uint8_t> before = bad.weights;
        CHECK_THROWS(bad.run(), text);
        CHECK(bad.weights == before);
    };
    refused([](Visit& v) { v.updates[0].num_terms = 2; }, "update 0");
    refused([](Visit& v) { v.emits[0].first_term = 1; }, "emit 0");
    refused([](Visit& v) { v.segments[1].dtype = 6; }, "dtype code 6");
    refused([](Visit& v) { v.segments[1].numel = 11; }, "segment 1: 11 elements");
    refused([](Visit& v) { v.segments[0].group = 1; }, "group 1 of 1");
    refused([](Visit& v) { v.segments[0].group = -2; }, "group -2 of 1");
    refused([](Visit& v) { v.segments[1].out_offset = 24; },
            "out of segment 1: 10 elements of 4 bytes at byte 24 of 60");
    refused([](Visit& v) { v.segments[1].out_dtype = -1; }, "out of segment 1: dtype code -1");
    refused([](Visit& v) { v.segments[0].numel = -1; }, "numel -1");
    refused([](Visit& v) { v.segments[1].byte_offset = -20; }, "at byte -20");
    refused([](Visit& v) { v.segments[1].byte_offset = INT64_MAX - 3; }, "segment 1: 10 elements");
    refused([](Visit& v) { v.updates[0].first_term = INT64_MAX; }, "update 0");
    refused([](Visit& v) { v.emits[0].num_terms = -1; }, "emit 0");
    CHECK_THROWS(set_simd_level(static_cast<SimdLevel>(9)), "cannot run here");
}
