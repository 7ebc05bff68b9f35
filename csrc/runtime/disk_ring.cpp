// Reads through a ring: one thread begins them, checks what has come in, and for CUDA sends it on to the slot. It
// sleeps in the kernel, for the next read that ends or for news (wake_readers), so that an urgent read waits only for a
// place in the ring. Every function but run_ring() is called without the lock.
#include <cerrno>

#include "runtime/disk_transport.h"

namespace distzo2 {

void DiskTransport::run_ring() {
    using Stage = RingRead::Stage;
    Lock lock(state_.mutex);
    while (true) {
        bool idle = true;
        int num_under_way = 0;
        for (const RingRead& read : ring_reads_) {
            idle = idle && read.stage == Stage::kFree;
            num_under_way += read.stage == Stage::kReading ? 1 : 0;
        }
        bool has_room = false; // for a read, had there been one to begin
        for (RingRead& read : ring_reads_) {
            if (read.stage != Stage::kFree || num_under_way == options_.num_readers)
                continue;
            const int slot = next_slot(Direction::kUpload);
            has_room = slot < 0;
            if (has_room)
                break;
            read.chunk = begin_chunk(Direction::kUpload, slot);
            read.stage = Stage::kBegun;
            ++num_under_way;
            idle = false;
        }
        if (idle && !state_.error.empty()) // nothing is begun any more, perhaps since the ring is broken
            loads_.wait(lock, [this] { return stopping_; });
        if (idle && stopping_)
            return;
        ring_sleeps_ = has_room && !stopping_;
        lock.unlock();
        std::string failure;
        try {
            advance_ring();
        } catch (const std::exception& error) {
            failure = error.what();
        }
        if (!failure.empty()) // what is under way comes to its end, and its memory is ours again
            ring_->drain();
        lock.lock();
        ring_sleeps_ = false;
        if (!failure.empty())
            fail_all(failure);
        for (RingRead& read : ring_reads_) {
            if (read.stage == Stage::kFree || (failure.empty() && read.stage != Stage::kDone))
                continue;
            if (read.stage != Stage::kBegun)
                file_->end_read(read.place);
            read.stage = Stage::kFree;
            if (end_chunk(Direction::kUpload, read.chunk))
                finish(Direction::kUpload, read.chunk.slot);
        }
    }
}

// Begins what is to be begun, takes what has come in, and checks one of those that had come in before: the disk always
// has its next reads first. Waits only when there is nothing else to do, and for a copy to the slot, which may stand
// behind compute, only when nothing is being read: otherwise the read that ends next is when copies are looked at.
void DiskTransport::advance_ring() {
    using Stage = RingRead::Stage;
    const size_t kNone = ring_reads_.size();
    size_t arrived = kNone; // the first
    size_t copying = kNone; // the first, too
    bool reading = false;
    bool done = false;
    for (size_t i = 0; i < ring_reads_.size(); ++i) {
        RingRead& read = ring_reads_[i];
        if (read.stage == Stage::kBegun)
            begin_ring_read(i);
        if (read.stage == Stage::kArrived && (arrived == kNone || read.arrival < ring_reads_[arrived].arrival))
            arrived = i;
        if (read.stage == Stage::kCopying && is_copied(pieces_[i]))
            read.stage = Stage::kDone;
        if (read.stage == Stage::kCopying && (copying == kNone || read.arrival < ring_reads_[copying].arrival))
            copying = i;
        reading = reading || read.stage == Stage::kReading;
        done = done || read.stage == Stage::kDone;
    }
    ring_->submit(!done && arrived == kNone && (copying == kNone || reading));
    IoRing::Completion completion{};
    while (ring_->next(&completion))
        end_ring_read(static_cast<size_t>(completion.tag), completion.result);
    if (arrived != kNone) {
        check_ring_read(arrived);
    } else if (copying != kNone && !done && !reading) {
        await_copy(pieces_[copying]);
        ring_reads_[copying].stage = Stage::kDone;
    }
}

void DiskTransport::begin_ring_read(size_t index) {
    RingRead& read = ring_reads_[index];
    const Chunk& chunk = read.chunk;
    if (options_.hook)
        options_.hook(Direction::kUpload, chunk.block, chunk.offset, chunk.in_slot, chunk.num_bytes);
    read.place = file_->begin_read(static_cast<size_t>(chunk.block), chunk.num_bytes, chunk.offset);
    read.stage = RingRead::Stage::kReading;
    read.memory = device_.is_cpu() ? chunk.in_slot : pieces_[index].staging;
    const size_t room = device_.is_cpu() ? state_.slot_bytes - chunk.offset : options_.chunk_bytes;
    const size_t padded = align_up(chunk.num_bytes, kPageBytes);
    read.num_wanted = !file_->is_direct() ? chunk.num_bytes : padded <= room ? padded : align_down(room, kPageBytes);
    read.num_read = 0;
    if (read.num_wanted == 0)
        end_ring_read(index, 0);
    else
        push_ring_read(index);
}

void DiskTransport::push_ring_read(size_t index) {
    const RingRead& read = ring_reads_[index];
    ring_->read(read.place.descriptor, read.memory + read.num_read, read.num_wanted - read.num_read,
                read.place.offset + read.num_read, index);
}

void DiskTransport::end_ring_read(size_t index, int result) {
    RingRead& read = ring_reads_[index];
    const size_t at = read.place.offset + read.num_read;
    const size_t num_left = read.num_wanted - read.num_read;
    if (num_left > 0) {
        result = file_->calls().ring_result(at, num_left, result);
        if (result == -EINTR || result == -EAGAIN)
            return push_ring_read(index);
        if (result < 0)
            file_->fail_read(num_left, at, result);
        read.num_read += static_cast<size_t>(result);
        if (read.num_read < read.num_wanted) {
            // A direct read is short in mid-page only where the file ends.
            if (result == 0 || (file_->is_direct() && read.num_read % kPageBytes != 0))
                file_->fail_read(read.num_wanted, read.place.offset, static_cast<int64_t>(read.num_read));
            return push_ring_read(index);
        }
    }
    file_->add_read(read.num_wanted);
    read.arrival = num_arrivals_++;
    read.stage = RingRead::Stage::kArrived;
}

void DiskTransport::check_ring_read(size_t index) {
    RingRead& read = ring_reads_[index];
    const Chunk& chunk = read.chunk;
    const auto block = static_cast<size_t>(chunk.block);
    if (read.num_wanted < chunk.num_bytes) // the slot has no room for the last page's padding
        file_->read(block, read.memory + read.num_wanted, chunk.num_bytes - read.num_wanted,
                    chunk.offset + read.num_wanted);
    file_->check_read(read.place, block, read.memory, chunk.num_bytes, chunk.offset);
    if (device_.is_cpu()) {
        read.stage = RingRead::Stage::kDone;
        return;
    }
    copy(pieces_[index], chunk, Direction::kUpload);
    read.stage = RingRead::Stage::kCopying;
}

} // namespace distzo2
