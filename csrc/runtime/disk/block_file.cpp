#include "runtime/disk/block_file.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "runtime/disk/crc32c.h"
#include "runtime/mutations.h"

namespace distzo2 {

void BlockFile::check_range(size_t block, size_t num_bytes, size_t offset) const {
    const auto& sizes = layout_.block_bytes;
    if (block >= sizes.size())
        throw std::out_of_range(join_text("no block ", block, ": the block file has ", sizes.size()));
    if (offset > sizes[block] || num_bytes > sizes[block] - offset)
        throw std::out_of_range(
            join_text("bytes ", offset, " to ", offset + num_bytes, " of block ", block, ", which has ", sizes[block]));
}

int64_t BlockFile::version(size_t block) const {
    check_range(block, 0, 0);
    const std::lock_guard lock(mutex_);
    return blocks_[block].version;
}

void BlockFile::read_plain(void* to, size_t num_bytes, size_t file_offset) const {
    check_owner();
    auto* address = static_cast<std::byte*>(to);
    size_t done = 0;
    while (done < num_bytes) {
        const ssize_t count = calls_.read(descriptor_, address + done, num_bytes - done, file_offset + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            fail("block file ", path_, ": cannot read ", num_bytes - done, " bytes at offset ", file_offset + done,
                 ": ", errno_text(errno));
        done += static_cast<size_t>(count);
        // A direct read is short in mid-page only where the file ends.
        if (done < num_bytes && (count == 0 || (direct_ && done % kPageBytes != 0)))
            fail("block file ", path_, ": is truncated: wanted ", num_bytes, " bytes at offset ", file_offset, ", got ",
                 done);
    }
    bytes_read_.fetch_add(num_bytes, std::memory_order_relaxed);
}

void BlockFile::write_plain(const void* from, size_t num_bytes, size_t file_offset) const {
    check_owner();
    const auto* address = static_cast<const std::byte*>(from);
    size_t done = 0;
    while (done < num_bytes) {
        const ssize_t count = calls_.write(descriptor_, address + done, num_bytes - done, file_offset + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            fail("block file ", path_, ": cannot write ", num_bytes - done, " bytes at offset ", file_offset + done,
                 ": ", count == 0 ? "nothing was written" : errno_text(errno));
        done += static_cast<size_t>(count);
    }
}

BlockFile::Place BlockFile::begin_read(size_t block, size_t num_bytes, size_t offset) {
    check_range(block, num_bytes, offset);
    const std::lock_guard lock(mutex_);
    const size_t slot = blocks_[block].slot;
    ++slots_[slot].num_readers;
    return {slots_[slot].offset + offset, slot};
}

void BlockFile::end_read(const Place& place) noexcept {
    const std::lock_guard lock(mutex_);
    if (--slots_[place.slot].num_readers == 0 && slots_[place.slot].freed)
        free_slot(place.slot);
}

// Parts that the range does not cover, or not whole, are not looked at.
void BlockFile::check_read(const Place& place, size_t block, const void* memory, size_t num_bytes,
                           size_t offset) const {
    const size_t block_bytes = layout_.block_bytes[block];
    const size_t part_bytes = layout_.part_bytes;
    for (size_t part = (offset + part_bytes - 1) / part_bytes; part < layout_.num_parts(block); ++part) {
        const size_t start = part * part_bytes;
        const size_t end = std::min(block_bytes, start + part_bytes);
        if (end > offset + num_bytes)
            return;
        const uint32_t found = crc32c(static_cast<const std::byte*>(memory) + (start - offset), end - start);
        const uint32_t expected = slots_[place.slot].checksums[part];
        if (found != expected)
            fail("block file ", path_, ": bytes ", start, " to ", end, " of block ", block, ", ", end - start,
                 " bytes at offset ", place.offset + (start - offset), ", are not what was written: checksum ",
                 hex_text(found), ", expected ", hex_text(expected));
    }
}

void BlockFile::read(size_t block, void* to, size_t num_bytes, size_t offset, size_t tail_bytes) {
    const Place place = begin_read(block, num_bytes, offset);
    const struct Reading {
        BlockFile& file;
        const Place& place;
        ~Reading() { file.end_read(place); }
    } reading{*this, place};
    auto* address = static_cast<std::byte*>(to);
    size_t at = place.offset;
    size_t left = num_bytes;
    Buffer buffer;
    while (left > 0) {
        const size_t in_page = direct_ ? at % kPageBytes : 0;
        size_t part = left;
        if (!direct_) {
            read_plain(address, left, at);
        } else if (in_page == 0 && is_page_aligned(address) &&
                   (left >= kPageBytes || left + tail_bytes >= kPageBytes)) {
            const size_t padded = align_up(left, kPageBytes);
            const size_t direct_bytes = padded - left <= tail_bytes ? padded : align_down(left, kPageBytes);
            part = std::min(left, direct_bytes);
            read_plain(address, direct_bytes, at);
        } else {
            if (!buffer)
                buffer = make_buffer(std::min(kMiB, align_up(in_page + left, kPageBytes)));
            part = std::min(left, kMiB - in_page);
            read_plain(buffer.get(), align_up(in_page + part, kPageBytes), at - in_page);
            std::memcpy(address, buffer.get() + in_page, part);
        }
        address += part;
        at += part;
        left -= part;
    }
    check_read(place, block, to, num_bytes, offset);
}

void BlockFile::begin_write(size_t block, const std::atomic<bool>* given_up) {
    check_range(block, 0, 0);
    std::unique_lock lock(mutex_);
    Block& state = blocks_[block];
    auto& spares = spares_[layout_.class_of_block[block]];
    const auto is_given_up = [given_up] { return given_up != nullptr && *given_up; };
    changed_.wait(
        lock, [&] { return !failed_.empty() || is_given_up() || (state.next_slot == SIZE_MAX && !spares.empty()); });
    if (!failed_.empty())
        fail(failed_);
    if (is_given_up())
        fail("block file ", path_, ": the write of block ", block, " was given up");
    state.next_slot = spares.back();
    spares.pop_back();
    state.parts_written = 0;
}

void BlockFile::wake() {
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
}

void BlockFile::write_chunk(size_t block, const void* from, size_t num_bytes, size_t offset, size_t tail_bytes) {
    check_range(block, num_bytes, offset);
    const size_t part_bytes = layout_.part_bytes;
    const size_t block_bytes = layout_.block_bytes[block];
    if (offset % part_bytes != 0 || (num_bytes % part_bytes != 0 && offset + num_bytes != block_bytes))
        throw std::logic_error(join_text("block file ", path_, ": a chunk of ", num_bytes, " bytes at ", offset,
                                         ", expected whole parts of ", part_bytes));
    Slot* slot = nullptr;
    {
        const std::lock_guard lock(mutex_);
        if (blocks_[block].next_slot == SIZE_MAX)
            throw std::logic_error(join_text("block file ", path_, ": block ", block, " is in no transaction"));
        slot = &slots_[blocks_[block].next_slot];
    }
    const auto* address = static_cast<const std::byte*>(from);
    for (size_t done = 0; done < num_bytes; done += part_bytes)
        slot->checksums[(offset + done) / part_bytes] = crc32c(address + done, std::min(part_bytes, num_bytes - done));
    const size_t place = slot->offset + offset;
    Buffer buffer;
    for (size_t done = 0; done < num_bytes;) {
        const size_t left = num_bytes - done;
        if (!direct_) {
            write_plain(address, left, place);
            break;
        }
        size_t part = 0;
        if (is_page_aligned(address) && align_up(left, kPageBytes) - left <= tail_bytes) {
            write_plain(address + done, align_up(left, kPageBytes), place + done);
            part = left;
        } else if (is_page_aligned(address) && left >= kPageBytes) {
            part = align_down(left, kPageBytes);
            write_plain(address + done, part, place + done);
        } else {
            if (!buffer)
                buffer = make_buffer(std::min(kMiB, align_up(left, kPageBytes)));
            part = std::min(left, kMiB);
            std::memcpy(buffer.get(), address + done, part);
            std::memset(buffer.get() + part, 0, align_up(part, kPageBytes) - part);
            write_plain(buffer.get(), align_up(part, kPageBytes), place + done);
        }
        done += part;
    }
    bytes_written_.fetch_add(num_bytes, std::memory_order_relaxed);
    blocks_[block].parts_written += (num_bytes + part_bytes - 1) / part_bytes;
}

void BlockFile::write(size_t block, const void* from, size_t num_bytes, size_t offset, std::optional<int64_t> version) {
    check_range(block, num_bytes, offset);
    if (num_bytes == 0 && !version)
        return;
    begin_write(block);
    try {
        const size_t block_bytes = layout_.block_bytes[block];
        const size_t part_bytes = layout_.part_bytes;
        const size_t end = offset + num_bytes;
        const auto* address = static_cast<const std::byte*>(from);
        Buffer buffer;
        for (size_t at = 0; at < block_bytes;) {
            size_t stop = std::min(block_bytes, at + part_bytes);
            if (offset <= at && stop <= end) { // and all whole parts that follow
                stop = end == block_bytes ? end : align_down(end, part_bytes);
                write_chunk(block, address + (at - offset), stop - at, at);
            } else {
                if (!buffer)
                    buffer = make_buffer(part_bytes);
                read(block, buffer.get(), stop - at, at, part_bytes - (stop - at));
                if (at < end && offset < stop) {
                    const size_t first = std::max(at, offset);
                    std::memcpy(buffer.get() + (first - at), address + (first - offset), std::min(stop, end) - first);
                }
                write_chunk(block, buffer.get(), stop - at, at, part_bytes - (stop - at));
            }
            at = stop;
        }
        commit(block, version.value_or(this->version(block)));
    } catch (...) {
        abandon(block);
        throw;
    }
}

void BlockFile::abandon(size_t block) noexcept {
    const std::lock_guard lock(mutex_);
    Block& state = blocks_[block];
    if (state.next_slot == SIZE_MAX)
        return;
    if (failed_.empty()) // else an entry on the disk may name it
        free_slot(state.next_slot);
    state.next_slot = SIZE_MAX;
    changed_.notify_all();
}

// Called with the lock held.
void BlockFile::free_slot(size_t slot) {
    slots_[slot].freed = slots_[slot].num_readers > 0;
    if (slots_[slot].freed)
        return;
    spares_[layout_.class_of_slot[slot]].push_back(slot); // of the capacity that it was given: does not throw
    changed_.notify_all();
}

// Called with the lock held.
void BlockFile::finish_commit(size_t block) {
    Block& state = blocks_[block];
    const size_t old_slot = state.slot;
    state.slot = state.next_slot;
    state.next_slot = SIZE_MAX;
    state.version = state.next_version;
    ++state.generation;
    if (kept(Ordering::block_slot_after_entry) || !layout_.durable)
        free_slot(old_slot);
    changed_.notify_all();
}

void BlockFile::commit(const std::vector<Commit>& commits) {
    std::unique_lock lock(mutex_);
    for (const Commit& one : commits) {
        check_range(one.block, 0, 0);
        Block& state = blocks_[one.block];
        if (state.next_slot == SIZE_MAX || state.parts_written != layout_.num_parts(one.block))
            throw std::logic_error(join_text("block file ", path_, ": a commit of block ", one.block, " with ",
                                             state.parts_written.load(), " of its ", layout_.num_parts(one.block),
                                             " parts written"));
        state.next_version = one.version;
    }
    for (const Commit& one : commits)
        if (layout_.durable)
            waiting_.push_back(one.block);
        else
            finish_commit(one.block);
    // By number, since the block's next transaction may have begun before this thread looks again. They grow together.
    const uint64_t last = num_commits_ += commits.size();
    const auto are_done = [&] { return !layout_.durable || num_committed_ >= last; };
    while (failed_.empty() && !are_done()) {
        if (committing_) {
            changed_.wait(lock);
            continue;
        }
        committing_ = true; // for all that wait by now
        batch_.swap(waiting_);
        if (!kept(Ordering::block_slot_after_entry))
            for (const size_t one : batch_)
                free_slot(blocks_[one].slot);
        lock.unlock();
        std::string failure;
        try {
            commit_batch();
        } catch (const std::exception& error) {
            failure = error.what();
        }
        lock.lock();
        committing_ = false;
        num_committed_ += failure.empty() ? batch_.size() : 0;
        if (failure.empty())
            for (const size_t one : batch_)
                finish_commit(one);
        else
            failed_ = failure;
        batch_.clear();
        changed_.notify_all();
    }
    if (!are_done())
        fail(failed_);
}

void BlockFile::commit_batch() {
    const auto write_copies = [this](int copy) {
        for (const size_t block : batch_)
            write_entry_copy(block, copy);
    };
    if (kept(Ordering::block_entry_after_data))
        sync_file();
    write_copies(0);
    if (!kept(Ordering::block_copy_after_entry))
        write_copies(1);
    if (kept(Ordering::block_commit_after_entry))
        sync_file();
    if (kept(Ordering::block_copy_after_entry))
        write_copies(1);
}

// Of the version that is being committed.
void BlockFile::write_entry_copy(size_t block, int copy) {
    const Block& state = blocks_[block];
    const size_t num_bytes = layout_.entry_bytes(block);
    write_entry(layout_, id_, block, {state.generation + 1, state.next_version, state.next_slot},
                slots_[state.next_slot].checksums.data(), entry_.get());
    write_plain(entry_.get(), num_bytes, layout_.entry_offset[block] + static_cast<size_t>(copy) * num_bytes);
    map_bytes_written_.fetch_add(num_bytes, std::memory_order_relaxed);
}

// A failed sync may have thrown away what it could not write: nothing is committed after it.
void BlockFile::sync_file() {
    check_owner();
    syncs_.fetch_add(1, std::memory_order_relaxed);
    int result = 0;
    do
        result = calls_.sync(descriptor_);
    while (result != 0 && errno == EINTR);
    if (result != 0)
        fail("block file ", path_, ": cannot be synced (all of it, from offset 0): ", errno_text(errno));
}

void BlockFile::sync() {
    try {
        sync_file();
    } catch (const std::exception& error) {
        const std::lock_guard lock(mutex_);
        if (failed_.empty())
            failed_ = error.what();
        changed_.notify_all();
        throw;
    }
}

size_t BlockFile::verify() {
    const size_t chunk_bytes = align_up(4 * kMiB, layout_.part_bytes);
    const Buffer buffer = make_buffer(chunk_bytes);
    size_t total = 0;
    for (size_t block = 0; block < layout_.block_bytes.size(); ++block)
        for (size_t at = 0; at < layout_.block_bytes[block]; at += chunk_bytes) {
            const size_t num_bytes = std::min(chunk_bytes, layout_.block_bytes[block] - at);
            read(block, buffer.get(), num_bytes, at, chunk_bytes - num_bytes);
            total += num_bytes;
        }
    return total;
}

BlockFile::Stats BlockFile::stats() const {
    return {direct_,
            layout_.durable,
            preallocated_,
            layout_.bytes_used,
            layout_.file_bytes,
            layout_.class_of_slot.size() - layout_.block_bytes.size(),
            bytes_read_.load(),
            bytes_written_.load(),
            map_bytes_written_.load(),
            syncs_.load(),
            fallback_};
}

void BlockFile::unlink() {
    if (unlinked_)
        return;
    if (calls_.unlink(path_.c_str()) != 0 && errno != ENOENT)
        fail("block file ", path_, ": cannot be removed: ", errno_text(errno));
    unlinked_ = true;
}

} // namespace distzo2
