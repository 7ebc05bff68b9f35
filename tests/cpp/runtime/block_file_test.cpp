// BlockFile: what is written is read whatever the size, place and alignment; transactions replace a block whole; each
// failure says file, offset and cause. What a crash leaves is block_file_crash_test.cpp's subject.
#include "testing.h"

#include <csignal>
#include <fstream>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "runtime/disk/block_file.h"
#include "runtime_fixture.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

std::unique_ptr<BlockFile> make_file(const std::string& path, std::vector<size_t> sizes, bool create = true,
                                     std::optional<bool> direct = std::nullopt, const BlockFileOptions& options = {}) {
    return std::make_unique<BlockFile>(path, std::move(sizes), create, direct, options);
}

const BlockFileOptions kDurable{.durable = true};
constexpr size_t kPart = 4096; // of small files: several parts a block
const BlockFileOptions kSmallParts{.durable = true, .part_bytes = kPart};

std::string contents(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

// Reads that stand still while `hold` is set.
struct HeldReads final : FileCalls {
    std::atomic<bool> hold{false};
    std::atomic<int> num_held{0};
    ssize_t read(int descriptor, void* to, size_t num_bytes, size_t offset) override {
        if (hold)
            ++num_held;
        while (hold)
            sleep_us(100);
        return FileCalls::read(descriptor, to, num_bytes, offset);
    }
};

} // namespace

TEST(any_size_place_and_alignment) {
    const ScratchDirectory scratch;
    const std::vector<size_t> sizes = {kMiB + 300777, 4096, 1, 12288 + 5, 0};
    std::minstd_rand random(7);
    for (const bool direct : {false, true}) {
        std::unique_ptr<BlockFile> file;
        try {
            file = make_file(scratch.file(direct ? "direct" : "plain"), sizes, true, direct, {.durable = direct});
        } catch (const std::runtime_error& error) {
            std::cout << "  (" << error.what() << ")\n"; // a file system without O_DIRECT
            continue;
        }
        CHECK_EQ(file->stats().direct, direct);
        std::vector<std::vector<std::byte>> shadow;
        for (const size_t num_bytes : sizes)
            shadow.emplace_back(num_bytes);
        const Arena arena(8 * kMiB);
        for (int round = 0; round < 120; ++round) {
            const size_t block = random() % sizes.size();
            const bool whole = random() % 4 == 0;
            const size_t offset = whole || sizes[block] == 0 ? 0 : random() % sizes[block];
            const size_t num_bytes = whole ? sizes[block] : random() % (sizes[block] - offset + 1);
            std::byte* const memory = arena.data() + (random() % 2 == 0 ? 0 : random() % 5000);
            if (round % 2 == 0) {
                for (size_t i = 0; i < num_bytes; ++i)
                    memory[i] = static_cast<std::byte>(i * 31 + static_cast<size_t>(round));
                std::copy(memory, memory + num_bytes, shadow[block].begin() + static_cast<ptrdiff_t>(offset));
                file->write(block, memory, num_bytes, offset);
            } else {
                std::memset(memory, 0xEE, num_bytes + 1);
                file->read(block, memory, num_bytes, offset);
                CHECK(std::equal(memory, memory + num_bytes, shadow[block].begin() + static_cast<ptrdiff_t>(offset)),
                      "block ", block, " offset ", offset, " bytes ", num_bytes);
                CHECK(memory[num_bytes] == std::byte{0xEE}, "read past its end");
            }
        }
        file->sync();
    }
}

TEST(durable_files_can_be_opened_again) {
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    const Arena arena(kMiB);
    fill(arena.data(), 1, 2, 10000);
    {
        const auto file = make_file(path, {5, 10000}, true, std::nullopt, kDurable);
        CHECK_EQ(file->version(1), 0);
        file->write(1, arena.data(), 10000, 0, 7);
        CHECK_EQ(file->version(1), 7);
        file->write(1, arena.data() + 100, 100, 100); // and the rest of it is copied
        CHECK_EQ(file->version(1), 7);
    }
    const auto file = make_file(path, {5, 10000}, false);
    CHECK_EQ(file->version(0), 0);
    CHECK_EQ(file->version(1), 7);
    std::memset(arena.data(), 0xFF, 20000);
    file->read(1, arena.data(), 10000, 0);
    CHECK_EQ(first_difference(arena.data(), 1, 2, 10000), 10000u);
    file->read(0, arena.data(), 5, 0); // never written
    CHECK(std::all_of(arena.data(), arena.data() + 5, [](std::byte byte) { return byte == std::byte{0}; }));
    CHECK_EQ(file->verify(), 10005u);
    const BlockFile::Stats stats = file->stats();
    CHECK(stats.durable);
    CHECK_EQ(stats.bytes_used, 10005u);
    CHECK_EQ(stats.spare_slots, 2u);
    CHECK_EQ(stats.bytes_padded, 4096u + 2 * 2 * 4096 + 2 * 4096 + 2 * 12288); // header, map, slots of two classes
    CHECK_EQ(std::filesystem::file_size(path), stats.bytes_padded);
}

TEST(scratch_files_end_with_their_process) {
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    {
        const auto file = make_file(path, {5, 10000});
        file->write(0, "abcde", 5, 0, 3);
        CHECK_EQ(file->version(0), 3);
        CHECK(!file->stats().durable && file->stats().syncs == 0 && file->stats().map_bytes_written == 0);
        CHECK_EQ(file->stats().bytes_padded, 4096u + 2 * 4096 + 2 * 12288);
    }
    CHECK_THROWS(make_file(path, {5, 10000}, false), "is a scratch file");
}

TEST(sizes_that_are_alike_share_their_spare_slots) {
    const ScratchDirectory scratch;
    std::vector<size_t> sizes;
    for (size_t i = 0; i < 10; ++i)
        sizes.push_back(kMiB - i * 10000);
    const auto file = make_file(scratch.file("blocks"), sizes);
    CHECK_EQ(file->stats().spare_slots, 3u);
    for (int version = 1; version < 4; ++version)
        for (int block = 0; block < 10; ++block)
            write_block(*file, block, version, sizes[static_cast<size_t>(block)]);
    for (int block = 0; block < 10; ++block)
        CHECK(holds(*file, block, 3, sizes[static_cast<size_t>(block)]), "block ", block);
}

TEST(a_transaction_replaces_a_block_whole_or_not_at_all) {
    const ScratchDirectory scratch;
    for (const bool durable : {false, true}) {
        BlockFileOptions options = kSmallParts;
        options.durable = durable;
        HeldReads calls;
        options.calls = &calls;
        const auto file = make_file(scratch.file("blocks"), {10000, 5000}, true, std::nullopt, options);
        const Arena arena(kMiB);
        std::byte* const seen = arena.data() + kMiB / 2;
        write_block(*file, 0, 1, 10000);
        fill(arena.data(), 0, 2, 10000);
        file->begin_write(0);
        file->write_chunk(0, arena.data() + 2 * kPart, 10000 - 2 * kPart, 2 * kPart);
        CHECK_THROWS(file->write_chunk(0, arena.data(), 100, 0), "whole parts");
        CHECK_THROWS(file->write_chunk(0, arena.data(), kPart, 100), "whole parts");
        CHECK_THROWS(file->commit(0, 2), "1 of its 3 parts");
        CHECK(holds(*file, 0, 1, 10000));
        file->write_chunk(0, arena.data(), 2 * kPart, 0);
        CHECK(holds(*file, 0, 1, 10000));
        CHECK_EQ(file->version(0), 1);
        file->commit(0, 2);
        CHECK(holds(*file, 0, 2, 10000));
        CHECK_EQ(file->version(0), 2);
        for (int i = 0; i < 5; ++i) { // its slot is to spare again
            file->begin_write(0);
            file->write_chunk(0, arena.data(), kPart, 0);
            file->abandon(0);
        }
        file->abandon(0);
        CHECK(holds(*file, 0, 2, 10000));
        CHECK_THROWS(file->commit(0, 3), "commit of block 0");
        CHECK_THROWS(file->write_chunk(0, arena.data(), kPart, 0), "in no transaction");
        // What is being read is not overwritten, however often the block is replaced.
        calls.hold = true;
        std::thread reader([&] { file->read(0, seen, 10000, 0); });
        while (calls.num_held == 0)
            sleep_us(100);
        fill(arena.data(), 0, 3, 10000);
        std::thread writer([&] { // with one spare slot, the second write waits for the reader
            for (int version = 3; version < 6; ++version)
                file->write(0, arena.data(), 10000, 0, version);
        });
        while (file->version(0) < 3)
            sleep_us(100);
        sleep_us(20000);
        CHECK_EQ(file->version(0), 3);
        calls.hold = false;
        reader.join();
        CHECK_EQ(first_difference(seen, 0, 2, 10000), 10000u);
        writer.join();
        CHECK(holds(*file, 0, 3, 10000));
        CHECK_EQ(file->version(0), 5);
    }
}

TEST(commits_of_several_threads_share_their_syncs) {
    const ScratchDirectory scratch;
    const std::vector<size_t> sizes(8, 20000);
    const auto file = make_file(scratch.file("blocks"), sizes, true, std::nullopt, kSmallParts);
    std::vector<std::thread> threads;
    constexpr int kNumVersions = 30;
    for (int thread = 0; thread < 4; ++thread)
        threads.emplace_back([&file, thread] {
            std::vector<std::byte> memory(20000);
            for (int version = 1; version <= kNumVersions; ++version)
                for (const int block : {thread, thread + 4}) {
                    write_block(*file, block, version, 20000);
                    file->read(static_cast<size_t>((block + 1) % 8), memory.data(), 20000, 0);
                }
        });
    for (std::thread& thread : threads)
        thread.join();
    for (int block = 0; block < 8; ++block)
        CHECK(file->version(static_cast<size_t>(block)) == kNumVersions && holds(*file, block, kNumVersions, 20000));
    CHECK(file->stats().syncs <= 2 * 8 * kNumVersions + 2, file->stats().syncs);
}

TEST(a_flipped_bit_in_a_block_is_named) {
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    const std::vector<size_t> sizes = {3 * kMiB + 5, 10000};
    std::vector<std::byte> memory(sizes[0]);
    for (const bool durable : {false, true}) {
        const auto file = make_file(path, sizes, true, std::nullopt, {.durable = durable});
        for (int block = 0; block < 2; ++block)
            write_block(*file, block, 1, sizes[static_cast<size_t>(block)]);
        for (const size_t place : {size_t{0}, kMiB - 1, kMiB, 2 * kMiB + 77777, 3 * kMiB + 4}) {
            const size_t offset = offset_in_file(path, 0, 1);
            const auto flip = [&] {
                std::fstream raw(path, std::ios::in | std::ios::out | std::ios::binary);
                raw.seekg(static_cast<std::streamoff>(offset + place));
                const char byte = static_cast<char>(raw.get() ^ 0x10);
                raw.seekp(static_cast<std::streamoff>(offset + place));
                raw.put(byte);
            };
            flip();
            const size_t part = place / kMiB * kMiB;
            CHECK_THROWS(file->read(0, memory.data(), sizes[0], 0), path, join_text("bytes ", part, " to "),
                         "of block 0", join_text("at offset ", offset + part), "checksum 0x", "expected 0x");
            CHECK_THROWS(file->verify(), "of block 0");
            file->read(1, memory.data(), sizes[1], 0); // the others are well
            flip();
            file->read(0, memory.data(), sizes[0], 0);
        }
    }
}

TEST(other_files_are_refused_and_left) {
    const ScratchDirectory scratch;
    const std::string notes = scratch.file("notes");
    std::ofstream(notes) << "not weights";
    CHECK_THROWS(make_file(notes, {10}), "is no block file");
    CHECK_EQ(contents(notes), "not weights");
    CHECK_THROWS(make_file(notes, {10}, false), "no block file's header");
    CHECK_EQ(contents(notes), "not weights");
    CHECK_THROWS(make_file(scratch.file(""), {10}), "no regular file");
    CHECK_THROWS(make_file(scratch.file("no/such/place"), {10}), "No such file or directory");
    CHECK_THROWS(make_file(scratch.file("absent"), {10}, false), "No such file or directory");
    make_file(scratch.file("blocks"), {10, 20}, true, std::nullopt, kDurable);
    CHECK_THROWS(make_file(scratch.file("blocks"), {10, 21}, false), "another layout");
    CHECK_THROWS(make_file(scratch.file("blocks"), {10, 20}, false, std::nullopt, kSmallParts), "another layout");
    CHECK_THROWS(make_file(scratch.file("blocks"), {size_t{1} << 55}), "No space left"); // and it is still there
    CHECK_EQ(make_file(scratch.file("blocks"), {10, 20}, false)->stats().bytes_used, 30u);
    CHECK_EQ(make_file(scratch.file("blocks"), {1})->stats().bytes_used, 1u); // a block file is replaced
    std::ofstream(notes) << "distzo2 blocks1";
    CHECK_THROWS(make_file(notes, {10}, false), "no block file's header at offset 0");
    std::ofstream(notes) << "distzo2 blocks1" << std::string(8192, '\0');
    CHECK_THROWS(make_file(notes, {10}, false), "another version of the format");
}

TEST(one_run_at_a_time) {
    const ScratchDirectory scratch;
    const auto file = make_file(scratch.file("blocks"), {10});
    CHECK_THROWS(make_file(scratch.file("blocks"), {10}), "in use by another run");
    CHECK_THROWS(make_file(scratch.file("blocks"), {10}, false), "in use by another run");
    CHECK(std::filesystem::file_size(scratch.file("blocks")) == 3 * 4096);
}

// A run is killed, and a worker that it forked lives on: neither the lock nor the space may stay with it.
TEST(a_forked_child_lets_go_of_the_file) {
#ifndef __SANITIZE_THREAD__ // which does not survive a fork beside threads
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    int told[2], held[2];
    REQUIRE(pipe(told) == 0 && pipe(held) == 0);
    const pid_t run = fork();
    if (run == 0) {
        close(held[1]);
        const auto file = make_file(path, {10, 5000}, true, std::nullopt, kDurable);
        if (fork() == 0) { // the worker
            char byte = 0;
            const std::string text = testing::thrown_text([&] { file->read(0, &byte, 1, 0); });
            file->stats();
            if (write(told[1], text.data(), text.size()) < 0)
                _exit(1);
            close(told[1]);
            [[maybe_unused]] const ssize_t ended = read(held[0], &byte, 1); // until the test lets it go
            _exit(0);
        }
        close(told[1]);
        sleep_us(60'000'000);
        _exit(1);
    }
    close(told[1]);
    close(held[0]);
    char text[1000] = {};
    REQUIRE(read(told[0], text, sizeof text - 1) > 0);
    CHECK_TEXT(text, "belongs to the process that opened it, and this is a forked child");
    CHECK_THROWS(make_file(path, {10, 5000}, false), "in use by another run"); // the run itself has it still
    kill(run, SIGKILL);
    int status = 0;
    CHECK(waitpid(run, &status, 0) == run && WIFSIGNALED(status));
    CHECK_EQ(make_file(path, {10, 5000}, false)->stats().bytes_used, 5010u);
    close(held[1]);
    close(told[0]);
#endif
}

TEST(too_little_space_is_said_before_writing) {
    const ScratchDirectory scratch;
    CHECK_THROWS(make_file(scratch.file("big"), {size_t{1} << 55}), "big", "needs 72057594037932032 bytes", "available",
                 "No space left on device");
    CHECK(!std::filesystem::exists(scratch.file("big")));
}

TEST(failed_preallocation_leaves_nothing) {
    const ScratchDirectory scratch;
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    getrlimit(RLIMIT_FSIZE, &before);
    const rlimit small{kMiB, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    const std::string text = testing::thrown_text([&] { make_file(scratch.file("limited"), {4 * kMiB}); });
    setrlimit(RLIMIT_FSIZE, &before);
    CHECK_TEXT(text, "limited", "File too large");
    CHECK(!std::filesystem::exists(scratch.file("limited")));
}

TEST(truncated_file_is_named_with_its_offset) {
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    const Arena arena(kMiB);
    {
        const auto file = make_file(path, {100000, 5}, true, std::nullopt, kDurable);
        std::filesystem::resize_file(path, 70001);
        CHECK_THROWS(file->read(0, arena.data(), 100000, 0), path, "truncated",
                     "offset 20480"); // after the header and two entries, two copies each
        CHECK_THROWS(file->read(1, arena.data(), 5, 0), "truncated");
        file->read(0, arena.data(), 40000, 0); // what is there can be read
    }
    CHECK_THROWS(make_file(path, {100000, 5}, false), "is truncated: 70001 bytes, expected");
    std::filesystem::resize_file(path, 100);
    CHECK_THROWS(make_file(path, {100000, 5}, false), "no block file's header at offset 0: it is 100 bytes long");
}

TEST(ranges_are_checked) {
    const ScratchDirectory scratch;
    const auto file = make_file(scratch.file("blocks"), {10});
    char memory[16] = {};
    CHECK_THROWS(file->read(1, memory, 1, 0), "no block 1");
    CHECK_THROWS(file->read(0, memory, 11, 0), "which has 10");
    CHECK_THROWS(file->write(0, memory, 1, 10), "which has 10");
    CHECK_THROWS(file->write(0, memory, 2, SIZE_MAX), "which has 10");
    file->write(0, memory, 0, 10);
}

TEST(falls_back_where_direct_is_refused) {
    // A tmpfs, where there is one, may refuse O_DIRECT (before Linux 6.6): then it is said, and all works the same.
    if (!std::filesystem::exists("/dev/shm"))
        return;
    const std::string path = "/dev/shm/distzo2-test-" + std::to_string(getpid());
    const auto file = make_file(path, {5000});
    CHECK(file->stats().direct || !file->stats().fallback.empty());
    write_block(*file, 0, 4, 5000);
    CHECK(holds(*file, 0, 4, 5000));
    file->unlink();
    file->unlink();
    CHECK(!std::filesystem::exists(path));
}
