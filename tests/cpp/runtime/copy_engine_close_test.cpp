// The end of an engine over a durable file: downloads that wait for something are still made, and a failure lets go of
// what others wait for.
#include "testing.h"

#include "faulty_calls.h"
#include "runtime/engine/copy_engine.h"
#include "runtime_fixture.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

constexpr size_t kBytes = 70000;

struct Subject {
    explicit Subject(const std::function<void(Direction, int, size_t)>& hook) {
        file =
            std::make_shared<BlockFile>(scratch.file("blocks"), std::vector<size_t>(3, kBytes), true, std::nullopt,
                                        BlockFileOptions{.durable = true, .part_bytes = kPageBytes, .calls = &calls});
        DiskOptions disk;
        disk.chunk_bytes = 16384;
        disk.hook = [hook](Direction direction, int block, size_t offset, std::byte*, size_t) {
            hook(direction, block, offset);
        };
        engine =
            std::make_unique<CopyEngine>(make_device("cpu"), file, slots.addresses, slots.slot_bytes, nullptr, disk);
        engine->set_durable(100);
    }
    void change(int block, int64_t version) {
        const int slot = engine->acquire(block, nullptr);
        fill(slots.addresses[static_cast<size_t>(slot)], block, version, kBytes);
        engine->release(block, nullptr, true, version);
    }
    bool stored(int block, int64_t version) {
        std::vector<std::byte> memory(kBytes);
        file->read(static_cast<size_t>(block), memory.data(), kBytes, 0);
        return file->version(static_cast<size_t>(block)) == version &&
               first_difference(memory.data(), block, version, kBytes) == kBytes;
    }
    ScratchDirectory scratch;
    FaultyCalls calls;
    Slots slots{3, kBytes};
    std::shared_ptr<BlockFile> file;
    std::unique_ptr<CopyEngine> engine;
};

} // namespace

TEST(close_makes_a_download_that_a_dropped_read_holds_up) {
    const Watchdog watchdog("close_makes_a_download_that_a_dropped_read_holds_up");
    std::atomic<int> num_reads{0};
    Subject subject([&](Direction direction, int, size_t) {
        if (direction == Direction::kUpload && num_reads++ == 0)
            sleep_us(100'000);
    });
    subject.engine->prefetch(0);
    while (num_reads.load() == 0)
        sleep_us(100);
    subject.engine->drop(0);
    subject.change(0, 7);
    subject.engine->close();
    CHECK(subject.stored(0, 7), "version ", subject.file->version(0));
}

TEST(close_makes_a_download_that_the_commit_before_it_holds_up) {
    const Watchdog watchdog("close_makes_a_download_that_the_commit_before_it_holds_up");
    for (int round = 0; round < 20; ++round) {
        std::atomic<int> num_writes{0};
        Subject subject([&](Direction direction, int, size_t) { num_writes += direction == Direction::kDownload; });
        subject.change(1, 5);
        while (num_writes.load() < 5) // its chunks: the next change comes while they are written or committed
            sleep_us(10);
        subject.change(1, 6);
        subject.engine->close();
        CHECK(subject.stored(1, 6), "version ", subject.file->version(1));
    }
}

TEST(a_failed_download_lets_go_of_its_slot_of_the_file) {
    const Watchdog watchdog("a_failed_download_lets_go_of_its_slot_of_the_file");
    Subject subject([](Direction direction, int, size_t offset) {
        if (direction == Direction::kDownload && offset == 16384)
            fail("a write failed");
    });
    subject.change(2, 3);
    CHECK_THROWS(subject.engine->flush(), "a write failed");
    std::vector<std::byte> memory(kBytes);
    fill(memory.data(), 2, 9, kBytes);
    subject.file->write(2, memory.data(), kBytes, 0, 9); // from elsewhere, while the engine is still there
    CHECK(subject.stored(2, 9));
    subject.engine->close();
    CHECK(subject.stored(2, 9));
}
