// How well transfers hide behind compute, in the time of the simulated driver. CopyEngine is called as the runtime
// calls it, by a host that issues ahead, and every pass changes all blocks. A block needs its slot for upload, compute
// and download if it is released after compute; for upload and download if it is released once perturbed copies are
// made.
#include "testing.h"

#include <cmath>
#include <iomanip>

#include "runtime/engine/copy_engine.h"
#include "simulated_driver.h"

using namespace distzo2;

namespace {

constexpr int kNumBlocks = 12;
constexpr int kNumPasses = 5;
constexpr int64_t kComputeNs = 1'000'000; // of a block, on average

struct Case {
    int num_slots;
    int64_t copy_percent;   // of a copy, up or down, of kComputeNs
    int64_t uneven_percent; // every other block computes so much longer, the rest so much shorter
    double periods[2];      // expected, of kComputeNs: released after compute, and before
};

struct Compute { // a kernel: takes its time, and notes when it ended
    int64_t duration_ns;
    int64_t end_ns = 0;
    static void run(void* argument) {
        auto* const compute = static_cast<Compute*>(argument);
        simulated::spend(compute->duration_ns);
        compute->end_ns = simulated::clock_ns();
    }
};

struct Measured { // of a block, on average from the end of the first pass to that of the last; in kComputeNs
    double period;
    double exposed_wait; // of the compute stream for transfers, as the engine counts it
};

Measured measure(const Case& c, bool release_early) {
    simulated::Driver driver({.abort_on_misuse = true, .copy_ns = kComputeNs * c.copy_percent / 100});
    cu::set_driver(&simulated::Driver::table());
    std::vector<Compute> computes(kNumBlocks * kNumPasses);
    EngineStats stats;
    {
        const auto device = make_device("cuda:0");
        const HostPool pool(std::vector<size_t>(kNumBlocks, kPageBytes), device, HostPoolOptions{.pin = true});
        const DeviceGuard guard(*device);
        std::vector<cu::DevicePtr> addresses(static_cast<size_t>(c.num_slots));
        std::vector<std::byte*> slots;
        for (cu::DevicePtr& address : addresses) {
            cu::driver().memory_allocate(&address, kPageBytes);
            slots.push_back(reinterpret_cast<std::byte*>(address));
        }
        Stream const stream = device->create_stream(false);
        CopyEngine engine(device, pool, slots, kPageBytes);
        for (size_t i = 0; i < computes.size(); ++i) {
            const int block = static_cast<int>(i) % kNumBlocks;
            const auto prefetch_after = [&] {
                for (int ahead = 1; ahead < c.num_slots; ++ahead)
                    if (!engine.prefetch((block + ahead) % kNumBlocks))
                        return;
            };
            engine.acquire(block, stream);
            prefetch_after();
            if (release_early) { // the perturbed copies are made, which takes no time here
                engine.release(block, stream, true, 0);
                prefetch_after();
            }
            computes[i].duration_ns = kComputeNs * (100 + (i % 2 == 0 ? 1 : -1) * c.uneven_percent) / 100;
            device->call(stream, Compute::run, &computes[i]);
            if (!release_early)
                engine.release(block, stream, true, 0);
            if (block == kNumBlocks - 1) { // the losses are read once a step
                device->synchronize_stream(stream);
                stats = engine.stats();
                if (i < kNumBlocks)
                    engine.reset_stats();
            }
        }
        engine.close();
        device->destroy_stream(stream);
        for (cu::DevicePtr address : addresses)
            cu::driver().memory_free(address);
    }
    cu::set_driver(nullptr);
    constexpr int kNumMeasured = kNumBlocks * (kNumPasses - 1);
    CHECK_EQ(stats.hits, uint64_t{kNumMeasured});
    const auto duration_ns = static_cast<double>(computes.back().end_ns - computes[kNumBlocks - 1].end_ns);
    return {duration_ns / kComputeNs / kNumMeasured, stats.stall_s * 1e9 / kComputeNs / kNumMeasured};
}

} // namespace

TEST(a_slot_released_early_takes_the_next_upload_while_its_block_computes) {
    std::cout << "  slots  released  copy  uneven | period  of ideal  exposed wait\n"
              << std::fixed << std::setprecision(3);
    for (const Case& c : {
             Case{2, 100, 0, {1.5, 1.0}}, // (U + C + D) / 2, (U + D) / 2
             Case{3, 100, 0, {1.0, 1.0}},
             Case{2, 120, 0, {1.7, 1.2}},
             Case{3, 120, 0, {1.2, 1.2}},
             Case{2, 100, 50, {1.75, 1.125}}, // one slot always has the longer blocks
             Case{3, 100, 50, {1.125, 1.0}},  // (U + C + D) / 3 has no slack
         })
        for (const bool early : {false, true}) {
            const Measured m = measure(c, early);
            std::cout << "  " << c.num_slots << "      " << (early ? "early" : "late ") << "     " << c.copy_percent
                      << "%  " << std::setw(2) << c.uneven_percent << "%    | " << m.period << "   "
                      << m.period / static_cast<double>(c.copy_percent) * 100 << "     " << m.exposed_wait << '\n';
            CHECK(std::abs(m.period - c.periods[early]) < 0.02, m.period, " and not ", c.periods[early]);
            CHECK(std::abs(m.exposed_wait - (m.period - 1)) < 0.02, m.exposed_wait, " with a period of ", m.period);
        }
}
