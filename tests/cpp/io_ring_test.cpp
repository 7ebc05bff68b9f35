// IoRing: reads end with the right bytes in any order, a wake-up ends a wait, and nothing is written after the ring is
// gone.
#include "testing.h"

#include <fcntl.h>

#include "runtime/io_ring.h"
#include "runtime_fixture.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

std::unique_ptr<IoRing> make_ring(unsigned depth) {
    std::string reason;
    auto ring = IoRing::create(depth, &reason);
    if (!ring) {
        std::cout << "  (" << reason << ")\n"; // a kernel, or a sandbox, without
        CHECK(!reason.empty());
    }
    return ring;
}

struct Source {
    explicit Source(size_t num_bytes) : arena(num_bytes) {
        fill(arena.data(), 1, 1, num_bytes);
        descriptor = open(scratch.file("bytes").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        CHECK(write(descriptor, arena.data(), num_bytes) == static_cast<ssize_t>(num_bytes));
    }
    ~Source() { close(descriptor); }
    ScratchDirectory scratch;
    Arena arena;
    int descriptor;
};

} // namespace

TEST(reads_end_in_any_order_with_their_bytes) {
    const Watchdog watchdog("reads_end_in_any_order_with_their_bytes");
    constexpr size_t kChunk = 65536;
    constexpr size_t kNumChunks = 64;
    const Source source(kChunk * kNumChunks);
    const auto ring = make_ring(5);
    if (!ring)
        return;
    const Arena memory(kChunk * kNumChunks);
    std::vector<int> ended(kNumChunks, 0);
    size_t next = 0;
    size_t num_ended = 0;
    while (num_ended < kNumChunks) {
        while (next < kNumChunks && ring->num_in_flight() < 5) {
            ring->read(source.descriptor, memory.data() + next * kChunk, kChunk, next * kChunk, next);
            ++next;
        }
        ring->submit(true);
        IoRing::Completion completion{};
        while (ring->next(&completion)) {
            CHECK_EQ(completion.result, static_cast<int>(kChunk));
            ++ended[completion.tag];
            ++num_ended;
        }
    }
    CHECK(std::all_of(ended.begin(), ended.end(), [](int count) { return count == 1; }));
    CHECK(std::memcmp(memory.data(), source.arena.data(), kChunk * kNumChunks) == 0);
    CHECK_EQ(ring->num_in_flight(), 0u);
}

TEST(results_are_the_kernels) {
    const Watchdog watchdog("results_are_the_kernels");
    const Source source(10000);
    const auto ring = make_ring(4);
    if (!ring)
        return;
    const Arena memory(65536);
    ring->read(source.descriptor, memory.data(), 20000, 4000, 0); // past the end
    ring->read(source.descriptor, memory.data(), 100, 20000, 1);
    ring->read(-1, memory.data(), 100, 0, 2);
    ring->read(source.descriptor, nullptr, 100, 0, 3);
    int results[4] = {};
    IoRing::Completion completion{};
    for (int num_ended = 0; num_ended < 4;) {
        ring->submit(true);
        while (ring->next(&completion)) {
            results[completion.tag] = completion.result;
            ++num_ended;
        }
    }
    CHECK(results[0] == 6000 && results[1] == 0 && results[2] == -EBADF && results[3] == -EFAULT, results[0], " ",
          results[1], " ", results[2], " ", results[3]);
}

TEST(wake_ends_a_wait) {
    const Watchdog watchdog("wake_ends_a_wait");
    const auto ring = make_ring(2);
    if (!ring)
        return;
    IoRing::Completion completion{};
    for (int i = 0; i < 50; ++i) {
        std::thread waker([&, i] {
            sleep_us(i % 3 == 0 ? 1000 : 0);
            ring->wake();
        });
        ring->submit(true); // before or after the wake-up
        CHECK(!ring->next(&completion));
        waker.join();
    }
}

// A pipe that has nothing to read holds its read back until the ring is being drained.
TEST(the_ring_waits_for_its_reads) {
    const Watchdog watchdog("the_ring_waits_for_its_reads");
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    auto ring = make_ring(2);
    if (ring) {
        std::byte memory[16] = {};
        ring->read(ends[0], memory, sizeof memory, 0, 1);
        ring->submit(false);
        ring->read(ends[0], memory, sizeof memory, 0, 2); // never handed over
        CHECK_EQ(ring->num_in_flight(), 2u);
        std::thread writer([&] {
            sleep_us(30000);
            CHECK(write(ends[1], "0123456789abcdef", 16) == 16);
        });
        ring.reset();
        CHECK(std::memcmp(memory, "0123456789abcdef", 16) == 0); // the kernel wrote before the end, and will not again
        writer.join();
    }
    close(ends[0]);
    close(ends[1]);
}
