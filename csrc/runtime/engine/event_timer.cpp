#include "runtime/engine/event_timer.h"

#include <utility>

#include "runtime/common.h"

namespace distzo2 {

void EventTimer::create(Stream stream) {
    Device& device = *state_.device;
    ring_.resize(kMaxTickets);
    for (Ticket& ticket : ring_) {
        ticket.start = device.create_event(true);
        ticket.end = device.create_event(true);
    }
    base_ = device.create_event(true);
    base_ns_ = device.record_and_date(base_, stream);
}

void EventTimer::destroy() noexcept {
    Device& device = *state_.device;
    for (Ticket& ticket : ring_)
        for (Event event : {ticket.start, ticket.end})
            if (event != nullptr)
                device.destroy_event(event);
    if (base_ != nullptr)
        device.destroy_event(base_);
    ring_.clear();
    base_ = nullptr;
    count_ = 0;
}

int EventTimer::begin(TicketKind kind, int block, int slot, size_t num_bytes, Stream stream) {
    drain();
    if (count_ == ring_.size())
        return -1;
    const size_t index = (first_ + count_++) % ring_.size();
    ring_[index].event = {kind, block, slot, num_bytes, 0, 0};
    state_.device->record(ring_[index].start, stream);
    return static_cast<int>(index);
}

void EventTimer::end(int ticket, Stream stream) {
    if (ticket >= 0)
        state_.device->record(ring_[static_cast<size_t>(ticket)].end, stream);
}

void EventTimer::drain() {
    constexpr int64_t kMoveBaseAfterNs = 5'000'000'000;
    Device& device = *state_.device;
    while (count_ > 0 && device.query(ring_[first_].end)) {
        Ticket& ticket = ring_[first_];
        TraceEvent event = ticket.event;
        event.start_ns = base_ns_ + static_cast<int64_t>(device.elapsed_ns(base_, ticket.start));
        event.end_ns = base_ns_ + static_cast<int64_t>(device.elapsed_ns(base_, ticket.end));
        const double seconds = static_cast<double>(event.end_ns - event.start_ns) * 1e-9;
        EngineStats& stats = state_.recorder.stats;
        (event.kind == TicketKind::kUpload     ? stats.upload_s
         : event.kind == TicketKind::kDownload ? stats.download_s
                                               : stats.stall_s) += seconds;
        state_.recorder.add(event);
        if (event.end_ns - base_ns_ > kMoveBaseAfterNs) {
            std::swap(base_, ticket.end);
            base_ns_ = event.end_ns;
        }
        first_ = (first_ + 1) % ring_.size();
        --count_;
    }
}

} // namespace distzo2
