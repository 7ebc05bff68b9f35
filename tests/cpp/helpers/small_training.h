// A small model and its ZO training in C++, with the real kernels: layers, visits, lanes, and the training with
// resident weights that streamed ones are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/common.h"

namespace small_training {

using namespace distzo2;

constexpr int kBlocks = 7;
constexpr int kWidth = 24;
constexpr int kBatch = 3;
constexpr float kEps = 1e-3f;
constexpr uint64_t kSeed = 42;
constexpr int64_t kNormal = 0, kRademacher = 1;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kDefaultSteps = 150;
#else
constexpr int kDefaultSteps = 1000;
#endif

inline int num_steps() {
    const char* text = std::getenv("DISTZO2_STRESS_STEPS");
    return text != nullptr ? std::atoi(text) : kDefaultSteps;
}

// A matrix and a bias, packed as units are: fp32 in even blocks, bf16 in odd ones. Sizes differ from block to block,
// since odd ones end with elements that the forward does not read.
struct Layout {
    explicit Layout(int block) {
        const DType dtype = block % 2 == 0 ? DType::kFp32 : DType::kBf16;
        const int64_t bytes = dtype_bytes(dtype), unread = block % 2 == 0 ? 0 : 37 * block;
        const int64_t num_weights = kWidth * kWidth, num_biases = kWidth + unread;
        const auto bias_at = static_cast<int64_t>(align_up(static_cast<size_t>(num_weights * bytes), 256));
        const auto code = static_cast<int64_t>(dtype);
        segments[0] = {0, num_weights, code, 2 * block, 0, 0, kWidth, kWidth};
        segments[1] = {bias_at, num_biases, code, 2 * block + 1, 0, 0, 1, num_biases};
        num_bytes = static_cast<size_t>(bias_at + num_biases * bytes);
    }
    float value(const std::byte* memory, int segment, int64_t i) const {
        const std::byte* base = memory + segments[segment].byte_offset;
        if (segments[segment].dtype == static_cast<int64_t>(DType::kFp32)) {
            float x;
            std::memcpy(&x, base + 4 * i, 4);
            return x;
        }
        uint16_t half;
        std::memcpy(&half, base + 2 * i, 2);
        const uint32_t bits = uint32_t{half} << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    Segment segments[2];
    size_t num_bytes;
};

inline const std::vector<Layout>& layouts() {
    static const std::vector<Layout> all = [] {
        std::vector<Layout> made;
        for (int block = 0; block < kBlocks; ++block)
            made.emplace_back(block);
        return made;
    }();
    return all;
}

inline std::vector<size_t> block_bytes() {
    std::vector<size_t> sizes;
    for (const Layout& layout : layouts())
        sizes.push_back(layout.num_bytes);
    return sizes;
}

inline size_t max_block_bytes() {
    const std::vector<size_t> sizes = block_bytes();
    return *std::max_element(sizes.begin(), sizes.end());
}

// Rows of one visit: the updates that a block has missed, each of one term, and both signs of the step's probe.
struct Program {
    Program(const std::vector<float>& coefs_of_steps, int64_t version, int64_t step, bool emits_too) {
        for (int64_t t = version; t < step; ++t) {
            terms.push_back({t % 3 == 0 ? kRademacher : kNormal, t, 0, 0});
            coefs.push_back(coefs_of_steps[static_cast<size_t>(t)]);
            updates.push_back({t, static_cast<int64_t>(updates.size()), 1});
            groups.push_back({2e-3f, 1e-4f, 0.0f, 1.0f});
        }
        for (int sign = 0; emits_too && sign < 2; ++sign) {
            emits.push_back({static_cast<int64_t>(terms.size()), 1});
            terms.push_back({step % 3 == 0 ? kRademacher : kNormal, step, 0, 0});
            coefs.push_back(sign == 0 ? kEps : -kEps);
            scales.push_back(1.0f);
        }
    }
    void run(const Layout& layout, std::byte* weights, uint8_t* const* outs, bool write_back) const {
        Materialize visit;
        visit.weights = reinterpret_cast<uint8_t*>(weights);
        visit.num_bytes = visit.out_bytes = static_cast<int64_t>(layout.num_bytes);
        visit.segments = layout.segments;
        visit.num_segments = 2;
        visit.seed = kSeed;
        visit.terms = terms.data();
        visit.coefs = coefs.data();
        visit.num_terms = static_cast<int64_t>(terms.size());
        visit.updates = updates.data();
        visit.update_groups = groups.data();
        visit.num_updates = static_cast<int64_t>(updates.size());
        visit.num_groups = 1;
        visit.emits = emits.data();
        visit.emit_scales = scales.data();
        visit.num_emits = static_cast<int64_t>(emits.size());
        visit.outs = outs;
        visit.write_back = write_back;
        materialize_cpu(visit);
    }
    std::vector<Term> terms;
    std::vector<float> coefs;
    std::vector<Update> updates;
    std::vector<UpdateGroup> groups;
    std::vector<Emit> emits;
    std::vector<float> scales;
};

// The lanes of one step, and where they have come to: kernels of one stream work on it in turn.
struct Lanes {
    Lanes() : scratch(2, std::vector<uint8_t>(max_block_bytes())) {}
    void begin() {
        for (auto& lane : hidden)
            for (int example = 0; example < kBatch; ++example)
                for (int i = 0; i < kWidth; ++i)
                    lane[example][i] = std::sin(0.7f * static_cast<float>(example * kWidth + i));
    }
    void forward(const Layout& layout, int sign) {
        const auto* weights = reinterpret_cast<const std::byte*>(scratch[static_cast<size_t>(sign)].data());
        for (auto& h : hidden[sign]) {
            float out[kWidth];
            for (int i = 0; i < kWidth; ++i) {
                float sum = layout.value(weights, 1, i);
                for (int j = 0; j < kWidth; ++j)
                    sum += layout.value(weights, 0, i * kWidth + j) * h[j];
                out[i] = std::tanh(sum);
            }
            std::memcpy(h, out, sizeof out);
        }
    }
    double loss(int sign) const {
        double sum = 0;
        for (int example = 0; example < kBatch; ++example)
            for (int i = 0; i < kWidth; ++i) {
                const double difference = hidden[sign][example][i] - 0.1 * (i % 5) + 0.2 * example;
                sum += difference * difference;
            }
        return sum / (kBatch * kWidth);
    }
    std::vector<std::vector<uint8_t>> scratch;
    float hidden[2][kBatch][kWidth] = {};
};

// One visit, as it is put on the compute stream.
struct Kernel {
    Lanes* lanes;
    int block;
    std::byte* weights;
    bool write_back;
    Program program;
    static void run(void* argument) {
        const std::unique_ptr<Kernel> kernel(static_cast<Kernel*>(argument));
        const Layout& layout = layouts()[static_cast<size_t>(kernel->block)];
        uint8_t* const outs[2] = {kernel->lanes->scratch[0].data(), kernel->lanes->scratch[1].data()};
        kernel->program.run(layout, kernel->weights, outs, kernel->write_back);
        for (int sign = 0; sign < 2; ++sign)
            kernel->lanes->forward(layout, sign);
    }
};

using Weights = std::vector<std::vector<std::byte>>;

inline Weights initial_weights() {
    Weights weights;
    for (int block = 0; block < kBlocks; ++block) {
        const Layout& layout = layouts()[static_cast<size_t>(block)];
        weights.emplace_back(layout.num_bytes);
        for (const Segment& segment : layout.segments)
            generate_cpu({.data = weights.back().data() + segment.byte_offset,
                          .dtype = static_cast<DType>(segment.dtype),
                          .numel = segment.numel,
                          .seed = 7,
                          .param = segment.param});
        for (const Segment& segment : layout.segments) { // smaller by an update towards zero
            const float scale = 0.75f;
            update_cpu({.data = weights.back().data() + segment.byte_offset,
                        .dtype = static_cast<DType>(segment.dtype),
                        .numel = segment.numel},
                       scale, 0.0f, 1.0f);
        }
    }
    return weights;
}

struct Outcome {
    std::vector<double> losses; // two a step
    Weights weights;
};

inline float step_coefficient(const Lanes& lanes, Outcome& outcome) {
    const double plus = lanes.loss(0), minus = lanes.loss(1);
    outcome.losses.insert(outcome.losses.end(), {plus, minus});
    return static_cast<float>((plus - minus) / (2.0 * static_cast<double>(kEps)));
}

inline const Outcome& resident_training() {
    static const Outcome outcome = [] {
        Outcome result{{}, initial_weights()};
        Lanes lanes;
        std::vector<float> coefs;
        const int64_t steps = num_steps();
        for (int64_t step = 0; step <= steps; ++step) {
            lanes.begin();
            for (int block = 0; block < kBlocks; ++block)
                Kernel::run(new Kernel{&lanes, block, result.weights[static_cast<size_t>(block)].data(), true,
                                       Program(coefs, std::max<int64_t>(0, step - 1), step, true)});
            if (step < steps)
                coefs.push_back(step_coefficient(lanes, result));
        }
        return result;
    }();
    return outcome;
}

} // namespace small_training
