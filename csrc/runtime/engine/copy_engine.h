// The copy engine: a cache over the blocks of a HostPool or a BlockFile, in slots on the device that computes. The
// engine decides which block has which slot; a Transport moves the blocks and keeps the order safe. Any thread may
// call.
//
//   prefetch(b);  acquire(b, stream) -> slot;  work on `stream` reads or writes the slot;  release(b, stream, dirty)
//
// A slot is empty, or holds one block: on its way, present, or acquired. A dirty release queues a download; the block
// stays present. When a slot is needed, the one released longest ago goes first, prefetched ones last. The slots'
// memory belongs to the caller and must outlive close().
#pragma once

#include <memory>
#include <vector>

#include "runtime/engine/disk_transport.h"
#include "runtime/engine/stream_transport.h"

namespace distzo2 {

class CopyEngine {
  public:
    // Throws std::invalid_argument for slots that cannot hold the blocks, std::runtime_error from device or threads.
    // An allocator may have handed out the slots while work on `stream` still uses their memory: transfers wait for it.
    CopyEngine(std::shared_ptr<Device> device, const HostPool& pool, std::vector<std::byte*> slots, size_t slot_bytes,
               Stream stream = nullptr);
    // Over the blocks of `file`, then those of `ranges`, which cannot be released dirty; one of the two may be null.
    CopyEngine(std::shared_ptr<Device> device, std::shared_ptr<BlockFile> file, std::vector<std::byte*> slots,
               size_t slot_bytes, std::shared_ptr<HostPool> staging = nullptr, const DiskOptions& options = {},
               Stream stream = nullptr, std::shared_ptr<RangeFiles> ranges = nullptr);
    ~CopyEngine(); // as close()
    CopyEngine(const CopyEngine&) = delete;
    CopyEngine& operator=(const CopyEngine&) = delete;

    // Of each block of a HostPool, the bytes at its end that are only read, and so not downloaded. To be called first.
    void set_tails(std::vector<size_t> num_bytes);

    // For a failure outside (a journal that cannot be written): calls that wait, and later ones, throw `reason`.
    void fail(const std::string& reason);

    // Every function below but set_durable(), stats(), trace(), events() and close() throws: the first failure of any
    // transfer, every time; std::out_of_range for an unknown block; std::logic_error for a call that the state forbids.

    // Starts an upload unless the block is present or on its way; false if no slot can be taken for it now.
    bool prefetch(int block);
    // The block's slot, which it keeps until it has been released as often as acquired.
    int acquire(int block, Stream stream);
    void release(int block, Stream stream, bool dirty, int64_t version);
    // Journal lines before `version` are on disk. Never throws: a failed or closed engine is no concern of the
    // journal's.
    void set_durable(int64_t version);
    void drop(int block);       // forgets the copy in a slot, so that the next acquire reads the source
    std::vector<int> present(); // blocks whose upload is complete
    void flush();               // returns when every download that was queued has ended

    EngineStats stats();
    void reset_stats();
    void trace(bool enable);
    std::vector<TraceEvent> events();

    // Ends what is under way, makes the downloads that the journal allows, and releases source and device.
    void close() noexcept;

  private:
    struct Slot {
        int block = -1;
        int num_holders = 0;
        bool dirty = false; // to be downloaded at the last release
        int64_t version = 0;
        bool wanted = false; // prefetched, and not acquired since
        uint64_t wanted_since = 0;
        uint64_t last_use = 0;
    };
    struct Call; // the frame of a public function: lock, device, failures

    void check_slots() const;
    void order_slots_behind(Stream stream);
    int slot_of(int block) const;
    int choose(bool for_acquire);
    void assign(int slot, int block, bool urgent);
    int claim(Lock& lock, int block);
    bool is_wanted(const Slot& slot) const;

    std::unique_ptr<EngineState> state_;
    std::vector<Slot> slots_;
    std::vector<int> slot_of_block_; // or -1
    std::unique_ptr<Transport> transport_;
    uint64_t num_acquires_ = 0;
    uint64_t num_uses_ = 0;
    int num_calls_ = 0; // public functions being run; close() waits for them
    bool closed_ = false;
    int owner_process_;
};

} // namespace distzo2
