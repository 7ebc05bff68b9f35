// Weights on disk: one preallocated file of blocks (block_layout.h has its format). It is read and written with
// O_DIRECT where the file system allows that, past the page cache, straight from and to page-aligned memory; other
// memory goes through a small buffer. Reads of whole parts are checked against their checksums.
//
// A block is replaced by a transaction: its new bytes go to a spare slot, and commit() makes them the block. In a
// durable file that is, in this order:
//
//   1 sync: the bytes are on the disk        3 sync: now it is committed, and the old slot is spare
//   2 the entry's first copy is written      4 the entry's second copy is written; the sync of the next commit covers
//   it
//
// So at any instant one copy of the entry is whole, and names a slot whose bytes are on the disk. Commits that arrive
// during a sync share the next one's syncs. A scratch file omits 1 to 4: it ends with the process. A file belongs to
// one process at a time: it is locked, and a forked child closes it at once. Any thread may call. A block that an
// engine has on its way must not be written from elsewhere, since each chunk is read by itself.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/common.h"
#include "runtime/disk/block_layout.h"
#include "runtime/disk/file_calls.h"

namespace distzo2 {

struct BlockFileOptions {
    bool durable = false;     // survives a crash at any byte and can be opened again; an opened file always is durable
    size_t part_bytes = kMiB; // that a checksum covers; smaller in tests
    FileCalls* calls = nullptr;
};

class BlockFile {
  public:
    // With `create`, makes the file, of zeros at version 0; an existing file must be a block file, and is replaced.
    // Without, opens a durable file of the same layout. direct: true demands O_DIRECT, false does without, no value
    // tries it and falls back. Throws std::runtime_error naming the path, the offset and the cause, and removes a file
    // that it began to make.
    BlockFile(std::string path, std::vector<size_t> block_bytes, bool create, std::optional<bool> direct,
              const BlockFileOptions& options = {});
    ~BlockFile();
    BlockFile(const BlockFile&) = delete;
    BlockFile& operator=(const BlockFile&) = delete;

    const std::string& path() const { return path_; }
    const std::vector<size_t>& block_bytes() const { return layout_.block_bytes; }
    size_t part_bytes() const { return layout_.part_bytes; }
    bool is_durable() const { return layout_.durable; }
    int64_t version(size_t block) const; // of the last commit

    // Copies bytes [offset, offset + num_bytes) of a block to memory: any size, any alignment. The `tail_bytes` of
    // memory after the end may be overwritten by the block's padding, which saves the last page a copy. Throws
    // std::runtime_error naming file, offset and cause, or the part whose checksum differs.
    void read(size_t block, void* to, size_t num_bytes, size_t offset, size_t tail_bytes = 0);
    // Replaces part of a block in one transaction, which copies the rest. Without `version` the block keeps its own.
    void write(size_t block, const void* from, size_t num_bytes, size_t offset,
               std::optional<int64_t> version = std::nullopt);
    // Reads every block against its checksums; returns the bytes read, or throws as read() does.
    size_t verify();
    void sync(); // returns when all that was written is on the disk

    // A transaction: a begin (which waits for a spare slot, and for the block's transaction under way), every part
    // once, in chunks of whole parts by any threads, and a commit. After a failed chunk or commit only abandon() may
    // follow. The wait ends with an error when `given_up` is set and wake() is called.
    void begin_write(size_t block, const std::atomic<bool>* given_up = nullptr);
    void wake();
    void write_chunk(size_t block, const void* from, size_t num_bytes, size_t offset, size_t tail_bytes = 0);
    struct Commit {
        size_t block;
        int64_t version;
    };
    // In a durable file, returns when they are on the disk.
    void commit(const std::vector<Commit>& commits);
    void commit(size_t block, int64_t version) { commit({{block, version}}); }
    void abandon(size_t block) noexcept; // if one is under way

    struct Stats {
        bool direct;
        bool durable;
        bool preallocated; // false: the file system cannot, and a full disk may still show at a write
        size_t bytes_used;
        size_t bytes_padded; // of the file
        size_t spare_slots;
        uint64_t bytes_read;
        uint64_t bytes_written;     // of blocks
        uint64_t map_bytes_written; // beside them
        uint64_t syncs;
        std::string fallback; // why not O_DIRECT although it was tried
    };
    Stats stats() const;

    void unlink(); // removes the name; the space is freed with the last holder

  private:
    struct Slot {
        size_t offset = 0;
        int num_readers = 0;
        bool freed = false; // spare as soon as its readers are done
        std::vector<uint32_t> checksums;
    };
    struct Block {
        size_t slot = 0;
        size_t next_slot = SIZE_MAX; // of a transaction that is under way
        std::atomic<size_t> parts_written{0};
        int64_t version = 0;
        int64_t next_version = 0;
        uint64_t generation = 0;
    };
    struct FreeDeleter {
        void operator()(std::byte* memory) const;
    };
    using Buffer = std::unique_ptr<std::byte, FreeDeleter>;
    struct Place {     // of bytes being read, which nobody overwrites before end_read()
        size_t offset; // in the file
        size_t slot;
    };
    static Buffer make_buffer(size_t num_bytes);
    struct OpenFiles; // of this process

    void open(bool create, std::optional<bool> direct);
    void check_owner() const;
    void check_space(size_t space_freed);
    void allocate();
    void check_file();
    void make_slots();
    void make_map();
    void load_map();
    void give_spares();
    bool try_direct();
    void check_range(size_t block, size_t num_bytes, size_t offset) const;
    Place begin_read(size_t block, size_t num_bytes, size_t offset);
    void end_read(const Place& place) noexcept;
    void check_read(const Place& place, size_t block, const void* memory, size_t num_bytes, size_t offset) const;
    void read_plain(void* to, size_t num_bytes, size_t file_offset) const;
    void write_plain(const void* from, size_t num_bytes, size_t file_offset) const;
    void write_entry_copy(size_t block, int copy);
    void commit_batch();
    void finish_commit(size_t block);
    void free_slot(size_t slot);
    void sync_file();

    std::string path_;
    BlockLayout layout_;
    FileCalls& calls_;
    FileId id_{0};
    int descriptor_ = -1; // also in a forked child
    bool direct_ = false;
    bool preallocated_ = true;
    bool unlinked_ = false;
    std::string fallback_;

    mutable std::mutex mutex_;        // guards what follows; never held over a system call
    std::condition_variable changed_; // a slot has become spare, a transaction or a commit has ended
    std::vector<Block> blocks_;
    std::vector<Slot> slots_;
    std::vector<std::vector<size_t>> spares_; // by class
    std::vector<size_t> waiting_;             // blocks to commit
    std::vector<size_t> batch_;               // blocks being committed, by the thread that set committing_
    bool committing_ = false;
    uint64_t num_commits_ = 0;   // asked for; they are made in this order
    uint64_t num_committed_ = 0; // of those
    Buffer entry_;               // that thread's
    std::string failed_;         // of a commit: what the map on the disk says is not known, and it is left alone
    mutable std::atomic<uint64_t> bytes_read_{0};
    std::atomic<uint64_t> bytes_written_{0};
    std::atomic<uint64_t> map_bytes_written_{0};
    std::atomic<uint64_t> syncs_{0};
};

} // namespace distzo2
