// A small model trained by ZO steps, its blocks streamed by the copy engine through few slots, against the same
// training with resident weights: every step's losses and the weights at the end must be the same bits. Every transfer
// is delayed at random and poisons its target with NaN first; the journal lags behind; some prefetches are in vain.
// From memory and from a file, for the CPU and for CUDA (test_driver.h), whose compute is asynchronous too.
//
// DISTZO2_STRESS_STEPS is the number of steps of each training (1000; fewer under a sanitizer).
#include "testing.h"

#include <cmath>
#include <optional>

#include "counted_allocations.h"
#include "runtime/device/cpu_device.h"
#include "runtime/engine/copy_engine.h"
#include "small_training.h"
#include "test_driver.h"
#include "test_kernels.h"
#include "watchdog.h"

using namespace distzo2;
using namespace small_training;

namespace {

struct Setting {
    bool cuda;
    bool from_file;
    int num_slots;
    int write_every;
    int max_delay_us;
};

std::shared_ptr<Device> delayed_cpu(int max_delay_us) {
    return std::make_shared<CpuDevice>([max_delay_us](Direction, void* to, const void*, size_t num_bytes) {
        random_delay(max_delay_us);
        std::memset(to, 0xFF, num_bytes);
        random_delay(max_delay_us);
    });
}

// What a step in the steady state makes none of.
struct Made {
    int large_allocations = num_large_allocations;
    size_t mappings = Arena::num_made();
    int events = 0, streams = 0, pins = 0;
    explicit Made(const TestDriver* driver) {
        if (driver != nullptr) {
            events = driver->num_events_created();
            streams = driver->num_streams_created();
            pins = driver->num_registrations();
        }
    }
    bool operator==(const Made&) const = default;
    friend std::ostream& operator<<(std::ostream& out, const Made& made) {
        return out << made.large_allocations << " large allocations, " << made.mappings << " mappings, " << made.events
                   << " events, " << made.streams << " streams, " << made.pins << " pins";
    }
};

Outcome streamed_training(const Setting& setting, const TestDriver* driver, EngineStats& stats) {
    const std::vector<size_t> sizes = block_bytes();
    const size_t slot_bytes = align_up(max_block_bytes(), kPageBytes);
    const Weights initial = initial_weights();
    ScratchDirectory scratch;
    const auto device = setting.cuda ? make_device("cuda:0") : delayed_cpu(setting.max_delay_us);
    auto pool =
        std::make_shared<HostPool>(sizes, device, HostPoolOptions{.pin = setting.cuda, .chunk_bytes = 2 * kPageBytes});
    std::shared_ptr<BlockFile> file;
    for (size_t block = 0; block < sizes.size(); ++block)
        std::memcpy(pool->address(block), initial[block].data(), sizes[block]);

    Slots cpu_slots(setting.num_slots, slot_bytes);
    std::vector<std::byte*> slots = cpu_slots.addresses;
    Stream compute = nullptr;
    std::optional<Mirror> mirror;
    if (setting.cuda) {
        mirror.emplace(*driver, slot_bytes);
        const DeviceGuard guard(*device);
        for (std::byte*& slot : slots) {
            cu::DevicePtr address = 0;
            cu::driver().memory_allocate(&address, slot_bytes);
            slot = reinterpret_cast<std::byte*>(address);
        }
        cu::driver().stream_create(&compute, cu::kStreamNonBlocking, 0);
    }
    std::unique_ptr<CopyEngine> engine;
    if (setting.from_file) {
        file = std::make_shared<BlockFile>(scratch.file("blocks"), sizes, true, std::nullopt,
                                           BlockFileOptions{.part_bytes = kPageBytes});
        for (size_t block = 0; block < sizes.size(); ++block)
            file->write(block, initial[block].data(), sizes[block], 0);
        DiskOptions disk;
        disk.hook = [&setting](Direction direction, int, size_t, std::byte* in_slot, size_t num_bytes) {
            random_delay(setting.max_delay_us);
            if (direction == Direction::kUpload && !setting.cuda)
                std::memset(in_slot, 0xFF, num_bytes);
            random_delay(setting.max_delay_us);
        };
        std::shared_ptr<HostPool> staging;
        if (setting.cuda)
            staging = std::make_shared<HostPool>(std::vector<size_t>(6, kMiB), device,
                                                 HostPoolOptions{.pin = true, .chunk_bytes = 2 * kPageBytes});
        engine = std::make_unique<CopyEngine>(device, file, slots, slot_bytes, staging, disk);
    } else {
        engine = std::make_unique<CopyEngine>(device, *pool, slots, slot_bytes);
    }

    Outcome outcome;
    Lanes lanes;
    std::vector<float> coefs;
    std::vector<int64_t> versions(kBlocks, 0);
    std::minstd_rand random(static_cast<unsigned>(setting.num_slots * 100 + setting.write_every));
    std::optional<Made> made_before;
    coefs.reserve(static_cast<size_t>(num_steps()));
    outcome.losses.reserve(2 * static_cast<size_t>(num_steps()));
    {
        Journal journal(*engine, setting.max_delay_us);
        for (int64_t step = 0; step < num_steps(); ++step) {
            if (step == 10)
                made_before.emplace(driver);
            if (step == 110)
                CHECK_EQ(Made(driver), *made_before);
            lanes.begin();
            for (int block = 0; block < kBlocks; ++block) {
                const int slot = engine->acquire(block, compute);
                for (int ahead = 1; ahead < setting.num_slots; ++ahead)
                    engine->prefetch((block + ahead) % kBlocks); // across the step's end too
                if (random() % 16 == 0)
                    engine->prefetch(static_cast<int>(random() % kBlocks));
                int64_t& version = versions[static_cast<size_t>(block)];
                const bool write_back = version < step && (step + block) % setting.write_every == 0;
                const DeviceGuard guard(*device);
                std::byte* const memory = slots[static_cast<size_t>(slot)];
                const size_t num_bytes = sizes[static_cast<size_t>(block)];
                if (mirror)
                    mirror->load(compute, memory, num_bytes);
                device->call(compute, Kernel::run,
                             new Kernel{&lanes, block, mirror ? mirror->data() : memory, write_back,
                                        Program(coefs, version, step, true)});
                if (mirror && write_back)
                    mirror->store(compute, memory, num_bytes);
                if (write_back)
                    version = step;
                engine->release(block, compute, write_back, version);
            }
            if (setting.cuda) {
                const DeviceGuard guard(*device);
                driver->bare().synchronize(compute);
            }
            coefs.push_back(step_coefficient(lanes, outcome));
            journal.append(step + 1);
        }
    }
    engine->set_durable(num_steps());
    engine->flush();
    for (size_t block = 0; block < sizes.size(); ++block) {
        outcome.weights.emplace_back(pool->address(block), pool->address(block) + sizes[block]);
        if (file)
            file->read(block, outcome.weights[block].data(), sizes[block], 0);
        Program(coefs, versions[block], num_steps(), false)
            .run(layouts()[block], outcome.weights[block].data(), nullptr, true);
    }
    stats = engine->stats();
    engine->close();
    if (setting.cuda) {
        const DeviceGuard guard(*device);
        cu::driver().stream_destroy(compute);
        for (std::byte* slot : slots)
            cu::driver().memory_free(reinterpret_cast<cu::DevicePtr>(slot));
    }
    return outcome;
}

void compare(const Setting& setting) {
    Watchdog::allow(250);
    std::unique_ptr<TestDriver> driver;
    if (setting.cuda) {
        driver = std::make_unique<TestDriver>();
        driver->max_delay_us = setting.max_delay_us;
        driver->max_registration_bytes = 2 * kPageBytes;
    }
    EngineStats stats;
    const Outcome streamed = streamed_training(setting, driver.get(), stats);
    const Outcome& resident = resident_training();
    REQUIRE(streamed.losses.size() == resident.losses.size());
    for (size_t i = 0; i < streamed.losses.size(); ++i)
        REQUIRE(std::isfinite(streamed.losses[i]) && streamed.losses[i] == resident.losses[i], "step ", i / 2,
                ": loss ", streamed.losses[i], " and ", resident.losses[i]);
    for (size_t block = 0; block < streamed.weights.size(); ++block)
        CHECK(streamed.weights[block] == resident.weights[block], "block ", block);
    // The blocks do not fit into the slots, so nearly every visit moves one in; a write-back moves one out.
    const auto visits = static_cast<uint64_t>(num_steps()) * kBlocks;
    CHECK(stats.uploads >= visits / 2, stats.uploads, " uploads in ", visits, " visits");
    CHECK(stats.downloads + stats.recalled_downloads >= visits / (2 * static_cast<uint64_t>(setting.write_every)));
    if (driver) {
        CHECK_EQ(driver->misuse(), "");
        CHECK_EQ(driver->leaks(), TestDriver::kNoLeaks);
    }
}

} // namespace

TEST(the_training_learns) { // else equal bits would say little
    Watchdog::allow(250);
    const std::vector<double>& losses = resident_training().losses;
    double first = 0, last = 0;
    const size_t part = losses.size() / 10;
    for (size_t i = 0; i < part; ++i) {
        first += losses[i];
        last += losses[losses.size() - 1 - i];
    }
    CHECK(last < 0.9 * first, "mean loss ", first / static_cast<double>(part), " -> ",
          last / static_cast<double>(part));
}

TEST(cpu_from_memory) { compare({false, false, 3, 1, 60}); }
TEST(cpu_from_file) { compare({false, true, 3, 1, 60}); }
TEST(cpu_from_file_writing_in_turn) { compare({false, true, 2, 3, 60}); }
TEST(cuda_from_memory) { compare({true, false, 3, 1, 60}); }
TEST(cuda_from_memory_two_slots) { compare({true, false, 2, 2, 60}); }
TEST(cuda_from_file_writing_in_turn) { compare({true, true, 2, 3, 60}); }
TEST(cuda_from_file) { compare({true, true, 3, 1, 60}); }
