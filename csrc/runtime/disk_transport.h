// Blocks in a file: threads read chunks of 4 MiB, several at a time, and others write them. On a CPU they read straight
// into the slots; for CUDA each has a piece of pinned staging memory and a stream, between which and the slot it
// copies. A download is held back until the journal is durable up to its version (the write-ahead rule).
#pragma once

#include <functional>
#include <thread>

#include "runtime/block_file.h"
#include "runtime/host_pool.h"
#include "runtime/transport.h"

namespace distzo2 {

struct DiskOptions {
    int num_readers = 4;
    int num_writers = 2;
    size_t chunk_bytes = 4 * kMiB; // of one read or write; a multiple of 4096
    // Called by a worker before each transfer; tests delay or fail (throw from) it, or poison the part of the slot.
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
    void update_stats() override {}
    void stop() noexcept override;

  private:
    enum class Phase { kNone, kQueued, kRunning };
    struct Ticket {
        Phase phase = Phase::kNone;
        int block = -1;
        bool urgent = false;
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
    struct Worker {
        Direction direction;
        std::byte* staging = nullptr; // CUDA only
        Stream stream = nullptr;
        std::thread thread;
    };

    void make_workers();
    void give_staging(std::shared_ptr<HostPool> staging);
    void run(Worker& worker);
    bool is_open(const Ticket& ticket) const;
    bool is_being_read(int block) const;
    bool may_load(const SlotState& slot) const;
    int next_slot(Direction direction) const;
    void transfer(Worker& worker, int block, int slot, size_t chunk);
    void finish(Direction direction, int slot);
    void queue(Ticket& ticket, int block, bool urgent, int64_t version);

    EngineState& state_;
    Device& device_;
    std::shared_ptr<BlockFile> file_;
    std::shared_ptr<Arena> staging_;
    size_t staging_chunk_bytes_ = kGiB; // registrations of the staging memory; no copy crosses one
    DiskOptions options_;
    std::vector<SlotState> slots_;
    std::vector<int> storing_slot_; // per block: where a download of it is queued or under way, or -1
    std::vector<Worker> workers_;
    std::condition_variable work_; // for the workers; callers wait on state_.changed
    uint64_t next_order_ = 0;
    int64_t durable_ = 0;
    bool stopping_ = false;
};

} // namespace distzo2
