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
        check_equal(actual, expected, what, simd_name(level));
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

TEST(special_values_of_every_dtype) { special_values(check_visit); }

TEST(identity_updates_touch_nothing) { identity_updates(check_visit); }

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

TEST(in_place_ops_are_visits) {
    for_each_level([](SimdLevel) { in_place_ops(perturb_cpu, update_cpu); });
}

TEST(noise) {
    generated_noise([](InPlace request, const std::vector<uint8_t>& expected) {
        for_each_level([&](SimdLevel level) {
            std::vector<uint8_t> out(expected.size());
            request.data = out.data();
            generate_cpu(request);
            CHECK(out == expected, simd_name(level), " offset ", request.offset);
        });
    });
}

TEST(rows_of_the_perturbed_table) {
    for_each_level([](SimdLevel) { lookups({1, 7, 8, 100, 1283}, lookup_cpu); });
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
