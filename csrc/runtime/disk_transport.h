// Blocks in a file: reads in chunks of 4 MiB, several at a time, by a ring of the kernel's (one thread keeps them in
// flight) or by a thread each, and threads that write. On a CPU they read straight into the slots; for CUDA each read
// has a piece of pinned staging memory and a stream, between which and the slot it copies. Who reads a chunk checks it.
// A download is a transaction of the file, and is held back until the journal is durable up to its version (the
// write-ahead rule). Its slot is free when its bytes are written; in a durable file a thread then commits all that have
// come together since the commit before, and only then may the block be read, or a flush end.
#pragma once

#include <atomic>
#include <functional>
#include <thread>

#include "runtime/block_file.h"
#include "runtime/host_pool.h"
#include "runtime/io_ring.h"
#include "runtime/transport.h"

namespace distzo2 {

enum class ReadsBy { kAuto, kRing, kThreads };

struct DiskOptions {
    int num_readers = 4; // reads at a time
    int num_writers = 2;
    size_t chunk_bytes = 4 * kMiB; // of one read or write; a multiple of the file's parts
    // kAuto: as DISTZO2_DISK_READS says (io_uring or threads), else the ring where the kernel has one for us. A ring
    // that is asked for by name and is not there is an error.
    ReadsBy reads_by = ReadsBy::kAuto;
    // Called before each transfer, by the ring's thread for every read; tests delay or fail (throw from) it, or poison
    // the part of the slot.
    std::function<void(Direction direction, int block, size_t offset, std::byte* in_slot, size_t num_bytes)> hook;
};

class DiskTransport final : public Transport {
  public:
    // `staging` (CUDA only) is pinned memory to share out among the workers; without, a small pool is made.
    DiskTransport(EngineState& state, std::shared_ptr<BlockFile> file, std::shared_ptr<HostPool> staging,
                  const DiskOptions& options);
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
    void update_stats() override;
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
    struct RingRead { // disk_ring.cpp; for CUDA each has the piece of its index
        enum class Stage { kFree, kBegun, kReading, kArrived, kCopying, kDone } stage = Stage::kFree;
        uint64_t arrival = 0;
        Chunk chunk;
        BlockFile::Place place{};
        std::byte* memory = nullptr;
        size_t num_wanted = 0; // whole pages where the file is direct
        size_t num_read = 0;
    };

    void choose_reads();
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
    void write(const Piece& piece, const Chunk& chunk);
    void copy(const Piece& piece, const Chunk& chunk, Direction direction);
    void await_copy(const Piece& piece);
    bool is_copied(const Piece& piece);
    void written(int slot);
    void run_committer();
    void finish(Direction direction, int slot);
    void queue(Ticket& ticket, int block, bool urgent, int64_t version);
    bool has_loads() const;
    bool has_stores() const;
    void fail_all(const std::string& failure);
    void abandon_failed();
    void wake_readers();

    void run_ring();
    void begin_ring_read(size_t index);
    void push_ring_read(size_t index);
    void end_ring_read(size_t index, int result);
    void check_ring_read(size_t index);
    void advance_ring();

    EngineState& state_;
    Device& device_;
    std::shared_ptr<BlockFile> file_;
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
    std::unique_ptr<IoRing> ring_;
    std::string no_ring_;              // why threads read
    std::vector<RingRead> ring_reads_; // on a CPU twice as many as may be under way: what has come in is checked then
    uint64_t num_arrivals_ = 0;
    bool ring_sleeps_ = false;       // and could begin more: wake it when there is more to do
    std::condition_variable loads_;  // there may be a chunk to read; callers wait on state_.changed
    std::condition_variable stores_; // or one to write
    std::condition_variable commits_;
    uint64_t next_order_ = 0;
    int64_t durable_ = 0;
    bool stopping_ = false;
};

} // namespace distzo2
