// Blocks that are ranges of files as they lie there: those of a checkpoint, which are only read, so that a frozen model
// needs no block file. Reads go past the page cache (O_DIRECT) where the file system allows it; since a tensor starts
// anywhere in a page they then go through a buffer of 1 MiB a thread. Any thread may call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runtime/common.h"
#include "runtime/disk/file_calls.h"

namespace distzo2 {

// Bytes [offset, offset + num_bytes) of a file are those of a block from `place` on.
struct FileRange {
    size_t file;
    size_t offset;
    size_t num_bytes;
    size_t place;
};

class RangeFiles {
  public:
    // Each block's ranges ascend in their places and do not overlap; bytes between them are zeros. `direct` as for a
    // BlockFile. Throws std::invalid_argument for ranges that do not fit a block, std::runtime_error naming a file that
    // cannot be opened or is shorter than its ranges.
    RangeFiles(std::vector<std::string> paths, std::vector<size_t> block_bytes,
               std::vector<std::vector<FileRange>> blocks, std::optional<bool> direct = std::nullopt,
               FileCalls* calls = nullptr);
    ~RangeFiles();
    RangeFiles(const RangeFiles&) = delete;
    RangeFiles& operator=(const RangeFiles&) = delete;

    const std::vector<size_t>& block_bytes() const { return block_bytes_; }
    // Copies bytes [offset, offset + num_bytes) of a block to memory. Throws std::runtime_error naming file, offset and
    // cause.
    void read(size_t block, void* to, size_t num_bytes, size_t offset);

    struct Stats {
        bool direct; // of every file
        std::string fallback;
        size_t bytes_used; // of the blocks
        uint64_t bytes_read;
    };
    Stats stats() const;

  private:
    struct File {
        std::string path;
        int descriptor = -1;
        size_t num_bytes = 0;
        bool direct = false;
    };
    void open(File& file, std::optional<bool> direct);
    void check(size_t block) const;
    void read_range(const File& file, std::byte* to, size_t num_bytes, size_t offset) const;
    void read_plain(const File& file, std::byte* to, size_t least_bytes, size_t num_bytes, size_t offset) const;

    FileCalls& calls_;
    std::vector<File> files_;
    std::vector<size_t> block_bytes_;
    std::vector<std::vector<FileRange>> blocks_;
    std::string fallback_;
    mutable std::atomic<uint64_t> bytes_read_{0};
};

} // namespace distzo2
