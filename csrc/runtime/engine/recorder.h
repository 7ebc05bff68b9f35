// What an engine counts and, when asked, the trace of its tickets. All of it is guarded by the engine's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace distzo2 {

enum class TicketKind : uint8_t { kUpload, kDownload, kWait }; // kWait: compute stood still in or behind an acquire

struct TraceEvent {
    TicketKind kind;
    int block;
    int slot;
    size_t num_bytes;
    int64_t start_ns; // of the monotonic clock
    int64_t end_ns;
};

struct EngineStats {
    uint64_t uploads = 0; // begun
    uint64_t downloads = 0;
    uint64_t bytes_up = 0;
    uint64_t bytes_down = 0;
    uint64_t acquires = 0;
    uint64_t hits = 0;               // acquires that found the block present or on its way
    uint64_t recalled_uploads = 0;   // prefetches given up for an acquire before they began
    uint64_t recalled_downloads = 0; // downloads put off because their block was acquired again before they began
    uint64_t dropped_events = 0;     // of the trace, overwritten by later ones
    double upload_s = 0;             // sum over the tickets
    double download_s = 0;
    double wait_s = 0;  // host time blocked in acquire
    double stall_s = 0; // device time that the callers' streams waited for uploads (CUDA)
};

class Recorder {
  public:
    EngineStats stats;

    // Allocates the ring; turning it on again empties it.
    void trace(bool enable) {
        ring_.assign(enable ? kMaxEvents : 0, TraceEvent{});
        count_ = 0;
    }

    void add(const TraceEvent& event) {
        if (ring_.empty())
            return;
        if (count_ >= ring_.size())
            ++stats.dropped_events;
        ring_[count_++ % ring_.size()] = event;
    }

    // Oldest first.
    std::vector<TraceEvent> events() const {
        std::vector<TraceEvent> result;
        const size_t first = count_ > ring_.size() ? count_ - ring_.size() : 0;
        result.reserve(count_ - first);
        for (size_t i = first; i < count_; ++i)
            result.push_back(ring_[i % ring_.size()]);
        return result;
    }

  private:
    static constexpr size_t kMaxEvents = size_t{1} << 16;
    std::vector<TraceEvent> ring_;
    size_t count_ = 0;
};

} // namespace distzo2
