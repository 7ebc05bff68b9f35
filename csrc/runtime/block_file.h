// Weights on disk: one preallocated file of blocks, each at a multiple of 4096 bytes, behind a header page that holds a
// magic word and the layout. O_DIRECT where the file system allows it, so that reads go past the page cache straight
// into the (page-aligned) memory given; what is not aligned goes through a small buffer. The file is scratch space of
// one process at a time (it is locked), and is worth nothing without the run that wrote it.
//
//   | header, 4096 | block 0, padded to 4096 | block 1 ...
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/common.h"

namespace distzo2 {

class BlockFile {
  public:
    // With `create`, makes the file (one that is there already must be a block file, and is replaced); without, opens
    // one of the same layout. direct: true demands O_DIRECT, false does without, nothing tries it and falls back.
    // Throws std::runtime_error naming the path and the cause; a file it began to make is removed then.
    BlockFile(std::string path, std::vector<size_t> block_bytes, bool create, std::optional<bool> direct);
    ~BlockFile();
    BlockFile(const BlockFile&) = delete;
    BlockFile& operator=(const BlockFile&) = delete;

    const std::string& path() const { return path_; }
    const std::vector<size_t>& block_bytes() const { return block_bytes_; }

    // Copy bytes [offset, offset + num_bytes) of a block to or from memory: any size, any alignment, from any thread.
    // Aligned parts go directly; the rest through a buffer. With `tail_bytes`, that many bytes of memory after the
    // block's end may be overwritten by a read (its padding), which saves the last page a detour.
    // Throw std::runtime_error naming file, offset and cause.
    void read(size_t block, void* to, size_t num_bytes, size_t offset, size_t tail_bytes = 0) const;
    void write(size_t block, const void* from, size_t num_bytes, size_t offset);
    void sync(); // what was written is on the disk when it returns

    struct Stats {
        bool direct;
        bool preallocated; // false: the file system cannot, and a full disk may still show at a write
        size_t bytes_used;
        size_t bytes_padded; // of the file
        uint64_t bytes_read;
        uint64_t bytes_written;
        std::string fallback; // why not O_DIRECT although it was tried
    };
    Stats stats() const;

    void unlink(); // removes the name; the space is given back with the last holder

  private:
    void allocate();
    bool try_direct();
    void check_header();
    size_t check_range(size_t block, size_t num_bytes, size_t offset) const; // the offset in the file
    void read_plain(void* to, size_t num_bytes, size_t file_offset) const;
    void write_plain(const void* from, size_t num_bytes, size_t file_offset);

    std::string path_;
    std::vector<size_t> block_bytes_;
    std::vector<size_t> offsets_;
    size_t file_bytes_ = 0;
    size_t bytes_used_ = 0;
    int descriptor_ = -1;
    bool direct_ = false;
    bool preallocated_ = true;
    bool unlinked_ = false;
    std::string fallback_;
    std::mutex partial_page_; // held while a page is read, changed in part, and written back
    struct Counters;
    std::unique_ptr<Counters> counters_;
};

} // namespace distzo2
