// Ranges of files on a disk that fails, falls short or is interrupted: the bytes of the files, or one error that names
// the file, the offset and the cause. What they hold otherwise is tested from Python.
#include "testing.h"

#include <fstream>

#include "faulty_calls.h"
#include "runtime/disk/range_files.h"
#include "runtime_fixture.h"

using namespace distzo2;

namespace {

constexpr size_t kFileBytes = 3 * kMiB + 1234;
const std::vector<std::vector<FileRange>> kBlocks = {{{0, 777, 2 * kMiB + 5, 100}, {0, 3 * kMiB, 1234, 3 * kMiB}}};
const std::vector<size_t> kSizes = {3 * kMiB + 2000};

// A file of pseudo-random bytes, and what its block holds.
struct Subject {
    Subject() : path(scratch.file("weights")), content(kFileBytes), expected(kSizes[0]) {
        fill(content.data(), 0, 1, kFileBytes);
        std::ofstream(path, std::ios::binary)
            .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(kFileBytes));
        for (const FileRange& range : kBlocks[0])
            std::copy_n(content.begin() + static_cast<std::ptrdiff_t>(range.offset), range.num_bytes,
                        expected.begin() + static_cast<std::ptrdiff_t>(range.place));
    }
    ScratchDirectory scratch;
    std::string path;
    FaultyCalls calls;
    std::vector<std::byte> content;
    std::vector<std::byte> expected;
};

} // namespace

TEST(short_and_interrupted_reads_go_on) {
    for (const auto direct : {std::optional<bool>(), std::optional<bool>(false)}) {
        Subject subject;
        RangeFiles files({subject.path}, kSizes, kBlocks, direct, &subject.calls);
        subject.calls.short_transfers = true;
        std::vector<std::byte> found(kSizes[0], std::byte{255});
        files.read(0, found.data(), found.size(), 0);
        CHECK(found == subject.expected);
    }
}

TEST(failed_reads_are_raised_with_their_place) {
    for (const auto direct : {std::optional<bool>(), std::optional<bool>(false)})
        for (const size_t place : {size_t{0}, kMiB, 3 * kMiB}) {
            Subject subject;
            RangeFiles files({subject.path}, kSizes, kBlocks, direct, &subject.calls);
            subject.calls.failing = "read";
            subject.calls.from_offset = place;
            subject.calls.on = true;
            std::vector<std::byte> found(kSizes[0]);
            CHECK_THROWS(files.read(0, found.data(), found.size(), 0), subject.path + ": cannot read ",
                         " bytes at offset ", "Input/output error");
            CHECK_EQ(subject.calls.num_failed.load(), 1);
        }
}

TEST(a_file_that_does_not_open_is_an_error) {
    Subject subject;
    subject.calls.failing = "open";
    subject.calls.error = EMFILE;
    subject.calls.on = true;
    CHECK_THROWS((RangeFiles({subject.path}, kSizes, kBlocks, std::nullopt, &subject.calls)),
                 "weights: cannot be opened: Too many open files");
}
