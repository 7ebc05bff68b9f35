// BlockFile: what is written is read whatever the size, place and alignment, and each failure says file, offset and
// cause.
#include "testing.h"

#include <csignal>
#include <fstream>

#include <fcntl.h>
#include <sys/resource.h>

#include "runtime/block_file.h"
#include "runtime_fixture.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

std::unique_ptr<BlockFile> make_file(const std::string& path, std::vector<size_t> sizes, bool create = true,
                                     std::optional<bool> direct = std::nullopt) {
    return std::make_unique<BlockFile>(path, std::move(sizes), create, direct);
}

std::string contents(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

} // namespace

TEST(any_size_place_and_alignment) {
    const Watchdog watchdog("any_size_place_and_alignment");
    const ScratchDirectory scratch;
    const std::vector<size_t> sizes = {kMiB + 300777, 4096, 1, 12288 + 5, 0};
    std::minstd_rand random(7);
    for (const bool direct : {false, true}) {
        std::unique_ptr<BlockFile> file;
        try {
            file = make_file(scratch.file(direct ? "direct" : "plain"), sizes, true, direct);
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

TEST(blocks_survive_reopening) {
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    const Arena arena(kMiB);
    fill(arena.data(), 1, 2, 10000);
    make_file(path, {5, 10000})->write(1, arena.data(), 10000, 0);
    const auto file = make_file(path, {5, 10000}, false);
    file->read(1, arena.data() + 100000 / 4096 * 4096, 10000, 0);
    CHECK_EQ(first_difference(arena.data() + 100000 / 4096 * 4096, 1, 2, 10000), 10000u);
    CHECK_EQ(file->stats().bytes_used, 10005u);
    CHECK_EQ(file->stats().bytes_padded, 4096u + 4096 + 12288);
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
    make_file(scratch.file("blocks"), {10, 20});
    CHECK_THROWS(make_file(scratch.file("blocks"), {10, 21}, false), "another layout");
    CHECK_EQ(make_file(scratch.file("blocks"), {1})->stats().bytes_used, 1u); // a block file is scratch: replaced
}

TEST(one_run_at_a_time) {
    const ScratchDirectory scratch;
    const auto file = make_file(scratch.file("blocks"), {10});
    CHECK_THROWS(make_file(scratch.file("blocks"), {10}), "in use by another run");
    CHECK_THROWS(make_file(scratch.file("blocks"), {10}, false), "in use by another run");
    CHECK(std::filesystem::file_size(scratch.file("blocks")) == 8192);
}

TEST(too_little_space_is_said_before_writing) {
    const ScratchDirectory scratch;
    const std::string text = testing::thrown_text([&] { make_file(scratch.file("big"), {size_t{1} << 55}); });
    for (const char* part : {"big", "needs 36028797018968064 bytes", "available", "No space left on device"})
        CHECK(text.find(part) != std::string::npos, text);
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
    CHECK(text.find("limited") != std::string::npos && text.find("File too large") != std::string::npos, text);
    CHECK(!std::filesystem::exists(scratch.file("limited")));
}

TEST(truncated_file_is_named_with_its_offset) {
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    const Arena arena(kMiB);
    {
        const auto file = make_file(path, {100000, 5});
        std::filesystem::resize_file(path, 50001);
        const std::string text = testing::thrown_text([&] { file->read(0, arena.data(), 100000, 0); });
        CHECK(text.find(path) != std::string::npos && text.find("truncated") != std::string::npos &&
                  text.find("offset 4096") != std::string::npos,
              text);
        CHECK_THROWS(file->read(1, arena.data(), 5, 0), "truncated");
        file->read(0, arena.data(), 40000, 0); // what is there can be read
    }
    CHECK_THROWS(make_file(path, {100000, 5}, false), "is truncated: 50001 bytes, expected");
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
    std::vector<std::byte> memory(5000);
    fill(memory.data(), 3, 4, 5000);
    file->write(0, memory.data(), 5000, 0);
    std::fill(memory.begin(), memory.end(), std::byte{0});
    file->read(0, memory.data(), 5000, 0);
    CHECK_EQ(first_difference(memory.data(), 3, 4, 5000), 5000u);
    file->unlink();
    file->unlink();
    CHECK(!std::filesystem::exists(path));
}
