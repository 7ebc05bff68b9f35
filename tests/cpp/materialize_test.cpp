// A visit to packed weights: every instruction set against an element-by-element oracle, bit for bit, over dtypes, odd lengths and
// offsets, splits, many terms, groups and special values; and that what must not be touched is not.
#include "testing.h"

#include <algorithm>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "kernels/kernels.h"
#include "noise/rademacher.h"
#include "noise/rounding.h"

using namespace distzo2;

namespace {

struct Random { // splitmix64: test inputs only
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
    float uniform(float low, float high) { return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24f; }
};

// A visit that owns its tables and buffers.
struct Visit {
    std::vector<Segment> segments;
    std::vector<Term> terms;
    std::vector<float> coefs;
    std::vector<Update> updates;
    std::vector<UpdateGroup> update_groups;
    std::vector<Emit> emits;
    std::vector<float> emit_scales;
    std::vector<uint8_t> weights;
    std::vector<std::vector<uint8_t>> outs;
    uint64_t seed = 0;
    int64_t num_groups = 1;
    bool write_back = true;

    void add_term(int64_t family, int64_t step, int64_t probe, float coef) {
        terms.push_back({family, step, probe, 0});
        coefs.push_back(coef);
    }
    void add_update(int64_t step, int64_t num_terms, std::vector<UpdateGroup> groups) {
        updates.push_back({step, static_cast<int64_t>(terms.size()) - num_terms, num_terms});
        update_groups.insert(update_groups.end(), groups.begin(), groups.end());
    }
    void add_emit(int64_t num_terms, std::vector<float> scales) {
        emits.push_back({static_cast<int64_t>(terms.size()) - num_terms, num_terms});
        emit_scales.insert(emit_scales.end(), scales.begin(), scales.end());
        outs.emplace_back(weights.size(), uint8_t{0xA5});
    }
    // Appends a segment of `numel` elements after `gap` bytes of padding.
    void add_segment(DType dtype, int64_t numel, int64_t param, int64_t element_offset, int64_t group, int64_t gap = 0) {
        const int64_t bytes = dtype_bytes(dtype);
        const int64_t place = (static_cast<int64_t>(weights.size()) + gap + bytes - 1) / bytes * bytes;
        segments.push_back({place, numel, static_cast<int64_t>(dtype), param, element_offset, group, 1, numel});
        weights.resize(static_cast<size_t>(place + numel * bytes), uint8_t{0x5A});
    }
    template <class Value>
    void fill(Value value) { // value(segment, i) is the float32 to store
        for (const Segment& segment : segments)
            for (int64_t i = 0; i < segment.numel; ++i)
                store(weights, segment, i, value(segment, i));
    }
    void fill_random(uint64_t salt) {
        Random random{salt};
        fill([&](const Segment&, int64_t) { return random.uniform(-0.05f, 0.05f); });
    }

    static float load(const std::vector<uint8_t>& buffer, const Segment& segment, int64_t i) {
        const uint8_t* at = buffer.data() + segment.byte_offset + i * dtype_bytes(static_cast<DType>(segment.dtype));
        uint16_t half;
        float value;
        switch (static_cast<DType>(segment.dtype)) {
        case DType::kFp32:
            std::memcpy(&value, at, 4);
            return value;
        case DType::kBf16:
            std::memcpy(&half, at, 2);
            return bf16_to_float(half);
        default:
            std::memcpy(&half, at, 2);
            return fp16_to_float(half);
        }
    }
    static void store(std::vector<uint8_t>& buffer, const Segment& segment, int64_t i, float value) {
        uint8_t* at = buffer.data() + segment.byte_offset + i * dtype_bytes(static_cast<DType>(segment.dtype));
        if (static_cast<DType>(segment.dtype) == DType::kFp32) {
            value = canonical_fp32(value);
            std::memcpy(at, &value, 4);
            return;
        }
        const uint16_t half =
            static_cast<DType>(segment.dtype) == DType::kBf16 ? float_to_bf16(value) : float_to_fp16(value);
        std::memcpy(at, &half, 2);
    }

    Materialize view(std::vector<uint8_t*>& pointers) {
        pointers.clear();
        for (auto& out : outs)
            pointers.push_back(out.data());
        Materialize visit;
        visit.weights = weights.data();
        visit.num_bytes = static_cast<int64_t>(weights.size());
        visit.segments = segments.data();
        visit.num_segments = static_cast<int64_t>(segments.size());
        visit.seed = seed;
        visit.terms = terms.data();
        visit.coefs = coefs.data();
        visit.num_terms = static_cast<int64_t>(terms.size());
        visit.updates = updates.data();
        visit.update_groups = update_groups.data();
        visit.num_updates = static_cast<int64_t>(updates.size());
        visit.num_groups = num_groups;
        visit.emits = emits.data();
        visit.emit_scales = emit_scales.data();
        visit.num_emits = static_cast<int64_t>(emits.size());
        visit.outs = pointers.data();
        visit.write_back = write_back;
        return visit;
    }
    void run() {
        std::vector<uint8_t*> pointers;
        materialize_cpu(view(pointers));
    }

    float noise(const Term& term, const Segment& segment, int64_t element) const {
        const Stream stream = make_stream(static_cast<Purpose>(term.family), static_cast<uint32_t>(segment.param),
                                          static_cast<uint32_t>(term.step), static_cast<uint32_t>(term.probe));
        const uint64_t e = static_cast<uint64_t>(element);
        if (static_cast<Purpose>(term.family) == Purpose::kNormal)
            return normal_group(philox_group(stream, seed, e / 4)).z[e % 4];
        return rademacher_value(philox_group(stream, seed, e / 128), static_cast<uint32_t>(e % 128));
    }

    // types.h, element by element.
    void run_oracle() {
        for (const Segment& segment : segments)
            for (int64_t i = 0; i < segment.numel; ++i) {
                const int64_t element = segment.element_offset + i;
                float w = load(weights, segment, i);
                bool changed = false;
                for (size_t u = 0; u < updates.size(); ++u) {
                    const UpdateGroup& group = update_groups[u * static_cast<size_t>(num_groups) + segment.group];
                    bool any = false;
                    float a = group.weight_decay == 0 ? 0.0f : group.weight_decay * w;
                    for (int64_t j = updates[u].first_term; j < updates[u].first_term + updates[u].num_terms; ++j) {
                        const float k = coefs[j] * group.update_scale;
                        if (k == 0)
                            continue;
                        any = true;
                        a = fma_rn(k, noise(terms[j], segment, element), a);
                    }
                    if (group.lr == 0 || (group.weight_decay == 0 && !any))
                        continue;
                    changed = true;
                    w = fma_rn(-group.lr, a, w);
                    const Stream stream = make_stream(Purpose::kRounding, static_cast<uint32_t>(segment.param),
                                                      static_cast<uint32_t>(updates[u].step), 0);
                    const uint32_t r = rounding_bits(philox_group(stream, seed, static_cast<uint64_t>(element) / 8),
                                                     static_cast<uint32_t>(element % 8));
                    if (static_cast<DType>(segment.dtype) == DType::kBf16)
                        w = bf16_to_float(float_to_bf16_stochastic(w, r));
                    else if (static_cast<DType>(segment.dtype) == DType::kFp16)
                        w = fp16_to_float(float_to_fp16_stochastic(w, r));
                    else
                        w = canonical_fp32(w);
                }
                for (size_t e = 0; e < emits.size(); ++e) {
                    float a = w;
                    for (int64_t j = emits[e].first_term; j < emits[e].first_term + emits[e].num_terms; ++j) {
                        const float k = coefs[j] * emit_scales[e * static_cast<size_t>(num_groups) + segment.group];
                        if (k != 0)
                            a = fma_rn(k, noise(terms[j], segment, element), a);
                    }
                    store(outs[e], segment, i, a);
                }
                if (changed && write_back)
                    store(weights, segment, i, w);
            }
    }
};

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

int64_t first_difference(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
    return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
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

const DType kDTypes[] = {DType::kFp32, DType::kBf16, DType::kFp16};
constexpr UpdateGroup kPlain{1e-3f, 0.0f, 1.0f, 1.0f};

} // namespace

TEST(full_step_odd_lengths_and_offsets) {
    const int64_t lengths[] = {0, 1, 2, 3, 5, 31, 33, 127, 128, 129, 1000, 1023, 1025, 2600};
    const int64_t offsets[] = {0, 1, 3, 4, 7, 130, 1021, 4096, (int64_t{1} << 34) - 517};
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
            check_visit(visit, "full step");
        }
}

TEST(random_programs) {
    Random random{99};
    for (int round = 0; round < 60; ++round) {
        Visit visit;
        visit.seed = random.next();
        visit.num_groups = 1 + random.below(3);
        visit.write_back = random.below(4) != 0;
        for (int64_t s = random.below(5); s >= 0; --s)
            visit.add_segment(kDTypes[random.below(3)], random.below(1500), random.below(1ll << 32),
                              random.below(1ll << (3 + random.below(30))), random.below(visit.num_groups),
                              random.below(9));
        visit.fill_random(random.next());
        const auto coef = [&] { return random.below(4) == 0 ? 0.0f : random.uniform(-2, 2); };
        const auto add_terms = [&](int64_t num) {
            for (int64_t j = 0; j < num; ++j)
                visit.add_term(random.below(2), random.below(1ll << 32), random.below(1ll << 20), coef());
        };
        for (int64_t u = random.below(4); u > 0; --u) {
            const int64_t num_terms = random.below(5);
            add_terms(num_terms);
            std::vector<UpdateGroup> groups;
            for (int64_t g = 0; g < visit.num_groups; ++g)
                groups.push_back({random.below(5) == 0 ? 0.0f : random.uniform(-1e-2f, 1e-2f),
                                  random.below(2) == 0 ? 0.0f : 0.1f, 1.0f, random.below(5) == 0 ? 0.0f : 1.5f});
            visit.add_update(random.below(1ll << 32), num_terms, groups);
        }
        for (int64_t e = random.below(5); e > 0; --e) {
            const int64_t num_terms = random.below(4);
            add_terms(num_terms);
            std::vector<float> scales;
            for (int64_t g = 0; g < visit.num_groups; ++g)
                scales.push_back(random.below(5) == 0 ? 0.0f : random.uniform(0, 2));
            visit.add_emit(num_terms, scales);
            if (random.below(2) == 0) { // the other sign
                for (int64_t j = 0; j < num_terms; ++j) {
                    const size_t twin = visit.terms.size() - static_cast<size_t>(num_terms);
                    visit.add_term(visit.terms[twin].family, visit.terms[twin].step, visit.terms[twin].probe,
                                   -visit.coefs[twin]);
                }
                visit.add_emit(num_terms, scales);
            }
        }
        check_visit(visit, "random program");
    }
}

TEST(update_of_thousands_of_terms) {
    for (DType dtype : kDTypes) {
        Visit visit;
        visit.add_segment(dtype, 77, 3, 5, 0);
        visit.fill_random(1);
        Random random{2};
        constexpr int64_t kNumTerms = 3000;
        for (int64_t j = 0; j < kNumTerms; ++j)
            visit.add_term(j % 2, j / 4, j % 4, random.uniform(-0.1f, 0.1f));
        visit.add_update(700, kNumTerms, {{1e-3f, 0.01f, 1.0f, 1.0f}});
        visit.add_emit(0, {1.0f});
        check_visit(visit, "thousands of terms");
    }
}

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
    constexpr int64_t kNumel = 5000, kOffset = 77;
    for (DType dtype : kDTypes)
        for_each_level([&](SimdLevel) {
            const auto make = [&](const std::vector<int64_t>& cuts) {
                Visit visit;
                visit.seed = 6;
                for (size_t c = 0; c + 1 < cuts.size(); ++c)
                    visit.add_segment(dtype, cuts[c + 1] - cuts[c], 9, kOffset + cuts[c], 0);
                visit.fill([&](const Segment& segment, int64_t i) {
                    return static_cast<float>((segment.element_offset + i) % 37) * 1e-3f;
                });
                visit.add_term(0, 1, 0, 1.0f);
                visit.add_term(1, 1, 1, 1.0f);
                visit.add_update(1, 2, {kPlain});
                visit.add_term(0, 2, 0, 1e-2f);
                visit.add_emit(1, {1.0f});
                visit.run();
                return std::make_pair(visit.weights, visit.outs[0]);
            };
            const auto whole = make({0, kNumel});
            CHECK(make({0, 1, 2, 40, 1024 - kOffset, 999, 3001, kNumel}) == whole);
            CHECK(make({0, 128 - kOffset % 128, 4096 - kOffset, kNumel}) == whole);
        });
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
    set_parallel_for([](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) { body(context, begin, end); });
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
            place.weights = updated.data();
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
            for (int64_t offset : {int64_t{0}, int64_t{1}, int64_t{126}, (int64_t{1} << 37) - 1000})
                for_each_level([&](SimdLevel level) {
                    constexpr int64_t kNumel = 2345;
                    Visit oracle; // 0 + 1 * z is z
                    oracle.seed = 23;
                    oracle.add_segment(dtype, kNumel, 6, offset, 0);
                    oracle.fill([](const Segment&, int64_t) { return 0.0f; });
                    oracle.add_term(family, 9, 4, 1.0f);
                    oracle.add_emit(1, {1.0f});
                    oracle.run_oracle();
                    std::vector<uint8_t> out(oracle.weights.size());
                    generate_cpu({out.data(), dtype, kNumel, 23, family, 9, 6, 4, offset});
                    CHECK(out == oracle.outs[0], simd_name(level), " offset ", offset);
                });
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
    refused([](Visit& v) { v.terms[0].family = 2; }, "unknown family of noise 2");
    refused([](Visit& v) { v.terms[0].probe = 1 << 20; }, "probe 1048576");
    refused([](Visit& v) { v.terms[0].step = -1; }, "step -1");
    refused([](Visit& v) { v.terms[0].sub = 1; }, "sub 1");
    refused([](Visit& v) { v.updates[0].num_terms = 2; }, "update 0");
    refused([](Visit& v) { v.emits[0].first_term = 1; }, "emit 0");
    refused([](Visit& v) { v.segments[1].dtype = 3; }, "dtype code 3");
    refused([](Visit& v) { v.segments[1].numel = 11; }, "segment 1: 11 elements");
    refused([](Visit& v) { v.segments[1].byte_offset = 18; }, "not aligned");
    refused([](Visit& v) { v.segments[1].byte_offset = 16; }, "segments 0 and 1 overlap");
    refused([](Visit& v) { v.segments[0].group = 1; }, "group 1 of 1");
    refused([](Visit& v) { v.segments[0].element_offset = kMaxElements; }, "element_offset");
    refused([](Visit& v) { v.segments[0].param = int64_t{1} << 32; }, "param");
    uint8_t byte = 0;
    CHECK_THROWS(generate_cpu({&byte, DType::kFp32, 0, 0, 7, 0, 0, 0, 0}), "unknown family of noise 7");
    CHECK_THROWS(set_simd_level(static_cast<SimdLevel>(9)), "cannot run here");
}
