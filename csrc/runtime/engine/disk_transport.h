// Blocks in files: first those of a BlockFile, then those of RangeFiles, which are only read; either may be absent.
// Threads read and write them in chunks of 4 MiB, and check each chunk of a BlockFile that they read. On a CPU they
// read straight into the slots; for CUDA each thread has a piece of pinned staging memory and a stream, on which it
// copies between the piece and the slot. A download is a transaction of the file. It is held back until the journal is
// durable up to its version (the write-ahead rule). Its slot is free when its bytes are written; in a durable file a
// thread then commits all downloads written since the last commit. Only then may the block be read, or a flush end.
#pragma once

#include <atomic>
#include <functional>
#include <thread>

#include "runtime/disk/block_file.h"
#include "runtime/disk/range_files.h"
#include "runtime/engine/transport.h"
#include "runtime/pool/host_pool.h"

namespace distzo2 {

struct DiskOptions {
    int num_readers = 4; // threads
    int num_writers = 2;
    size_t chunk_bytes = 4 * kMiB; // of one read or write; a multiple of the file's parts
    // Called before each transfer by its thread; tests delay or fail (throw from) it, or poison the part of the slot.
    std::function<void(Direction direction, int block, size_t offset, std::byte* in_slot, size_t num_bytes)> hook;
};

class DiskTransport final : public Transport {
  public:
    // `staging` (CUDA only) is pinned memory to share out among the workers; without, a small pool is made.
    DiskTransport(EngineState& state, std::shared_ptr<BlockFile> file, std::shared_ptr<RangeFiles> ranges,
                  std::shared_ptr<HostPool> staging, const DiskOptions& options);
    ~DiskTransport() override;

    SlotPhase phase(int slot) override;
    bool take(int slot) override;
    int storing_slot(int block) override { return storing_slot_[block]; }
    void upload(int block, int slot, bool urgent) override;
    void hurry(int slot) override;
    void download(int block, int slot, int64_t version) override;
    std::optional<int64_t> recall_download(int block, int slot) override;
    void await(Lock& lock, int block, int slot, Stream stream) override;
    bool times_waits() const override { return false; }
    void reader_done(int slot, Stream stream) override;
    bool is_present(int slot) override { return slots_[slot].present; }
    void set_durable(int64_t version) override;
    void flush(Lock& lock) override;
    void update_stats() override {}
    void stop() noexcept override;

  private:
    enum class Phase { kNone, kQueued, kRunning };
    struct Ticket {
        Phase phase = Phase::kNone;
        int block = -1;
        bool urgent = false;
        bool opening = false; // a download whose transaction is being begun
        uint64_t order = 0;
        int64_t version = 0;
        size_t num_chunks = 0;
        size_t num_begun = 0;
        size_t num_done = 0;
        int64_t start_ns = 0;
    };
    struct SlotState {
        Ticket load;
        Ticket store;
        bool present = false; // the last upload is complete
        ReaderEvents readers; // CUDA only
    };
    struct Piece { // CUDA only: of the staging memory
        std::byte* staging = nullptr;
        Stream stream = nullptr;
        Event copied = nullptr; // after the last copy
    };
    struct Chunk {
        int block = -1;
        int slot = -1;
        size_t offset = 0; // in the block
        size_t num_bytes = 0;
        std::byte* in_slot = nullptr;
    };

    void give_staging(std::shared_ptr<HostPool> staging);
    void start_threads();
    void run_reader(const Piece& piece);
    void run_writer(const Piece& piece);
    bool is_open(const Ticket& ticket) const;
    bool is_being_read(int block) const;
    bool is_stored(int block) const;
    bool may_load(const SlotState& slot) const;
    int next_slot(Direction direction) const;
    Chunk begin_chunk(Direction direction, int slot);
    bool end_chunk(Direction direction, const Chunk& chunk);
    void read(const Piece& piece, const Chunk& chunk);
    void read_source(const Chunk& chunk, std::byte* to, size_t tail_bytes);
    void write(const Piece& piece, const Chunk& chunk);
    void copy(const Piece& piece, const Chunk& chunk, Direction direction);
    void await_copy(const Piece& piece);
    void written(int slot);
    void run_committer();
    void finish(Direction direction, int slot);
    void queue(Ticket& ticket, int block, bool urgent, int64_t version);
    bool has_loads() const;
    bool has_stores() const;
    void fail_all(const std::string& failure);
    void abandon_failed();

    EngineState& state_;
    Device& device_;
    std::shared_ptr<BlockFile> file_;
    std::shared_ptr<RangeFiles> ranges_;
    int num_file_blocks_; // of file_; those from here on are of ranges_
    size_t part_bytes_;   // chunks are of whole parts
    std::shared_ptr<Arena> staging_;
    size_t staging_chunk_bytes_ = kGiB; // registrations of the staging memory; no copy crosses one
    DiskOptions options_;
    std::vector<SlotState> slots_;
    std::vector<int> storing_slot_;   // per block: where a download of it is queued or under way, or -1
    std::vector<char> is_committing_; // per block: its bytes are in a durable file, and not yet its own
    std::vector<BlockFile::Commit> to_commit_;
    std::vector<Piece> pieces_; // of the readers, then of the writers
    std::vector<std::thread> threads_;
    std::thread committer_;
    bool writers_ended_ = false;
    std::atomic<bool> writes_given_up_{false}; // after a failure: nobody waits for a slot of the file any more
    std::condition_variable loads_;            // there may be a chunk to read; callers wait on state_.changed
    std::condition_variable stores_;           // or one to write
    std::condition_variable commits_;
    uint64_t next_order_ = 0;
    int64_t durable_ = 0;
    bool stopping_ = false;
};

} // namespace distzo2
