// A visit that owns its tables and buffers, the element-by-element oracle of types.h, and random programs: shared by
// the tests of the CPU kernels and of what the CUDA kernels do.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "noise/rademacher.h"
#include "noise/rounding.h"
#include "testing.h"

namespace distzo2 {

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
    int64_t out_bytes = -1; // -1: outs are laid out as the weights
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
        outs.emplace_back(out_bytes < 0 ? weights.size() : static_cast<size_t>(out_bytes), uint8_t{0xA5});
    }
    // Appends a segment of `numel` elements after `gap` bytes of padding.
    void add_segment(DType dtype, int64_t numel, int64_t param, int64_t element_offset, int64_t group,
                     int64_t gap = 0) {
        const int64_t bytes = dtype_bytes(dtype);
        const int64_t place = (static_cast<int64_t>(weights.size()) + gap + bytes - 1) / bytes * bytes;
        segments.push_back({place, numel, static_cast<int64_t>(dtype), param, element_offset, group, 1, numel});
        weights.resize(static_cast<size_t>(place + numel * bytes), uint8_t{0x5A});
    }
    // Codes with their scales behind them; to be emitted in another dtype.
    void add_codes(DType dtype, int64_t numel, int64_t param, int64_t element_offset, int64_t group,
                   int64_t scale_group, Random& random) {
        add_segment(dtype, numel, param, element_offset / scale_group * scale_group, group, random.below(9));
        const size_t at = (weights.size() + 3) / 4 * 4;
        const auto num = static_cast<size_t>((numel + scale_group - 1) / scale_group);
        segments.back().scale_offset = static_cast<int64_t>(at);
        segments.back().scale_group = scale_group;
        weights.resize(at + 4 * num);
        for (size_t i = 0; i < num; ++i) {
            const float wild[] = {0.0f, 1e-45f, 3e38f, 1.2e-38f};
            const float scale = random.below(4) == 0 ? wild[random.below(4)] : random.uniform(1e-6f, 1e-2f);
            std::memcpy(weights.data() + at + 4 * i, &scale, 4);
        }
    }
    // w0 of the last segment, of a dtype, behind the others.
    void add_start(int64_t gap, Random& random) {
        Segment start = segments.back();
        start.byte_offset = static_cast<int64_t>(weights.size()) + gap;
        segments.back().scale_offset = start.byte_offset;
        weights.resize(weights.size() + static_cast<size_t>(gap + start.numel * dtype_bytes(DType(start.dtype))));
        for (int64_t i = 0; i < start.numel; ++i)
            store(weights, start, i, random.uniform(-0.05f, 0.05f));
    }
    // Emits go to other places, in dtype_of(segment); `gap` gives the bytes of padding before each. To be called before
    // emits are added.
    template <class DTypeOf, class Gap>
    void emit_as(DTypeOf dtype_of, Gap gap) {
        out_bytes = 0;
        for (Segment& segment : segments) {
            const DType dtype = dtype_of(segment);
            const int64_t bytes = dtype_bytes(dtype);
            segment.out_dtype = static_cast<int64_t>(dtype);
            segment.out_offset = (out_bytes + gap() + bytes - 1) / bytes * bytes;
            out_bytes = segment.out_offset + segment.numel * bytes;
        }
    }
    void emit_as(DType dtype) {
        emit_as([dtype](const Segment&) { return dtype; }, [] { return 0; });
    }
    template <class Value>
    void fill(Value value) { // value(segment, i) is the float32 to store
        for (const Segment& segment : segments)
            for (int64_t i = 0; i < segment.numel; ++i)
                store(weights, segment, i, value(segment, i));
    }
    void fill_random(uint64_t salt) {
        Random random{salt};
        fill([&](const Segment& segment, int64_t) {
            const float value = random.uniform(-0.05f, 0.05f), largest = limit_of(segment);
            return largest == 0 ? value : static_cast<float>(static_cast<int32_t>(20 * value * largest));
        });
    }

    static float limit_of(const Segment& segment) { // the largest code
        const auto dtype = static_cast<DType>(segment.dtype);
        return dtype == DType::kCode8 ? 127.0f : dtype == DType::kCode16 ? 32767.0f : 0.0f;
    }
    float scale_of(const Segment& segment, int64_t i) const {
        float scale = 1.0f;
        if (is_code(static_cast<DType>(segment.dtype)))
            std::memcpy(&scale, weights.data() + segment.scale_offset + 4 * (i / segment.scale_group), 4);
        return scale;
    }
    static Segment emitted(Segment segment) { // as if it was stored there
        segment.byte_offset = segment.out_offset;
        segment.dtype = segment.out_dtype;
        return segment;
    }
    static float load(const std::vector<uint8_t>& buffer, const Segment& segment, int64_t i) {
        const uint8_t* at = buffer.data() + segment.byte_offset + i * dtype_bytes(static_cast<DType>(segment.dtype));
        uint16_t half;
        float value;
        switch (static_cast<DType>(segment.dtype)) {
        case DType::kCode8:
            return static_cast<int8_t>(*at);
        case DType::kCode16:
            std::memcpy(&half, at, 2);
            return static_cast<int16_t>(half);
        case DType::kFp32:
        case DType::kNonNegative:
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
        if (dtype_bytes(static_cast<DType>(segment.dtype)) == 4) {
            value = canonical_fp32(value);
            std::memcpy(at, &value, 4);
            return;
        }
        if (is_code(static_cast<DType>(segment.dtype))) {
            const auto code = static_cast<int16_t>(value); // little-endian
            std::memcpy(at, &code, static_cast<size_t>(dtype_bytes(static_cast<DType>(segment.dtype))));
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
        visit.out_bytes = out_bytes < 0 ? visit.num_bytes : out_bytes;
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
        const Purpose kind = kind_of(term.family);
        const int rank = rank_of(term.family);
        const auto value = [&](Purpose purpose, int64_t index) {
            const Draw draw = make_draw(purpose, static_cast<uint32_t>(segment.param), static_cast<uint32_t>(term.step),
                                        static_cast<uint32_t>(term.probe));
            const uint64_t e = static_cast<uint64_t>(index);
            if (kind == Purpose::kNormal)
                return normal_group(philox_group(draw, seed, e / 4)).z[e % 4];
            return rademacher_value(philox_group(draw, seed, e / 128), static_cast<uint32_t>(e % 128));
        };
        if (rank == 0 || segment.cols == 0)
            return value(kind, element);
        const int64_t row = element / segment.cols, col = element % segment.cols + row / segment.rows * segment.cols;
        float z = value(Purpose::kRows, row * rank) * value(Purpose::kCols, col * rank);
        for (int s = 1; s < rank; ++s)
            z = fma_rn(value(Purpose::kRows, row * rank + s), value(Purpose::kCols, col * rank + s), z);
        return rank == 4 ? z * 0.5f : z;
    }

    // types.h, element by element.
    void run_oracle() {
        for (const Segment& segment : segments)
            for (int64_t i = 0; i < segment.numel; ++i) {
                const int64_t element = segment.element_offset + i;
                float w = load(weights, segment, i); // or a code
                const float scale = scale_of(segment, i), limit = limit_of(segment);
                bool changed = false;
                for (size_t u = 0; u < updates.size() && segment.group != kNoGroup; ++u) {
                    const UpdateGroup& group = update_groups[u * static_cast<size_t>(num_groups) + segment.group];
                    const bool anchored = group.anchor != 0 && limit == 0;
                    bool any = false;
                    float a = group.weight_decay == 0 ? 0.0f : group.weight_decay * (w * scale);
                    if (anchored) {
                        Segment start = segment;
                        start.byte_offset = segment.scale_offset;
                        a = fma_rn(group.anchor, w - load(weights, start, i), a);
                    }
                    for (int64_t j = updates[u].first_term; j < updates[u].first_term + updates[u].num_terms; ++j) {
                        const float k = coefs[j] * group.update_scale;
                        if (k == 0)
                            continue;
                        any = true;
                        a = fma_rn(k, noise(terms[j], segment, element), a);
                    }
                    if (group.lr == 0 || (group.weight_decay == 0 && !anchored && !any))
                        continue;
                    changed = true;
                    const Draw draw = make_draw(Purpose::kRounding, static_cast<uint32_t>(segment.param),
                                                static_cast<uint32_t>(updates[u].step), 0);
                    const uint32_t r = rounding_bits(philox_group(draw, seed, static_cast<uint64_t>(element) / 8),
                                                     static_cast<uint32_t>(element % 8));
                    if (limit > 0) {
                        w = step_code(w, -group.lr * a, code_divisor(scale), r, limit);
                        continue;
                    }
                    w = fma_rn(-group.lr, a, w);
                    if (static_cast<DType>(segment.dtype) == DType::kBf16)
                        w = bf16_to_float(float_to_bf16_stochastic(w, r));
                    else if (static_cast<DType>(segment.dtype) == DType::kFp16)
                        w = fp16_to_float(float_to_fp16_stochastic(w, r));
                    else
                        w = canonical_fp32(w);
                    if (static_cast<DType>(segment.dtype) == DType::kNonNegative && std::signbit(w))
                        w = 0.0f;
                }
                for (size_t e = 0; e < emits.size(); ++e) {
                    float a = w * scale;
                    for (int64_t j = emits[e].first_term; j < emits[e].first_term + emits[e].num_terms; ++j) {
                        const float k =
                            segment.group == kNoGroup
                                ? 0.0f
                                : coefs[j] * emit_scales[e * static_cast<size_t>(num_groups) + segment.group];
                        if (k != 0)
                            a = fma_rn(k, noise(terms[j], segment, element), a);
                    }
                    store(outs[e], emitted(segment), i, a);
                }
                if (changed && write_back)
                    store(weights, segment, i, w);
            }
    }
};

inline const DType kDTypes[] = {DType::kFp32, DType::kBf16, DType::kFp16};
constexpr UpdateGroup kPlain{1e-3f, 0.0f, 0.0f, 1.0f};

// Several groups, mixed dtypes, odd places, zero coefficients and rates, what is frozen, emits in pairs of both signs,
// every second time, and with stored formats, in other dtypes and at other places.
inline Visit random_visit(Random& random) {
    Visit visit;
    visit.seed = random.next();
    visit.num_groups = 1 + random.below(3);
    visit.write_back = random.below(4) != 0;
    const bool stored = random.below(2) == 0; // formats that are no dtypes
    const bool low_rank = random.below(2) == 0, anchored = random.below(2) == 0;
    for (int64_t s = random.below(5); s >= 0; --s) {
        const DType dtype = stored ? static_cast<DType>(random.below(6)) : kDTypes[random.below(3)];
        const int64_t numel = random.below(1500), param = random.below(1ll << 32);
        const int64_t offset = random.below(1ll << (3 + random.below(30)));
        const int64_t group = random.below(6) == 0 ? kNoGroup : random.below(visit.num_groups);
        if (is_code(dtype))
            visit.add_codes(dtype, numel, param, offset, group, 32ll << random.below(4), random);
        else
            visit.add_segment(dtype, numel, param, offset, group, random.below(9));
        if (anchored && !is_code(dtype))
            visit.add_start(random.below(5) * dtype_bytes(dtype), random);
        constexpr int64_t kCols[] = {0, 1, 3, 100, 128, 600, 1024};
        visit.segments.back().rows = 1 + random.below(40);
        visit.segments.back().cols = kCols[random.below(7)];
    }
    visit.fill_random(random.next());
    if (random.below(2) == 0 || stored)
        visit.emit_as([&](const Segment&) { return kDTypes[random.below(3)]; }, [&] { return random.below(9); });
    const auto coef = [&] { return random.below(4) == 0 ? 0.0f : random.uniform(-2, 2); };
    const auto add_terms = [&](int64_t num) {
        for (int64_t j = 0; j < num; ++j) {
            constexpr int64_t kFamilies[] = {0, 1, 0, 1, 16, 17, 64, 65};
            const int64_t family = kFamilies[random.below(low_rank ? 8 : 2)], step = random.below(1ll << 32);
            visit.add_term(family, step, random.below(1ll << 20), coef());
        }
    };
    for (int64_t u = random.below(4); u > 0; --u) {
        const int64_t num_terms = random.below(5);
        add_terms(num_terms);
        std::vector<UpdateGroup> groups;
        for (int64_t g = 0; g < visit.num_groups; ++g) {
            const float lr = random.below(5) == 0 ? 0.0f : random.uniform(-1e-2f, 1e-2f);
            const float decay = random.below(2) == 0 ? 0.0f : 0.1f;
            const float anchor = anchored && random.below(4) != 0 ? 0.3f : 0.0f;
            groups.push_back({lr, decay, anchor, random.below(5) == 0 ? 0.0f : 1.5f});
        }
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
    return visit;
}

// Weights and emits, padding included; `what` and `how` name the case.
inline void check_equal(const Visit& actual, const Visit& expected, const char* what, const char* how = "") {
    const auto first_difference = [](const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
        return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
    };
    CHECK(actual.weights == expected.weights, what, ' ', how, ": weights differ at byte ",
          first_difference(actual.weights, expected.weights));
    for (size_t e = 0; e < expected.outs.size(); ++e)
        CHECK(actual.outs[e] == expected.outs[e], what, ' ', how, ": out ", e, " differs at byte ",
              first_difference(actual.outs[e], expected.outs[e]));
}

} // namespace distzo2
