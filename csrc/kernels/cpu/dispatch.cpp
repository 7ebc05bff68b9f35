// The CPU entries of kernels.h: picks the instruction set, sets the floating-point environment, and deals ranges of
// elements to threads.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "common/check.h"
#include "kernels/cpu/level.h"
#include "kernels/kernels.h"
#include "kernels/visits.h"

namespace distzo2 {
namespace {

constexpr int64_t kGrain = 16384; // elements: some 15 microseconds of normals on one core

// Rounding to nearest, subnormals kept, exceptions masked: torch.set_flush_denormal and the like must not change the
// bits.
class StandardFloats {
  public:
#if defined(__x86_64__)
    StandardFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~StandardFloats() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#elif defined(__aarch64__)
    StandardFloats() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~StandardFloats() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

  private:
    uint64_t saved_;
#endif
  public:
    StandardFloats(const StandardFloats&) = delete;
    StandardFloats& operator=(const StandardFloats&) = delete;
};

const CpuLevel* compiled_level(SimdLevel level) {
    switch (level) {
    case SimdLevel::kPortable:
        return &kPortableLevel;
    case SimdLevel::kAvx2:
#if defined(DISTZO2_HAVE_AVX2)
        return &kAvx2Level;
#else
        return nullptr;
#endif
    case SimdLevel::kAvx512:
#if defined(DISTZO2_HAVE_AVX512)
        return &kAvx512Level;
#else
        return nullptr;
#endif
    }
    return nullptr;
}

bool processor_has(SimdLevel level) {
    if (level == SimdLevel::kPortable)
        return true;
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks whether the operating system saves the registers.
    if (level == SimdLevel::kAvx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

SimdLevel choose_level() {
    if (const char* name = std::getenv("DISTZO2_SIMD"); name != nullptr && name[0] != '\0') {
        for (SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512})
            if (std::strcmp(name, simd_name(level)) == 0) {
                if (!simd_available(level))
                    throw std::runtime_error(std::string("DISTZO2_SIMD=") + name + ": " +
                                             (compiled_level(level) == nullptr
                                                  ? "these kernels are not in this build"
                                                  : "this processor does not have these instructions"));
                return level;
            }
        throw std::runtime_error(std::string("DISTZO2_SIMD is '") + name + "', expected portable, avx2 or avx512");
    }
    for (SimdLevel level : {SimdLevel::kAvx512, SimdLevel::kAvx2})
        if (simd_available(level))
            return level;
    return SimdLevel::kPortable;
}

constexpr int kUnset = -1;
std::atomic<int> chosen_level{kUnset};

std::atomic<ParallelFor> parallel_for{&run_on_std_threads};

template <class Work>
struct Job {
    const CpuLevel* level;
    const Work* work;
};

template <class Work, auto Member>
void run(const Work& work, int64_t numel) {
    if (numel == 0)
        return;
    Job<Work> job{compiled_level(simd_level()), &work};
    const RangeBody body = [](void* context, int64_t begin, int64_t end) {
        if (begin >= end)
            return;
        const auto& job = *static_cast<const Job<Work>*>(context);
        const StandardFloats guard;
        (job.level->*Member)(*job.work, begin, end);
    };
    parallel_for.load(std::memory_order_relaxed)(0, numel, kGrain, body, &job);
}

} // namespace

void* factor_memory(int64_t num_bytes) {
    struct alignas(64) Line {
        std::byte bytes[64];
    };
    thread_local std::vector<Line> lines;
    lines.resize(std::max(lines.size(), static_cast<size_t>(num_bytes + 63) / sizeof(Line)));
    return lines.data();
}

const char* simd_name(SimdLevel level) {
    switch (level) {
    case SimdLevel::kPortable:
        return "portable";
    case SimdLevel::kAvx2:
        return "avx2";
    case SimdLevel::kAvx512:
        return "avx512";
    }
    return "unknown";
}

bool simd_available(SimdLevel level) { return compiled_level(level) != nullptr && processor_has(level); }

SimdLevel simd_level() {
    int level = chosen_level.load(std::memory_order_relaxed);
    if (level == kUnset) {
        level = static_cast<int>(choose_level());
        chosen_level.store(level, std::memory_order_relaxed);
    }
    return static_cast<SimdLevel>(level);
}

void set_simd_level(SimdLevel level) {
    DZO_CHECK(simd_available(level), simd_name(level), " kernels cannot run here");
    chosen_level.store(static_cast<int>(level), std::memory_order_relaxed);
}

void run_on_std_threads(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
    const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
    const int64_t num_threads = std::min(cores, std::max<int64_t>(1, (end - begin) / grain));
    const int64_t share = (end - begin + num_threads - 1) / num_threads;
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < num_threads; ++t)
        threads.emplace_back(body, context, begin + t * share, std::min(end, begin + (t + 1) * share));
    body(context, begin, std::min(end, begin + share));
    for (std::thread& thread : threads)
        thread.join();
}

void set_parallel_for(ParallelFor hook) {
    parallel_for.store(hook != nullptr ? hook : &run_on_std_threads, std::memory_order_relaxed);
}

void materialize_cpu(const Materialize& visit) {
    check(visit);
    if (visit.num_emits == 0 && (visit.num_updates == 0 || !visit.write_back))
        return;
    int64_t numel = 0;
    for (int64_t s = 0; s < visit.num_segments; ++s)
        numel += visit.segments[s].numel;
    run<Materialize, &CpuLevel::materialize>(visit, numel);
}

void generate_cpu(const InPlace& request) { run<InPlace, &CpuLevel::generate>(request, request.numel); }

void lookup_cpu(const Lookup& request) {
    for (int64_t i = 0; i < request.num_ids; ++i)
        if (request.ids[i] < 0 || request.ids[i] >= request.num_rows)
            throw std::out_of_range("ids[" + std::to_string(i) + "] is " + std::to_string(request.ids[i]) +
                                    ", and the table has " + std::to_string(request.num_rows) + " rows");
    run<Lookup, &CpuLevel::lookup>(request, request.num_ids * request.cols);
}

void decode_cpu(const Decode& request) {
    check(request);
    int64_t numel = 0;
    for (int64_t m = 0; m < request.num_matrices; ++m)
        numel += request.matrices[m].rows * request.matrices[m].cols;
    run<Decode, &CpuLevel::decode>(request, numel);
}

uint64_t checksum_cpu(const void* data, int64_t num_bytes, uint64_t before) {
    struct Words {
        const std::byte* bytes;
        std::atomic<uint64_t> sum{0}; // modulo 2^64, so that the order of the ranges does not matter
    } words{static_cast<const std::byte*>(data)};
    const RangeBody body = [](void* context, int64_t begin, int64_t end) {
        auto& words = *static_cast<Words*>(context);
        uint64_t sum = 0;
        for (int64_t i = begin; i < end; ++i) {
            uint64_t word = 0;
            std::memcpy(&word, words.bytes + 8 * i, sizeof word);
            sum += word * (static_cast<uint64_t>(i) * kChecksumOdd | 1);
        }
        words.sum.fetch_add(sum, std::memory_order_relaxed);
    };
    const int64_t num_words = num_bytes / 8;
    if (num_words > 0)
        parallel_for.load(std::memory_order_relaxed)(0, num_words, kGrain, body, &words);
    uint64_t tail = 0;
    for (int64_t i = num_bytes - 1; i >= 8 * num_words; --i)
        tail = tail << 8 | std::to_integer<uint64_t>(words.bytes[i]);
    return before * kChecksumOdd + words.sum + 3 * tail + static_cast<uint64_t>(num_bytes);
}

void perturb_cpu(const InPlace& place, float scale) { materialize_cpu(PerturbVisit(place, scale).visit); }

void update_cpu(const InPlace& place, float lr, float coef, float weight_decay) {
    materialize_cpu(UpdateVisit(place, lr, coef, weight_decay).visit);
}

} // namespace distzo2
