// CopyEngine's CUDA code over the driver under test (test_driver.h): the same contents whatever the delays, the host
// never blocked, nothing created or pinned in the steady state, nothing left behind, and errors of the driver kept and
// raised.
#include "testing.h"

#include "runtime/engine/copy_engine.h"
#include "test_driver.h"
#include "test_kernels.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

const std::vector<size_t> kSizes = {70000, 4096, 131072, 1, 99999, 65536, 12289};
constexpr size_t kMaxBytes = 131072;

std::atomic<int> num_mismatches{0};

// A kernel on a compute stream: looks at the slot, and perhaps changes it.
struct Kernel {
    std::byte* slot; // its mirror
    int block;
    int64_t expected;
    int64_t next; // or -1
    int delay_us;
    void look() const {
        const size_t num_bytes = kSizes[static_cast<size_t>(block)];
        if (first_difference(slot, block, expected, num_bytes, 89) != num_bytes)
            ++num_mismatches;
    }
    static void begin(void* argument) {
        const auto* kernel = static_cast<Kernel*>(argument);
        kernel->look();
        random_delay(kernel->delay_us);
    }
    static void end(void* argument) {
        const std::unique_ptr<Kernel> kernel(static_cast<Kernel*>(argument));
        if (kernel->next >= 0)
            fill(kernel->slot, kernel->block, kernel->next, kSizes[static_cast<size_t>(kernel->block)]);
        else
            kernel->look(); // changed under the reader?
    }
};

struct Subject {
    Subject(bool from_file, int num_slots, int delay) : max_delay_us(delay) {
        num_mismatches = 0;
        driver.max_delay_us = delay;
        driver.max_registration_bytes = 65536;
        device = make_device("cuda:0");
        pool = std::make_shared<HostPool>(kSizes, device, HostPoolOptions{.pin = true, .chunk_bytes = 65536});
        for (size_t block = 0; block < kSizes.size(); ++block)
            fill(pool->address(block), static_cast<int>(block), 0, kSizes[block]);
        {
            const DeviceGuard guard(*device);
            for (int i = 0; i < num_slots; ++i) {
                cu::DevicePtr address = 0;
                cu::driver().memory_allocate(&address, kMaxBytes);
                slots.push_back(reinterpret_cast<std::byte*>(address));
            }
            for (Stream& stream : streams)
                cu::driver().stream_create(&stream, cu::kStreamNonBlocking, 0);
            for (Stream const stream : {streams[0], streams[1], Stream{nullptr}})
                mirrors[stream] = std::make_unique<Mirror>(driver, kMaxBytes);
        }
        if (from_file) {
            file = std::make_shared<BlockFile>(scratch.file("blocks"), kSizes, true, std::nullopt,
                                               BlockFileOptions{.part_bytes = kPageBytes});
            for (size_t block = 0; block < kSizes.size(); ++block)
                file->write(block, pool->address(block), kSizes[block], 0);
            staging = std::make_shared<HostPool>(std::vector<size_t>(3, 40000), device,
                                                 HostPoolOptions{.pin = true, .chunk_bytes = 16384});
            DiskOptions disk;
            disk.chunk_bytes = 16384;
            disk.hook = [delay](Direction, int, size_t, std::byte*, size_t) { random_delay(delay); };
            engine = std::make_unique<CopyEngine>(device, file, slots, kMaxBytes, staging, disk);
        } else {
            engine = std::make_unique<CopyEngine>(device, *pool, slots, kMaxBytes);
        }
    }
    ~Subject() {
        engine.reset();
        staging.reset();
        synchronize_streams();
        {
            const DeviceGuard guard(*device);
            for (Stream stream : streams)
                cu::driver().stream_destroy(stream);
            for (std::byte* slot : slots)
                cu::driver().memory_free(reinterpret_cast<cu::DevicePtr>(slot));
        }
        pool.reset();
        device.reset();
        CHECK_EQ(driver.leaks(), TestDriver::kNoLeaks);
        CHECK_EQ(driver.misuse(), "");
        CHECK_EQ(num_mismatches.load(), 0);
    }
    void launch(Stream stream, int slot, int block, int64_t expected, int64_t next = -1) {
        const DeviceGuard guard(*device);
        Mirror& mirror = *mirrors.at(stream);
        std::byte* const memory = slots[static_cast<size_t>(slot)];
        const size_t num_bytes = kSizes[static_cast<size_t>(block)];
        auto* const kernel = new Kernel{mirror.data(), block, expected, next, max_delay_us};
        mirror.load(stream, memory, num_bytes);
        device->call(stream, Kernel::begin, kernel);
        if (next < 0)
            mirror.load(stream, memory, num_bytes);
        device->call(stream, Kernel::end, kernel);
        if (next >= 0)
            mirror.store(stream, memory, num_bytes);
    }
    void synchronize_streams() {
        const DeviceGuard guard(*device);
        for (Stream stream : streams)
            device->synchronize_stream(stream);
        device->synchronize_stream(nullptr);
    }
    bool stored(int block, int64_t version) {
        const size_t num_bytes = kSizes[static_cast<size_t>(block)];
        if (file)
            return holds(*file, block, version, num_bytes);
        return first_difference(pool->address(static_cast<size_t>(block)), block, version, num_bytes) == num_bytes;
    }

    TestDriver driver;
    int max_delay_us;
    ScratchDirectory scratch;
    std::shared_ptr<Device> device;
    std::shared_ptr<HostPool> pool;
    std::shared_ptr<HostPool> staging;
    std::shared_ptr<BlockFile> file;
    std::vector<std::byte*> slots;
    Stream streams[2] = {};
    std::map<Stream, std::unique_ptr<Mirror>> mirrors;
    std::unique_ptr<CopyEngine> engine;
};

void stress(bool from_file, int num_slots, int max_delay_us, int num_steps, unsigned seed) {
    if (const char* const at_most = std::getenv("DISTZO2_STRESS_STEPS"))
        num_steps = std::min(num_steps, std::atoi(at_most));
    Subject subject(from_file, num_slots, max_delay_us);
    CopyEngine& engine = *subject.engine;
    std::vector<int64_t> versions(kSizes.size(), 0);
    std::minstd_rand random(seed);
    int64_t step = 0;
    struct Held {
        int block;
        int slot;
        Stream stream;
    };
    std::vector<Held> held;
    for (int i = 0; i < num_steps; ++i) {
        const int block = static_cast<int>(random() % kSizes.size());
        const auto is_block = [block](const Held& one) { return one.block == block; };
        switch (random() % 8) {
        case 0:
        case 1:
        case 2:
            engine.prefetch(block);
            break;
        case 3:
        case 4:
        case 5:
            if (held.size() + 1 < static_cast<size_t>(num_slots) && std::none_of(held.begin(), held.end(), is_block)) {
                Stream const stream = random() % 4 == 0 ? nullptr : subject.streams[random() % 2];
                const int slot = engine.acquire(block, stream);
                subject.launch(stream, slot, block, versions[static_cast<size_t>(block)]);
                held.push_back({block, slot, stream});
                break;
            }
            [[fallthrough]];
        case 6:
            if (!held.empty()) {
                const size_t which = random() % held.size();
                const Held one = held[which];
                held.erase(held.begin() + static_cast<ptrdiff_t>(which));
                int64_t& version = versions[static_cast<size_t>(one.block)];
                const bool dirty = random() % 2 == 0;
                subject.launch(one.stream, one.slot, one.block, version, dirty ? version + 1 : -1);
                version += dirty ? 1 : 0;
                step += dirty ? 1 : 0;
                engine.release(one.block, one.stream, dirty, step);
                if (random() % 2 == 0 || held.empty())
                    engine.set_durable(step);
            }
            break;
        default:
            if (random() % 16 == 0) {
                engine.set_durable(step);
                engine.flush();
            } else if (std::none_of(held.begin(), held.end(), is_block)) {
                engine.drop(block);
            }
            break;
        }
        engine.set_durable(step);
    }
    for (const Held& one : held)
        engine.release(one.block, one.stream, false, 0);
    engine.flush();
    subject.synchronize_streams();
    for (size_t block = 0; block < kSizes.size(); ++block)
        CHECK(subject.stored(static_cast<int>(block), versions[block]), "block ", block);
    // That it was a stress: hits depend on which prefetches were in time (with 2 slots 4 to 7 in 100 steps).
    const EngineStats stats = engine.stats();
    const auto at_least = static_cast<uint64_t>(num_steps / 100);
    CHECK(stats.uploads > 5 * at_least, "uploads ", stats.uploads);
    CHECK(stats.downloads > 2 * at_least, "downloads ", stats.downloads);
    CHECK(stats.hits > at_least, "hits ", stats.hits);
}

} // namespace

TEST(stress_pool) {
    stress(false, 2, 400, 1500, 1);
    stress(false, 4, 400, 1500, 2);
    stress(false, 3, 0, 1500, 3);
}

TEST(stress_file) {
    stress(true, 2, 200, 700, 4);
    stress(true, 4, 200, 700, 5);
}

// Two passes of a training step over every block, with all compute held back: the host runs through.
TEST(host_never_blocks) {
    Subject subject(false, 3, 0);
    Gate gate(subject.driver, subject.streams[0]);
    const int num_blocks = static_cast<int>(kSizes.size());
    subject.engine->prefetch(0);
    for (int i = 0; i < 2 * num_blocks; ++i) {
        const int block = i % num_blocks;
        CHECK(subject.engine->prefetch((block + 1) % num_blocks), "at ", i); // also across the end of a pass
        const int slot = subject.engine->acquire(block, subject.streams[0]);
        subject.launch(subject.streams[0], slot, block, i / num_blocks, i / num_blocks + 1);
        subject.engine->release(block, subject.streams[0], true, 0);
        CHECK(subject.engine->prefetch((block + 2) % num_blocks), "at ", i);
    }
    CHECK(!subject.stored(0, 1));
    gate.open();
    subject.engine->flush();
    for (int block = 0; block < num_blocks; ++block)
        CHECK(subject.stored(block, 2), "block ", block);
    CHECK(subject.engine->stats().stall_s > 0 || subject.engine->stats().wait_s < 1);
}

// Who acquires a block again may change it, but not what a download of it is still reading; and a release on another
// stream than the acquire's does not let the download overtake the upload.
TEST(stored_copies_are_never_torn) {
    Subject subject(false, 2, 3000);
    for (int64_t version = 0; version < 20; version += 2) {
        int slot = subject.engine->acquire(2, subject.streams[0]);
        subject.launch(subject.streams[0], slot, 2, version, version + 1);
        subject.engine->release(2, subject.streams[0], true, 0);
        slot = subject.engine->acquire(2, subject.streams[1]);
        subject.launch(subject.streams[1], slot, 2, version + 1, version + 2);
        subject.engine->flush();
        CHECK(subject.stored(2, version + 1), "version ", version);
        subject.engine->release(2, subject.streams[1], true, 0);
        subject.engine->flush();
        CHECK(subject.stored(2, version + 2), "version ", version);
    }
    for (const int block : {0, 4, 5}) {
        subject.engine->acquire(block, subject.streams[0]);
        subject.engine->release(block, subject.streams[1], true, 0);
        subject.engine->flush();
        CHECK(subject.stored(block, 0), "block ", block);
    }
}

// A caching allocator hands memory out again while a kernel of its last user is queued: no transfer comes before that.
TEST(slots_are_the_engines_once_their_stream_is_done_with_them) {
    for (const bool from_file : {false, true}) {
        Subject subject(from_file, 2, 0);
        Gate gate(subject.driver, subject.streams[0]);
        const auto make = [&] { // with a stream that is held
            if (from_file)
                return std::make_unique<CopyEngine>(subject.device, subject.file, subject.slots, kMaxBytes,
                                                    subject.staging, DiskOptions{}, subject.streams[0]);
            return std::make_unique<CopyEngine>(subject.device, *subject.pool, subject.slots, kMaxBytes,
                                                subject.streams[0]);
        };
        subject.engine = make();
        CHECK(subject.engine->prefetch(0));
        sleep_us(50000);
        CHECK(subject.engine->present().empty());
        gate.open();
        const int slot = subject.engine->acquire(0, subject.streams[1]);
        subject.launch(subject.streams[1], slot, 0, 0);
        subject.engine->release(0, subject.streams[1], false, 0);
        subject.synchronize_streams();
    }
}

// A prefetch is dropped while its upload is held back, the block comes in again through the urgent streams, and is
// changed: the download may not write what the first upload has yet to read.
TEST(a_dropped_upload_still_reads) {
    Subject subject(false, 2, 0);
    CopyEngine& engine = *subject.engine;
    engine.acquire(0, subject.streams[0]);
    Gate gate(subject.driver, subject.streams[0]);
    engine.release(0, subject.streams[0], false, 0);
    engine.acquire(1, subject.streams[1]);
    engine.release(1, subject.streams[1], false, 0);
    CHECK(engine.prefetch(2)); // to the slot of block 0, behind its reader
    engine.drop(2);
    CHECK(engine.prefetch(3));
    const int slot = engine.acquire(2, subject.streams[1]);
    subject.launch(subject.streams[1], slot, 2, 0, 1);
    engine.release(2, subject.streams[1], true, 0);
    {
        const DeviceGuard guard(*subject.device);
        subject.device->synchronize_stream(subject.streams[1]);
    }
    sleep_us(50000);
    CHECK(subject.stored(2, 0));
    gate.open();
    engine.flush();
    CHECK(subject.stored(2, 1));
}

TEST(steady_state_creates_nothing) {
    for (const bool from_file : {false, true}) {
        Subject subject(from_file, 3, 0);
        int events = 0;
        int streams = 0;
        int registrations = 0;
        for (int step = 0; step < 12; ++step) {
            if (step == 2) {
                events = subject.driver.num_events_created();
                streams = subject.driver.num_streams_created();
                registrations = subject.driver.num_registrations();
            }
            for (int block = 0; block < 7; ++block) {
                subject.engine->prefetch((block + 1) % 7);
                const int slot = subject.engine->acquire(block, subject.streams[0]);
                subject.launch(subject.streams[0], slot, block, step, step + 1);
                subject.engine->release(block, subject.streams[0], true, 0);
            }
        }
        subject.engine->flush();
        CHECK_EQ(subject.driver.num_events_created(), events);
        CHECK_EQ(subject.driver.num_streams_created(), streams);
        CHECK_EQ(subject.driver.num_registrations(), registrations);
        CHECK(subject.stored(3, 12));
    }
}

TEST(times_are_on_the_host_clock) {
    Subject subject(false, 2, 500);
    const int64_t begin_ns = now_ns();
    subject.engine->trace(true);
    for (int block = 0; block < 4; ++block) {
        const int slot = subject.engine->acquire(block, subject.streams[0]);
        subject.launch(subject.streams[0], slot, block, 0, 1);
        subject.engine->release(block, subject.streams[0], true, 0);
    }
    subject.engine->flush();
    subject.synchronize_streams();
    const auto events = subject.engine->events();
    const int64_t end_ns = now_ns();
    constexpr int64_t kSlackNs = 5'000'000; // the base's date is as good as a thread's wake-up on a busy machine
    int counts[3] = {};
    for (const TraceEvent& event : events) {
        ++counts[static_cast<int>(event.kind)];
        CHECK(event.start_ns >= begin_ns - kSlackNs && event.start_ns <= event.end_ns &&
              event.end_ns <= end_ns + kSlackNs);
    }
    CHECK(counts[0] == 4 && counts[1] == 4 && counts[2] == 4, counts[0], " ", counts[1], " ", counts[2]);
    CHECK(subject.engine->stats().upload_s > 0 && subject.engine->stats().stall_s > 0);
}

TEST(own_staging_is_pinned_and_freed) {
    Subject subject(true, 2, 0);
    subject.engine.reset();
    subject.driver.max_registration_bytes = SIZE_MAX;
    DiskOptions disk;
    disk.chunk_bytes = 8192;
    subject.engine =
        std::make_unique<CopyEngine>(subject.device, std::move(subject.file), subject.slots, kMaxBytes, nullptr, disk);
    const int slot = subject.engine->acquire(2, subject.streams[1]);
    subject.launch(subject.streams[1], slot, 2, 0);
    subject.engine->release(2, subject.streams[1], false, 0);
    subject.synchronize_streams();
}

// Every call of the driver that an engine makes, failing once at its first, second, ... time: an exception that names
// the call, no hang, nothing left behind.
TEST(each_driver_call_may_fail) {
    Watchdog::allow(120);
    for (const bool from_file : {false, true})
        for (const char* call : {"stream_create", "event_create", "event_record", "stream_wait_event", "copy_to_device",
                                 "copy_to_host", "event_synchronize", "event_query"})
            for (const int after : {0, 1, 5}) {
                Subject subject(from_file, 2, 0);
                subject.engine.reset();
                subject.driver.max_registration_bytes = SIZE_MAX;
                subject.driver.failing_call = call;
                subject.driver.calls_before_failure = after;
                const std::string text = testing::thrown_text([&] {
                    std::unique_ptr<CopyEngine> engine;
                    if (from_file)
                        engine = std::make_unique<CopyEngine>(subject.device, subject.file, subject.slots, kMaxBytes);
                    else
                        engine = std::make_unique<CopyEngine>(subject.device, *subject.pool, subject.slots, kMaxBytes);
                    for (int i = 0; i < 14; ++i) {
                        engine->prefetch((i + 1) % 7);
                        engine->acquire(i % 7, nullptr);
                        engine->release(i % 7, nullptr, true, 0);
                        engine->stats();
                    }
                    engine->flush();
                });
                CHECK(text.empty() || text.find(call) != std::string::npos, call, ": ", text);
                subject.driver.failing_call = "";
            }
}
