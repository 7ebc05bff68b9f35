// The threads of a disk transport: those that read, those that write, and the one that commits what they wrote.
#include "runtime/engine/disk_transport.h"
#include "runtime/mutations.h"

#include <algorithm>

namespace distzo2 {

// The next chunk of the slot's ticket; begins the ticket with its first. Called with the lock held.
DiskTransport::Chunk DiskTransport::begin_chunk(Direction direction, int slot) {
    const bool up = direction == Direction::kUpload;
    Ticket& ticket = up ? slots_[slot].load : slots_[slot].store;
    const size_t block_bytes = state_.block_bytes[ticket.block];
    if (ticket.phase == Phase::kQueued) {
        ticket.phase = Phase::kRunning;
        ticket.start_ns = now_ns();
        EngineStats& stats = state_.recorder.stats;
        ++(up ? stats.uploads : stats.downloads);
        (up ? stats.bytes_up : stats.bytes_down) += block_bytes;
    }
    const size_t offset = ticket.num_begun++ * options_.chunk_bytes;
    return {ticket.block, slot, offset, std::min(options_.chunk_bytes, block_bytes - offset),
            state_.slots[slot] + offset};
}

// Whether it was the ticket's last. Called with the lock held.
bool DiskTransport::end_chunk(Direction direction, const Chunk& chunk) {
    const bool up = direction == Direction::kUpload;
    Ticket& ticket = up ? slots_[chunk.slot].load : slots_[chunk.slot].store;
    if (++ticket.num_done == ticket.num_chunks)
        return state_.error.empty();
    if (up && storing_slot_[chunk.block] >= 0)
        stores_.notify_all(); // its download may be waiting for this read
    return false;
}

void DiskTransport::run_reader(const Piece& piece) {
    Lock lock(state_.mutex);
    while (true) {
        const int slot = next_slot(Direction::kUpload);
        if (slot < 0) {
            if (stopping_)
                return;
            loads_.wait(lock);
            continue;
        }
        const Chunk chunk = begin_chunk(Direction::kUpload, slot);
        lock.unlock();
        std::string failure;
        try {
            read(piece, chunk);
        } catch (const std::exception& error) {
            failure = error.what();
        }
        lock.lock();
        if (!failure.empty())
            fail_all(failure);
        if (end_chunk(Direction::kUpload, chunk))
            finish(Direction::kUpload, slot);
    }
}

void DiskTransport::run_writer(const Piece& piece) {
    Lock lock(state_.mutex);
    while (true) {
        const int slot = next_slot(Direction::kDownload);
        if (slot < 0) {
            // What was begun keeps its slot of the file, and another writer may be waiting for one.
            if (!state_.error.empty() && !writes_given_up_.exchange(true))
                file_->wake();
            abandon_failed();
            if (stopping_ && !has_stores())
                return;
            stores_.wait(lock);
            continue;
        }
        Ticket& ticket = slots_[slot].store;
        const bool first = ticket.phase == Phase::kQueued;
        const Chunk chunk = begin_chunk(Direction::kDownload, slot);
        ticket.opening = first;
        lock.unlock();
        std::string failure;
        try {
            if (first) { // may wait for a slot of the file; the other chunks meanwhile for this
                file_->begin_write(static_cast<size_t>(chunk.block), &writes_given_up_);
                lock.lock();
                ticket.opening = false;
                if (ticket.num_chunks > 1)
                    stores_.notify_all();
                lock.unlock();
            }
            write(piece, chunk);
        } catch (const std::exception& error) {
            failure = error.what();
        }
        if (!lock.owns_lock())
            lock.lock();
        if (!failure.empty())
            state_.fail(failure);
        try {
            if (end_chunk(Direction::kDownload, chunk))
                written(slot);
        } catch (const std::exception& error) {
            state_.fail(error.what());
        }
    }
}

// Called with the lock held.
void DiskTransport::fail_all(const std::string& failure) {
    state_.fail(failure);
    stores_.notify_all(); // writers abandon what they have begun
}

// Whether a download that the journal allows is to be begun or gone on with, now or after what it waits for. Called
// with the lock held.
bool DiskTransport::has_stores() const {
    return state_.error.empty() && std::any_of(slots_.begin(), slots_.end(), [this](const SlotState& slot) {
               return slot.store.phase != Phase::kNone && is_open(slot.store) &&
                      (slot.store.opening || slot.store.num_begun < slot.store.num_chunks);
           });
}

// After a failure: abandons the downloads that no writer works on. Others may be waiting for their slots of the file.
// Called with the lock held.
void DiskTransport::abandon_failed() {
    if (state_.error.empty())
        return;
    for (SlotState& slot : slots_) {
        Ticket& store = slot.store;
        if (store.phase != Phase::kRunning || store.opening || store.num_done < store.num_begun)
            continue;
        file_->abandon(static_cast<size_t>(store.block));
        storing_slot_[store.block] = -1;
        store.phase = Phase::kNone;
    }
}

// All chunks of a download are. Called with the lock held.
void DiskTransport::written(int slot) {
    const BlockFile::Commit commit{static_cast<size_t>(slots_[slot].store.block), slots_[slot].store.version};
    if (file_->is_durable()) {
        is_committing_[commit.block] = 1;
        to_commit_.push_back(commit);
        commits_.notify_one();
    } else {
        file_->commit(commit.block, commit.version); // at once: it waits for nothing
    }
    finish(Direction::kDownload, slot);
}

// Also after a failure elsewhere: what is written is whole.
void DiskTransport::run_committer() {
    std::vector<BlockFile::Commit> batch;
    batch.reserve(is_committing_.size());
    Lock lock(state_.mutex);
    while (true) {
        commits_.wait(lock, [this] { return writers_ended_ || !to_commit_.empty(); });
        if (to_commit_.empty())
            return;
        batch.swap(to_commit_);
        lock.unlock();
        std::string failure;
        try {
            file_->commit(batch);
        } catch (const std::exception& error) {
            failure = error.what();
        }
        lock.lock();
        if (failure.empty())
            for (const BlockFile::Commit& one : batch)
                is_committing_[one.block] = 0;
        else
            fail_all(failure);
        batch.clear();
        state_.changed.notify_all();
        stores_.notify_all(); // the next download of a block waits for the one before
        if (has_loads())
            loads_.notify_all();
    }
}

void DiskTransport::read(const Piece& piece, const Chunk& chunk) {
    if (options_.hook)
        options_.hook(Direction::kUpload, chunk.block, chunk.offset, chunk.in_slot, chunk.num_bytes);
    if (device_.is_cpu())
        return read_source(chunk, chunk.in_slot, state_.slot_bytes - chunk.offset - chunk.num_bytes);
    read_source(chunk, piece.staging, options_.chunk_bytes - chunk.num_bytes);
    copy(piece, chunk, Direction::kUpload);
    await_copy(piece);
}

void DiskTransport::read_source(const Chunk& chunk, std::byte* to, size_t tail_bytes) {
    if (chunk.block < num_file_blocks_)
        file_->read(static_cast<size_t>(chunk.block), to, chunk.num_bytes, chunk.offset, tail_bytes);
    else
        ranges_->read(static_cast<size_t>(chunk.block - num_file_blocks_), to, chunk.num_bytes, chunk.offset);
}

void DiskTransport::write(const Piece& piece, const Chunk& chunk) {
    if (options_.hook)
        options_.hook(Direction::kDownload, chunk.block, chunk.offset, chunk.in_slot, chunk.num_bytes);
    const auto block = static_cast<size_t>(chunk.block);
    if (device_.is_cpu()) {
        const size_t tail_bytes = state_.slot_bytes - chunk.offset - chunk.num_bytes;
        return file_->write_chunk(block, chunk.in_slot, chunk.num_bytes, chunk.offset, tail_bytes);
    }
    copy(piece, chunk, Direction::kDownload);
    await_copy(piece);
    file_->write_chunk(block, piece.staging, chunk.num_bytes, chunk.offset, options_.chunk_bytes - chunk.num_bytes);
}

// Between the piece and the slot, on the piece's stream.
void DiskTransport::copy(const Piece& piece, const Chunk& chunk, Direction direction) {
    const DeviceGuard guard(device_);
    const bool up = direction == Direction::kUpload;
    if (kept(up ? Ordering::file_upload_after_readers : Ordering::file_download_after_readers))
        slots_[chunk.slot].readers.wait(device_, piece.stream); // they do not change while a transfer is under way
    HostPool::for_each_chunk(staging_->data(), staging_chunk_bytes_, piece.staging, chunk.num_bytes,
                             [&](std::byte* part, size_t part_bytes) {
                                 std::byte* const there = chunk.in_slot + (part - piece.staging);
                                 device_.copy(piece.stream, up ? there : part, up ? part : there, part_bytes,
                                              direction);
                             });
    device_.record(piece.copied, piece.stream);
}

void DiskTransport::await_copy(const Piece& piece) {
    const DeviceGuard guard(device_);
    if (kept(Ordering::file_after_staging_copy))
        device_.synchronize(piece.copied);
}

} // namespace distzo2
