// Times of work on streams: a ring of pairs of timed events, created once, read when both have happened. A base event
// whose host time is known puts the times on the monotonic clock. The base moves, because the device gives differences
// as 32-bit floats.
#pragma once

#include <vector>

#include "runtime/engine/transport.h"

namespace distzo2 {

class EventTimer {
  public:
    explicit EventTimer(EngineState& state) : state_(state) {}

    void create(Stream stream); // blocks until `stream` has done what it has
    void destroy() noexcept;

    // Brackets a piece of work. begin() gives a ticket for end(), or -1 when too many are unread: that work is not
    // timed.
    int begin(TicketKind kind, int block, int slot, size_t num_bytes, Stream stream);
    void end(int ticket, Stream stream);

    void drain(); // gives the finished ones to the recorder, in the order in which they were begun

  private:
    static constexpr size_t kMaxTickets = 256;
    struct Ticket {
        Event start = nullptr;
        Event end = nullptr;
        TraceEvent event{};
    };
    EngineState& state_;
    std::vector<Ticket> ring_;
    size_t first_ = 0;
    size_t count_ = 0;
    Event base_ = nullptr;
    int64_t base_ns_ = 0;
};

} // namespace distzo2
