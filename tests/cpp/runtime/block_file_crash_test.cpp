// A durable block file after a crash: wherever power fails among its writes, and whatever part of what was not synced
// is left, each block opens at its last committed version or the one that was being committed, with that version's
// bytes.
#include "testing.h"

#include <csignal>

#include <sys/wait.h>

#include "runtime/disk/block_file.h"
#include "runtime_fixture.h"
#include "simulated_disk.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

constexpr size_t kPart = 4096;
const std::vector<size_t> kSizes = {6000, 8192, 5000, 3, 0}; // the first two of one class, and the last three
constexpr const char* kPath = "simulated";

BlockFileOptions on(simulated::Disk& disk) { return {.durable = true, .part_bytes = kPart, .calls = &disk}; }

void write_chunks(BlockFile& file, size_t block, int64_t version) {
    const Arena arena(2 * kPageBytes);
    fill(arena.data(), static_cast<int>(block), version, kSizes[block]);
    for (size_t at = 0; at < kSizes[block]; at += kPart)
        file.write_chunk(block, arena.data() + at, std::min(kPart, kSizes[block] - at), at);
}

// The versions that a program of writes had begun, and had committed, by each length of the disk's log.
struct History {
    struct Mark {
        size_t log_size;
        size_t block;
        int64_t version;
    };
    std::vector<int64_t> initial = std::vector<int64_t>(kSizes.size(), 0);
    std::vector<Mark> begun;
    std::vector<Mark> committed;

    int64_t latest(const std::vector<Mark>& marks, size_t block, size_t log_size) const {
        int64_t version = initial[block];
        for (const Mark& mark : marks)
            if (mark.block == block && mark.log_size <= log_size)
                version = std::max(version, mark.version);
        return version;
    }
};

// Random write-backs, some of which begin while another is being committed.
void run_program(BlockFile& file, simulated::Disk& disk, History& history, unsigned seed, int num_commits) {
    std::mt19937 random(seed);
    std::vector<int64_t> versions;
    for (size_t block = 0; block < kSizes.size(); ++block)
        versions.push_back(file.version(block));
    std::vector<size_t> begun; // beside the one being committed
    const auto begin = [&](size_t block) {
        file.begin_write(block);
        history.begun.push_back({disk.log.size(), block, ++versions[block]});
        write_chunks(file, block, versions[block]);
    };
    const auto commit = [&](size_t block) {
        file.commit(block, versions[block]);
        history.committed.push_back({disk.log.size(), block, versions[block]});
    };
    for (int i = 0; i < num_commits; ++i) {
        const size_t block = random() % kSizes.size();
        begin(block);
        disk.during_sync = [&] {
            const size_t other = block == 0 ? 1 : block == 1 ? 0 : 2 + (block - 1) % 3; // of its class
            if (begun.empty() && random() % 2 == 0) {
                begun.push_back(other);
                begin(other);
            }
        };
        commit(block);
        disk.during_sync = nullptr;
        for (const size_t other : begun)
            commit(other);
        begun.clear();
    }
}

// Opens what a crash left; empty, or what is wrong.
std::string problem_of(simulated::Disk& disk, const History& history, size_t cut,
                       std::vector<int64_t>* found = nullptr) {
    try {
        BlockFile file(kPath, kSizes, false, true, on(disk));
        const Arena arena(4 * kPageBytes);
        for (size_t block = 0; block < kSizes.size(); ++block) {
            const int64_t version = file.version(block);
            if (found != nullptr)
                found->push_back(version);
            if (version < history.latest(history.committed, block, cut) ||
                version > history.latest(history.begun, block, cut))
                return join_text("block ", block, " is at version ", version, ", committed was ",
                                 history.latest(history.committed, block, cut), ", begun ",
                                 history.latest(history.begun, block, cut));
            file.read(block, arena.data(), kSizes[block], 0);
            const size_t first = version == 0
                                     ? kSizes[block]
                                     : first_difference(arena.data(), static_cast<int>(block), version, kSizes[block]);
            if (first != kSizes[block])
                return join_text("block ", block, " differs at byte ", first, " from version ", version);
        }
        if (disk.misaligned)
            return "a direct transfer was not aligned";
    } catch (const std::exception& error) {
        return error.what();
    }
    return "";
}

} // namespace

TEST(power_may_fail_at_any_byte) {
    Watchdog::allow(200);
    size_t num_images = 0;
    size_t num_second_images = 0;
    for (const unsigned seed : {1u, 2u, 3u}) {
        simulated::Disk disk;
        History history;
        std::vector<std::byte> image;
        {
            BlockFile file(kPath, kSizes, true, true, on(disk));
            image = disk.contents();
            disk.log.clear();
            run_program(file, disk, history, seed, 8);
        }
        CHECK(!disk.misaligned);
        int num_problems = 0;
        simulated::for_each_cut(image, disk.log, seed, [&](size_t cut, const std::vector<std::byte>& left) {
            if (num_problems > 2)
                return;
            ++num_images;
            simulated::Disk after(left);
            History second;
            second.initial.clear();
            const std::string problem = problem_of(after, history, cut, &second.initial);
            CHECK(problem.empty(), "seed ", seed, ", cut ", cut, " of ", disk.log.size(), ": ", problem);
            num_problems += problem.empty() ? 0 : 1;
            if (!problem.empty() || num_images % 997 != 0)
                return;
            // And once more: power fails while the file is opened again (and its map repaired), or later.
            simulated::Disk again(left);
            {
                BlockFile file(kPath, kSizes, false, true, on(again));
                run_program(file, again, second, seed + 10, 2);
            }
            simulated::for_each_cut(left, again.log, seed, [&](size_t later, const std::vector<std::byte>& rest) {
                if (num_problems > 2 || ++num_second_images % 5 != 0)
                    return;
                simulated::Disk last(rest);
                const std::string trouble = problem_of(last, second, later);
                CHECK(trouble.empty(), "seed ", seed, ", cut ", cut, ", then ", later, ": ", trouble);
                num_problems += trouble.empty() ? 0 : 1;
            });
        });
    }
    CHECK(num_images > 5000 && num_second_images > 5000, num_images, " ", num_second_images);
    std::cout << "  (" << num_images << " images, " << num_second_images << " after a second crash)\n";
}

// What a crash leaves of a file that is being made is refused, or is a whole file of zeros.
TEST(power_may_fail_while_the_file_is_made) {
    simulated::Disk disk;
    {
        const BlockFile file(kPath, kSizes, true, true, on(disk));
    }
    const std::vector<std::byte> empty(disk.contents().size());
    int num_whole = 0;
    simulated::for_each_cut(empty, disk.log, 1, [&](size_t cut, const std::vector<std::byte>& left) {
        simulated::Disk after(left);
        const std::string problem = problem_of(after, {}, cut);
        num_whole += problem.empty() ? 1 : 0;
        CHECK(problem.empty() || problem.find("header") != std::string::npos, cut, ": ", problem);
    });
    CHECK(num_whole > 0);
}

// Any bit of the header: refused. Of one copy of an entry: nothing is lost, and the copy is mended. Of both: refused.
TEST(flipped_bits_of_the_map_are_mended_or_refused) {
    simulated::Disk disk;
    History history;
    {
        BlockFile file(kPath, kSizes, true, true, on(disk));
        run_program(file, disk, history, 4, 12);
    }
    const std::vector<std::byte> image = disk.contents();
    const size_t end = disk.log.size();
    std::mt19937 random(9);
    const auto flipped = [](std::vector<std::byte> bytes, size_t at, unsigned bit) {
        bytes[at] ^= static_cast<std::byte>(1u << bit % 8);
        return bytes;
    };
    for (size_t at = 0; at < kPageBytes; at += at < 100 ? 1 : 37) {
        simulated::Disk after(flipped(image, at, random()));
        CHECK_TEXT(problem_of(after, history, end), "offset 0");
    }
    for (size_t block = 0; block < kSizes.size(); ++block)
        for (size_t copy = 0; copy < 2; ++copy)
            for (size_t at = 0; at < kPageBytes; at += at < 100 ? 1 : 97) {
                const size_t offset = (1 + 2 * block) * kPageBytes;
                simulated::Disk after(flipped(image, offset + copy * kPageBytes + at, random()));
                CHECK_EQ(problem_of(after, history, end), "");
                CHECK(after.contents() == image, "block ", block, ", copy ", copy, " is not mended");
                simulated::Disk both(flipped(flipped(image, offset + at, random()),
                                             offset + kPageBytes + random() % kPageBytes, random()));
                CHECK_TEXT(problem_of(both, history, end), join_text("entry of block ", block),
                           join_text("offsets ", offset, " and ", offset + kPageBytes));
            }
}

TEST(entries_that_contradict_are_refused) {
    simulated::Disk disk;
    {
        const BlockFile file(kPath, kSizes, true, true, on(disk));
    }
    const BlockLayout layout(kSizes, kPart, true);
    FileId id{};
    CHECK_EQ(check_header(layout, disk.contents().data(), &id), "");
    const auto with_slot = [&](size_t block, uint64_t slot) {
        std::vector<std::byte> image = disk.contents();
        const uint32_t checksums[2] = {};
        for (size_t copy = 0; copy < 2; ++copy)
            write_entry(layout, id, block, {5, 1, slot}, checksums,
                        image.data() + layout.entry_offset[block] + copy * kPageBytes);
        return image;
    };
    const uint64_t taken = layout.first_slot_of_block[0];
    simulated::Disk twice(with_slot(1, taken));
    CHECK_THROWS(BlockFile(kPath, kSizes, false, true, on(twice)), "to blocks 0 and 1");
    simulated::Disk other_class(with_slot(3, taken));
    CHECK_THROWS(BlockFile(kPath, kSizes, false, true, on(other_class)), join_text("block 3 slot ", taken));
    simulated::Disk nowhere(with_slot(0, 1000));
    CHECK_THROWS(BlockFile(kPath, kSizes, false, true, on(nowhere)), "block 0 slot 1000");
    // An entry of another file, as an old one on the same disk would be.
    std::vector<std::byte> image = disk.contents();
    const uint32_t checksums[2] = {};
    write_entry(layout, {id.value + 1}, 0, {9, 9, taken}, checksums, image.data() + layout.entry_offset[0]);
    simulated::Disk foreign(image);
    CHECK_EQ(BlockFile(kPath, kSizes, false, true, on(foreign)).version(0), 0);
}

// A process that is killed, on the real file system.
TEST(killed_processes_lose_no_commit) {
#ifndef __SANITIZE_THREAD__ // which does not survive a fork beside threads
    const ScratchDirectory scratch;
    const std::string path = scratch.file("blocks");
    const std::vector<size_t> sizes = {100000, 300000, 300000};
    std::vector<int64_t> versions(sizes.size(), 0);
    {
        const BlockFile file(path, sizes, true, std::nullopt, {.durable = true});
    }
    std::mt19937 random(3);
    for (int round = 0; round < 6; ++round) {
        int ends[2];
        REQUIRE(pipe(ends) == 0);
        const pid_t child = fork();
        if (child == 0) {
            BlockFile file(path, sizes, false, std::nullopt);
            std::vector<std::byte> memory(300000);
            for (int i = 0;; ++i) {
                const size_t block = static_cast<size_t>(i) % 3;
                const int64_t version = file.version(block) + 1;
                fill(memory.data(), static_cast<int>(block), version, sizes[block]);
                file.write(block, memory.data(), sizes[block], 0, version);
                const int64_t note[2] = {static_cast<int64_t>(block), version};
                if (write(ends[1], note, sizeof note) != sizeof note)
                    _exit(1);
            }
        }
        close(ends[1]);
        int64_t note[2];
        REQUIRE(read(ends[0], note, sizeof note) == sizeof note); // however slow the disk is, some blocks are written
        versions[static_cast<size_t>(note[0])] = note[1];
        sleep_us(static_cast<int>(random() % 40000));
        kill(child, SIGKILL);
        int status = 0;
        waitpid(child, &status, 0);
        CHECK(WIFSIGNALED(status));
        while (read(ends[0], note, sizeof note) == sizeof note)
            versions[static_cast<size_t>(note[0])] = note[1];
        close(ends[0]);
        BlockFile file(path, sizes, false, std::nullopt);
        std::vector<std::byte> memory(300000);
        for (size_t block = 0; block < sizes.size(); ++block) {
            const int64_t version = file.version(block);
            CHECK(version == versions[block] || version == versions[block] + 1, version, " ", versions[block]);
            file.read(block, memory.data(), sizes[block], 0);
            if (version > 0)
                CHECK_EQ(first_difference(memory.data(), static_cast<int>(block), version, sizes[block]), sizes[block]);
            versions[block] = version;
        }
    }
    CHECK(versions[0] > 3);
#endif
}
