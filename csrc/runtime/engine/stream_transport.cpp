#include "runtime/engine/stream_transport.h"

#include <algorithm>

#include "runtime/common.h"
#include "runtime/mutations.h"

namespace distzo2 {

StreamTransport::StreamTransport(EngineState& state, const HostPool& pool)
    : state_(state), device_(*state.device), arena_(pool.arena()), chunk_bytes_(pool.chunk_bytes()),
      slots_(state.slots.size()), timer_(state) {
    const DeviceGuard guard(device_);
    for (size_t block = 0; block < pool.num_blocks(); ++block)
        addresses_.push_back(pool.address(block));
    try {
        create(uploads_, false);
        create(urgent_uploads_, true);
        create(downloads_, false);
        flushed_ = device_.create_event(false);
        for (SlotState& slot : slots_)
            slot.ready = device_.create_event(false);
        timer_.create(uploads_.streams[0]);
    } catch (...) {
        stop();
        throw;
    }
}

StreamTransport::~StreamTransport() { stop(); }

void StreamTransport::create(StreamSet& set, bool urgent) {
    for (size_t i = 0; i < kStreams; ++i) {
        set.streams[i] = device_.create_stream(urgent);
        if (i > 0)
            set.joins[i] = device_.create_event(false);
    }
    for (size_t block = 0; block < addresses_.size(); ++block)
        set.last.push_back(device_.create_event(false));
}

void StreamTransport::stop() noexcept {
    try {
        const DeviceGuard guard(device_);
        for (StreamSet* set : {&uploads_, &urgent_uploads_, &downloads_})
            for (size_t i = 0; i < kStreams; ++i)
                if (set->streams[i] != nullptr)
                    device_.destroy_stream(set->streams[i]); // ends what is in flight first
        for (StreamSet* set : {&uploads_, &urgent_uploads_, &downloads_}) {
            for (Event event : set->joins)
                if (event != nullptr)
                    device_.destroy_event(event);
            for (Event event : set->last)
                device_.destroy_event(event);
            *set = {};
        }
        for (SlotState& slot : slots_) {
            slot.readers.destroy(device_);
            if (slot.ready != nullptr)
                device_.destroy_event(slot.ready);
        }
        if (flushed_ != nullptr)
            device_.destroy_event(flushed_);
        flushed_ = nullptr;
        timer_.destroy();
    } catch (const std::exception&) { // the driver is gone, at the end of the process, and all of this with it
    }
    slots_.clear();
}

// An upload that is under way does not matter: what comes after it is issued behind it.
SlotPhase StreamTransport::phase(int slot) {
    const SlotState& state = slots_[slot];
    SlotPhase phase;
    phase.storing = state.stored_block >= 0 && !device_.query(downloads_.last[state.stored_block]);
    return phase;
}

// Pieces go to the streams in turn; afterwards streams[0] stands behind all of them.
void StreamTransport::copy_pieces(StreamSet& set, std::byte* to, std::byte* from, std::byte* host, size_t num_bytes,
                                  Direction direction) {
    const size_t piece_bytes = device_.copy_chunk_bytes();
    size_t num_pieces = 0;
    HostPool::for_each_chunk(arena_->data(), chunk_bytes_, host, num_bytes, [&](std::byte* start, size_t part) {
        for (size_t done = 0; done < part; done += piece_bytes) {
            const size_t offset = static_cast<size_t>(start - host) + done;
            device_.copy(set.streams[num_pieces++ % kStreams], to + offset, from + offset,
                         std::min(piece_bytes, part - done), direction);
        }
    });
    if (!kept(direction == Direction::kUpload ? Ordering::upload_pieces_join : Ordering::download_pieces_join))
        return;
    for (size_t i = 1; i < std::min(num_pieces, kStreams); ++i) {
        device_.record(set.joins[i], set.streams[i]);
        device_.wait(set.streams[0], set.joins[i]);
    }
}

void StreamTransport::upload(int block, int slot, bool urgent) {
    StreamSet& set = urgent ? urgent_uploads_ : uploads_;
    SlotState& state = slots_[slot];
    for (Stream stream : set.streams) {
        if (kept(Ordering::upload_after_upload))
            device_.wait(stream, state.ready);
        if (kept(Ordering::upload_after_readers))
            state.readers.wait(device_, stream);
        if (state.stored_block >= 0 && kept(Ordering::upload_after_slot_is_stored))
            device_.wait(stream, downloads_.last[state.stored_block]);
        if (kept(Ordering::upload_after_block_is_stored))
            device_.wait(stream, downloads_.last[block]);
    }
    state.readers.clear();
    state.stored_block = -1;
    const size_t num_bytes = state_.block_bytes[block];
    const int ticket = timer_.begin(TicketKind::kUpload, block, slot, num_bytes, set.streams[0]);
    copy_pieces(set, state_.slots[slot], addresses_[block], addresses_[block], num_bytes, Direction::kUpload);
    timer_.end(ticket, set.streams[0]);
    device_.record(state.ready, set.streams[0]);
    device_.record(set.last[block], set.streams[0]);
    ++state_.recorder.stats.uploads;
    state_.recorder.stats.bytes_up += num_bytes;
}

void StreamTransport::download(int block, int slot, int64_t /*version*/) {
    SlotState& state = slots_[slot];
    for (Stream stream : downloads_.streams) {
        if (kept(Ordering::download_after_readers))
            state.readers.wait(device_, stream);
        // The one to this slot, and one that was begun and dropped, which may still be reading the host's copy.
        if (kept(Ordering::download_after_uploads)) {
            device_.wait(stream, uploads_.last[block]);
            device_.wait(stream, urgent_uploads_.last[block]);
        }
    }
    const size_t num_bytes = state_.block_bytes[block] - (state_.tails.empty() ? 0 : state_.tails[block]);
    const int ticket = timer_.begin(TicketKind::kDownload, block, slot, num_bytes, downloads_.streams[0]);
    copy_pieces(downloads_, addresses_[block], state_.slots[slot], addresses_[block], num_bytes, Direction::kDownload);
    timer_.end(ticket, downloads_.streams[0]);
    device_.record(downloads_.last[block], downloads_.streams[0]);
    state.stored_block = block;
    ++state_.recorder.stats.downloads;
    state_.recorder.stats.bytes_down += num_bytes;
}

void StreamTransport::await(Lock& lock, int block, int slot, Stream stream) {
    SlotState& state = slots_[slot];
    if (device_.is_cpu()) {
        // The slot is acquired, so that neither its events nor its readers change while the lock is released.
        lock.unlock();
        if (kept(Ordering::reader_after_upload))
            device_.synchronize(state.ready);
        if (kept(Ordering::reader_after_slot_is_stored))
            device_.synchronize(downloads_.last[block]);
        lock.lock();
        return;
    }
    const int ticket = timer_.begin(TicketKind::kWait, block, slot, state_.block_bytes[block], stream);
    if (kept(Ordering::reader_after_upload))
        device_.wait(stream, state.ready);
    if (kept(Ordering::reader_after_readers))
        state.readers.wait(device_, stream, true);
    if (state.stored_block >= 0 &&
        kept(Ordering::reader_after_slot_is_stored)) // it may be written now, and its download still reads it
        device_.wait(stream, downloads_.last[state.stored_block]);
    timer_.end(ticket, stream);
}

void StreamTransport::reader_done(int slot, Stream stream) { slots_[slot].readers.record(device_, stream); }

bool StreamTransport::is_present(int slot) { return device_.query(slots_[slot].ready); }

void StreamTransport::flush(Lock& lock) {
    device_.record(flushed_, downloads_.streams[0]);
    lock.unlock();
    device_.synchronize(flushed_);
    lock.lock();
}

void StreamTransport::update_stats() { timer_.drain(); }

} // namespace distzo2
