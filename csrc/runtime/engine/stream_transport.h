// Blocks in host memory: every transfer is issued at once, as copies on the engine's own streams behind waits for
// events, and nothing but the CPU's own acquire and flush ever blocks the host. Two streams a direction share a block's
// pieces; an acquire that misses uses other streams, so that it does not queue behind prefetches.
#pragma once

#include <array>

#include "runtime/engine/event_timer.h"
#include "runtime/engine/transport.h"
#include "runtime/pool/host_pool.h"

namespace distzo2 {

class StreamTransport final : public Transport {
  public:
    StreamTransport(EngineState& state, const HostPool& pool);
    ~StreamTransport() override;

    SlotPhase phase(int slot) override;
    bool take(int /*slot*/) override { return true; } // an upload may be issued behind whatever the slot does
    int storing_slot(int /*block*/) override { return -1; }
    void upload(int block, int slot, bool urgent) override;
    void hurry(int /*slot*/) override {}
    void download(int block, int slot, int64_t version) override;
    std::optional<int64_t> recall_download(int /*block*/, int /*slot*/) override { return std::nullopt; }
    void await(Lock& lock, int block, int slot, Stream stream) override;
    bool times_waits() const override { return !state_.device->is_cpu(); }
    void reader_done(int slot, Stream stream) override;
    bool is_present(int slot) override;
    void set_durable(int64_t /*version*/) override {} // memory is not what a crash leaves behind
    void flush(Lock& lock) override;
    void update_stats() override;
    void stop() noexcept override;

  private:
    static constexpr size_t kStreams = 2;
    struct StreamSet {
        std::array<Stream, kStreams> streams{};
        std::array<Event, kStreams> joins{}; // joins[0] is unused
        std::vector<Event> last;             // per block: its last copy by these streams
    };
    struct SlotState {
        Event ready = nullptr; // the last upload
        ReaderEvents readers;
        int stored_block = -1; // whose download from this slot the next upload must wait for
    };
    void create(StreamSet& set, bool urgent);
    void copy_pieces(StreamSet& set, std::byte* to, std::byte* from, std::byte* host, size_t num_bytes,
                     Direction direction);

    EngineState& state_;
    Device& device_;
    std::shared_ptr<Arena> arena_;
    std::vector<std::byte*> addresses_;
    size_t chunk_bytes_;
    StreamSet uploads_;
    StreamSet urgent_uploads_;
    StreamSet downloads_;
    Event flushed_ = nullptr;
    std::vector<SlotState> slots_;
    EventTimer timer_;
};

} // namespace distzo2
