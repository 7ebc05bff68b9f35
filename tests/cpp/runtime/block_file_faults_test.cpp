// Every fault of a disk, through BlockFile and through an engine over it: one error that names the file, the offset and
// the cause; no hang, and no committed version lost.
#include "testing.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>

#include "faulty_calls.h"
#include "runtime/engine/copy_engine.h"
#include "runtime_fixture.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

const std::vector<size_t> kSizes = {70000, 4096, 131072, 1, 99999, 65536, 12289};
constexpr size_t kMaxBytes = 131072;

std::atomic<int> threads_before_failure{-1}; // of those that this process starts from now on; -1: none fails

int num_descriptors() {
    int count = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
        count += entry.path().empty() ? 0 : 1;
    return count;
}

// A durable file of blocks at version 1, on a disk that may fail, and an engine over it.
struct Subject {
    explicit Subject(int num_slots = 3) : slots(num_slots, kMaxBytes), path(scratch.file("blocks")) {
        file = open(true);
        for (size_t block = 0; block < kSizes.size(); ++block)
            write_block(*file, static_cast<int>(block), 1, kSizes[block]);
        DiskOptions disk;
        disk.chunk_bytes = 16384;
        engine =
            std::make_unique<CopyEngine>(make_device("cpu"), file, slots.addresses, slots.slot_bytes, nullptr, disk);
    }
    std::unique_ptr<BlockFile> open(bool create) {
        return std::make_unique<BlockFile>(
            path, kSizes, create, std::nullopt,
            BlockFileOptions{.durable = true, .part_bytes = kPageBytes, .calls = &calls});
    }
    // Reads every block and changes it, some passes over; what it throws.
    std::string passes(int num_passes = 3) {
        return testing::thrown_text([&] {
            for (int pass = 0; pass < num_passes; ++pass)
                for (int block = 0; block < 7; ++block) {
                    engine->prefetch((block + 1) % 7);
                    const int slot = engine->acquire(block, nullptr);
                    const size_t num_bytes = kSizes[static_cast<size_t>(block)];
                    std::byte* const memory = slots.addresses[static_cast<size_t>(slot)];
                    CHECK_EQ(first_difference(memory, block, 1 + pass, num_bytes), num_bytes);
                    fill(memory, block, 2 + pass, num_bytes);
                    engine->release(block, nullptr, true, 2 + pass);
                    engine->set_durable(2 + pass);
                }
            engine->flush();
        });
    }
    // Lets go of all, opens the file anew on a sound disk, and looks: each block is some version, as a whole.
    std::vector<int64_t> reopened() {
        engine.reset();
        file.reset();
        calls.on = false;
        calls.short_transfers = false;
        const auto again = open(false);
        std::vector<int64_t> versions;
        for (size_t block = 0; block < kSizes.size(); ++block) {
            versions.push_back(again->version(block));
            CHECK(holds(*again, static_cast<int>(block), versions.back(), kSizes[block]), "block ", block);
        }
        return versions;
    }

    ScratchDirectory scratch;
    FaultyCalls calls;
    Slots slots;
    std::string path;
    std::shared_ptr<BlockFile> file;
    std::unique_ptr<CopyEngine> engine;
};

} // namespace

// In place of the C library's for all of this executable.
#ifndef __SANITIZE_THREAD__
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                              void* argument) {
    using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
    static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
    if (threads_before_failure >= 0 && threads_before_failure-- == 0)
        return EAGAIN;
    return create(thread, attributes, start, argument);
}
#endif

TEST(short_and_interrupted_transfers_go_on) {
    Subject subject;
    subject.calls.short_transfers = true;
    CHECK_EQ(subject.passes(), "");
    for (const int64_t version : subject.reopened())
        CHECK_EQ(version, 4);
}

TEST(errors_of_the_disk_are_raised_with_their_place) {
    Watchdog::allow(120);
    struct Fault {
        const char* call;
        int error;
        const char* what;
        const char* cause;
    };
    for (const Fault& fault : {Fault{"read", EIO, "cannot read", "Input/output error (errno 5)"},
                               Fault{"write", EIO, "cannot write", "Input/output error (errno 5)"},
                               Fault{"write", ENOSPC, "cannot write", "No space left on device (errno 28)"},
                               Fault{"write", EROFS, "cannot write", "Read-only file system (errno 30)"},
                               Fault{"sync", EIO, "cannot be synced", "Input/output error (errno 5)"}})
        for (const int after : {0, 1, 2, 3, 5, 20}) {
            if (after == 20 && std::string(fault.call) == "sync")
                continue; // commits share their syncs: there may be no more than two a pass
            Subject subject;
            subject.calls.failing = fault.call;
            subject.calls.error = fault.error;
            subject.calls.after = after;
            subject.calls.on = true;
            const std::string text = subject.passes();
            CHECK_TEXT(text, subject.path, fault.what, "offset ", fault.cause);
            CHECK_EQ(testing::thrown_text([&] { subject.engine->acquire(0, nullptr); }), text); // kept
            CHECK_EQ(testing::thrown_text([&] { subject.engine->flush(); }), text);
            std::vector<int64_t> committed;
            for (size_t block = 0; block < kSizes.size(); ++block)
                committed.push_back(subject.file->version(block));
            const std::vector<int64_t> versions = subject.reopened();
            for (size_t block = 0; block < kSizes.size(); ++block)
                CHECK(versions[block] == committed[block] || versions[block] == committed[block] + 1);
        }
}

// More writers than spare slots of the file: those that wait for one are not left waiting by a failure.
TEST(writers_that_wait_for_a_slot_are_let_go) {
    constexpr size_t kNumBytes = 65536;
    const std::vector<size_t> sizes(8, kNumBytes);
    for (const bool durable : {false, true})
        for (const int after : {0, 1, 2, 3, 5, 9, 14, 22, 31}) {
            const ScratchDirectory scratch;
            FaultyCalls calls;
            const auto file = std::make_shared<BlockFile>(
                scratch.file("blocks"), sizes, true, std::nullopt,
                BlockFileOptions{.durable = durable, .part_bytes = kPageBytes, .calls = &calls});
            const Slots slots(9, kNumBytes);
            DiskOptions disk;
            disk.num_writers = 8;
            disk.chunk_bytes = 8192;
            disk.hook = [](Direction, int, size_t, std::byte*, size_t) { random_delay(300); };
            CopyEngine engine(make_device("cpu"), file, slots.addresses, slots.slot_bytes, nullptr, disk);
            calls.failing = "write";
            calls.from_offset = BlockLayout(sizes, kPageBytes, durable).slots_offset; // the map stays well
            calls.after = after;
            calls.on = true;
            const std::string text = testing::thrown_text([&] {
                for (int pass = 0; pass < 3; ++pass) {
                    for (int block = 0; block < 8; ++block)
                        engine.acquire(block, nullptr);
                    for (int block = 0; block < 8; ++block)
                        engine.release(block, nullptr, true, 1);
                    engine.set_durable(1);
                }
                engine.flush();
            });
            CHECK_TEXT(text, "cannot write", "offset ", "Input/output error");
            engine.close();
            calls.on = false;
            std::vector<std::byte> memory(kNumBytes);
            for (size_t block = 0; block < 8; ++block) // and no slot is lost
                file->write(block, memory.data(), kNumBytes, 0, 9);
            file->verify();
        }
}

TEST(a_map_that_failed_is_left_alone) {
    Subject subject;
    subject.calls.failing = "sync";
    subject.calls.on = true;
    const auto write = [&] { write_block(*subject.file, 0, 2, kSizes[0]); };
    CHECK_THROWS(write(), "cannot be synced");
    subject.calls.on = false;
    CHECK_THROWS(write(), "cannot be synced"); // a sync that works now says nothing of what was lost then
    CHECK_EQ(subject.file->version(0), 1);
    CHECK(holds(*subject.file, 0, 1, kSizes[0]));
    CHECK_THROWS(subject.file->begin_write(1), "cannot be synced");
}

TEST(damage_is_an_error_of_acquire) {
    for (const bool truncated : {false, true}) {
        Subject subject;
        const size_t offset = offset_in_file(subject.path, 2, 1) + 100000;
        if (truncated) {
            std::filesystem::resize_file(subject.path, offset);
        } else {
            const int raw = ::open(subject.path.c_str(), O_RDWR);
            char byte = 0;
            CHECK(pread(raw, &byte, 1, static_cast<off_t>(offset)) == 1);
            byte = static_cast<char>(byte ^ 1);
            CHECK(pwrite(raw, &byte, 1, static_cast<off_t>(offset)) == 1);
            ::close(raw);
        }
        const std::string text = testing::thrown_text([&] { subject.engine->acquire(2, nullptr); });
        if (truncated)
            CHECK_TEXT(text, subject.path, "is truncated: wanted ", "offset ", "got ");
        else
            CHECK_TEXT(text, subject.path, "bytes 98304 to 102400 of block 2", "checksum 0x", "expected 0x",
                       join_text("offset ", offset - 100000 + 98304));
        CHECK_EQ(testing::thrown_text([&] { subject.engine->flush(); }), text);
    }
}

TEST(a_file_that_cannot_be_made_leaves_nothing) {
    const int before = num_descriptors();
    struct Fault {
        const char* call;
        int error;
        const char* text;
    };
    for (const Fault& fault :
         {Fault{"open", EROFS, "cannot be opened: Read-only file system"}, Fault{"open", EACCES, "Permission denied"},
          Fault{"truncate", EIO, "cannot be truncated: Input/output error"},
          Fault{"allocate", ENOSPC, "No space left on device"}, Fault{"write", ENOSPC, "at offset 4096: No space left"},
          Fault{"sync", EIO, "cannot be synced"}, Fault{"sync_directory", EIO, "its directory cannot be synced"}}) {
        const ScratchDirectory scratch;
        const std::string path = scratch.file("blocks");
        FaultyCalls calls;
        calls.failing = fault.call;
        calls.error = fault.error;
        calls.on = true;
        const std::string text = testing::thrown_text(
            [&] { BlockFile(path, kSizes, true, std::nullopt, {.durable = true, .calls = &calls}); });
        CHECK_TEXT(text, path, fault.text);
        CHECK_EQ(calls.num_failed.load(), 1);
        CHECK(!std::filesystem::exists(path), fault.call);
    }
    // Without preallocation the disk may be full later: then that is an error, and the block is what it was.
    const ScratchDirectory scratch;
    FaultyCalls calls;
    calls.failing = "allocate";
    calls.error = EOPNOTSUPP;
    calls.on = true;
    {
        BlockFile file(scratch.file("blocks"), kSizes, true, std::nullopt, {.durable = true, .calls = &calls});
        CHECK(!file.stats().preallocated);
        calls.failing = "write";
        calls.error = ENOSPC;
        std::vector<std::byte> memory(kMaxBytes);
        CHECK_THROWS(file.write(2, memory.data(), kSizes[2], 0, 5), "No space left on device (errno 28)");
        calls.on = false;
        CHECK_EQ(file.version(2), 0);
        file.write(2, memory.data(), kSizes[2], 0, 5);
        CHECK_EQ(file.version(2), 5);
    }
    CHECK_EQ(num_descriptors(), before);
}

TEST(a_thread_that_does_not_start_is_an_error) {
#ifndef __SANITIZE_THREAD__ // which starts threads its own way
    Subject subject;
    DiskOptions disk;
    subject.engine.reset();
    const int before = num_descriptors();
    const auto engine = [&] {
        return CopyEngine(make_device("cpu"), subject.file, subject.slots.addresses, subject.slots.slot_bytes, nullptr,
                          disk);
    };
    for (const int num_started : {0, 1, 2}) {
        threads_before_failure = num_started;
        const std::string text = testing::thrown_text([&] { engine(); });
        threads_before_failure = -1;
        CHECK_TEXT(text, subject.path, "cannot start a thread", "Resource temporarily unavailable");
    }
    CHECK_EQ(num_descriptors(), before);
    engine();
    const HostPool pool({4096, 4096}, make_device("cpu"), {});
    const Slots slots(2, 4096);
    for (const int num_started : {0, 1, 2}) { // the streams of an engine over memory
        threads_before_failure = num_started;
        const std::string text =
            testing::thrown_text([&] { CopyEngine(make_device("cpu"), pool, slots.addresses, slots.slot_bytes); });
        threads_before_failure = -1;
        CHECK_TEXT(text, "device 'cpu'", "cannot start a thread", "Resource temporarily unavailable");
    }
#endif
}

// Closing an engine in the midst of its reads: nobody writes to the slots afterwards.
TEST(nothing_is_read_after_close) {
    for (int round = 0; round < 10; ++round) {
        Subject subject;
        subject.engine->prefetch(2);
        subject.engine->prefetch(0);
        sleep_us(round * 30);
        subject.engine->close();
        for (std::byte* slot : subject.slots.addresses)
            std::memset(slot, 0xFF, kMaxBytes);
        sleep_us(1000);
        for (const std::byte* slot : subject.slots.addresses)
            CHECK(std::all_of(slot, slot + kMaxBytes, [](std::byte byte) { return byte == std::byte{0xFF}; }));
    }
}
