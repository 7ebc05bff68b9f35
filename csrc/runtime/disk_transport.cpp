#include "runtime/disk_transport.h"

#include "runtime/mutations.h"

#include <algorithm>
#include <stdexcept>
#include <system_error>

namespace distzo2 {

DiskTransport::DiskTransport(EngineState& state, std::shared_ptr<BlockFile> file, std::shared_ptr<HostPool> staging,
                             const DiskOptions& options)
    : state_(state), device_(*state.device), file_(std::move(file)), options_(options), slots_(state.slots.size()),
      storing_slot_(state.block_bytes.size(), -1) {
    if (options_.num_readers < 1 || options_.num_writers < 1 || options_.chunk_bytes == 0 ||
        options_.chunk_bytes % kPageBytes != 0)
        throw std::invalid_argument(join_text("disk transport: expected at least one reader and writer and chunks of a "
                                              "multiple of 4096 bytes, got ",
                                              options_.num_readers, ", ", options_.num_writers, " and ",
                                              options_.chunk_bytes));
    const DeviceGuard guard(device_);
    for (int i = 0; i < options_.num_readers; ++i)
        workers_.push_back({Direction::kUpload, nullptr, nullptr, {}});
    for (int i = 0; i < options_.num_writers; ++i)
        workers_.push_back({Direction::kDownload, nullptr, nullptr, {}});
    try {
        if (!device_.is_cpu())
            give_staging(std::move(staging));
        make_workers();
    } catch (...) {
        stop();
        throw;
    }
}

DiskTransport::~DiskTransport() { stop(); }

// Each worker gets one chunk of staging; chunks shrink when the pool is smaller than one of full size for each.
void DiskTransport::give_staging(std::shared_ptr<HostPool> staging) {
    if (!staging)
        staging = std::make_shared<HostPool>(std::vector<size_t>(workers_.size(), options_.chunk_bytes), state_.device,
                                             HostPoolOptions{.pin = true});
    staging_ = staging->arena();
    staging_chunk_bytes_ = staging->chunk_bytes();
    const size_t share = align_down(staging_->num_bytes() / workers_.size(), kPageBytes);
    if (share == 0)
        throw std::invalid_argument(join_text("staging: ", bytes_text(staging_->num_bytes()), " are too few for ",
                                              workers_.size(), " workers, which need 4096 each"));
    options_.chunk_bytes = std::min(options_.chunk_bytes, share);
    for (size_t i = 0; i < workers_.size(); ++i) {
        workers_[i].staging = staging_->data() + i * options_.chunk_bytes;
        workers_[i].stream = device_.create_stream(false);
    }
}

void DiskTransport::make_workers() {
    try {
        for (Worker& worker : workers_)
            worker.thread = std::thread([this, &worker] { run(worker); });
    } catch (const std::system_error& error) {
        fail("block file ", file_->path(), ": cannot start a thread for its transfers: ", error.what());
    }
}

void DiskTransport::stop() noexcept {
    {
        const std::lock_guard lock(state_.mutex);
        stopping_ = true;
        work_.notify_all();
    }
    for (Worker& worker : workers_)
        if (worker.thread.joinable())
            worker.thread.join();
    try {
        const DeviceGuard guard(device_);
        for (Worker& worker : workers_)
            if (worker.stream != nullptr)
                device_.destroy_stream(worker.stream);
        for (SlotState& slot : slots_)
            slot.readers.destroy(device_);
    } catch (const std::exception&) { // the driver is gone, at the end of the process, and all of this with it
    }
    workers_.clear();
    slots_.clear();
}

bool DiskTransport::may_load(const SlotState& slot) const {
    if (slot.store.phase != Phase::kNone && kept(Ordering::file_upload_after_slot_is_stored))
        return false;
    return storing_slot_[slot.load.block] < 0 || !kept(Ordering::file_upload_after_block_is_stored);
}

// By an upload that was dropped after it had begun: what it reads is thrown away, but is not written meanwhile. Its
// chunks that have not begun wait for the download in turn (may_load).
bool DiskTransport::is_being_read(int block) const {
    return kept(Ordering::file_download_after_uploads) &&
           std::any_of(slots_.begin(), slots_.end(), [block](const SlotState& slot) {
               return slot.load.phase == Phase::kRunning && slot.load.block == block &&
                      slot.load.num_done < slot.load.num_begun;
           });
}

bool DiskTransport::is_open(const Ticket& ticket) const {
    return ticket.version <= durable_ || !kept(Ordering::file_download_after_journal);
}

// The slot whose ticket has a chunk to begin, or -1: urgent ones first, then in the order of asking.
int DiskTransport::next_slot(Direction direction) const {
    if (!state_.error.empty() || (stopping_ && direction == Direction::kUpload))
        return -1;
    int best = -1;
    const Ticket* best_ticket = nullptr;
    for (size_t i = 0; i < slots_.size(); ++i) {
        const bool up = direction == Direction::kUpload;
        const Ticket& ticket = up ? slots_[i].load : slots_[i].store;
        if (ticket.phase == Phase::kNone || ticket.num_begun == ticket.num_chunks)
            continue;
        if (!(up ? may_load(slots_[i]) : is_open(ticket) && !is_being_read(ticket.block)))
            continue;
        if (best_ticket == nullptr || ticket.urgent > best_ticket->urgent ||
            (ticket.urgent == best_ticket->urgent && ticket.order < best_ticket->order)) {
            best = static_cast<int>(i);
            best_ticket = &ticket;
        }
    }
    return best;
}

void DiskTransport::run(Worker& worker) {
    const bool up = worker.direction == Direction::kUpload;
    Lock lock(state_.mutex);
    while (true) {
        const int slot = next_slot(worker.direction);
        if (slot < 0) {
            if (stopping_)
                return;
            work_.wait(lock);
            continue;
        }
        Ticket& ticket = up ? slots_[slot].load : slots_[slot].store;
        const size_t chunk = ticket.num_begun++;
        const int block = ticket.block;
        if (ticket.phase == Phase::kQueued) {
            ticket.phase = Phase::kRunning;
            ticket.start_ns = now_ns();
            EngineStats& stats = state_.recorder.stats;
            ++(up ? stats.uploads : stats.downloads);
            (up ? stats.bytes_up : stats.bytes_down) += state_.block_bytes[block];
        }
        lock.unlock();
        std::string failure;
        try {
            transfer(worker, block, slot, chunk);
        } catch (const std::exception& error) {
            failure = error.what();
        }
        lock.lock();
        if (!failure.empty())
            state_.fail(failure);
        if (++ticket.num_done == ticket.num_chunks && state_.error.empty())
            finish(worker.direction, slot);
        else if (up && storing_slot_[block] >= 0)
            work_.notify_all(); // its download may be waiting for this read
    }
}

void DiskTransport::transfer(Worker& worker, int block, int slot, size_t chunk) {
    const size_t block_bytes = state_.block_bytes[block];
    const size_t offset = chunk * options_.chunk_bytes;
    const size_t num_bytes = std::min(options_.chunk_bytes, block_bytes - offset);
    const bool up = worker.direction == Direction::kUpload;
    std::byte* const in_slot = state_.slots[slot] + offset;
    if (options_.hook)
        options_.hook(worker.direction, block, offset, in_slot, num_bytes);
    if (device_.is_cpu()) {
        if (up)
            file_->read(block, in_slot, num_bytes, offset, state_.slot_bytes - block_bytes);
        else
            file_->write(block, in_slot, num_bytes, offset);
        return;
    }
    const DeviceGuard guard(device_);
    const auto copy = [&] {
        if (kept(up ? Ordering::file_upload_after_readers : Ordering::file_download_after_readers))
            slots_[slot].readers.wait(device_, worker.stream); // they do not change while a transfer is under way
        HostPool::for_each_chunk(
            staging_->data(), staging_chunk_bytes_, worker.staging, num_bytes, [&](std::byte* part, size_t part_bytes) {
                std::byte* const there = in_slot + (part - worker.staging);
                device_.copy(worker.stream, up ? there : part, up ? part : there, part_bytes, worker.direction);
            });
        if (kept(Ordering::file_after_staging_copy))
            device_.synchronize_stream(worker.stream);
    };
    if (!up)
        copy();
    if (up)
        file_->read(block, worker.staging, num_bytes, offset, options_.chunk_bytes - num_bytes);
    else
        file_->write(block, worker.staging, num_bytes, offset);
    if (up)
        copy();
}

void DiskTransport::finish(Direction direction, int slot) {
    SlotState& state = slots_[slot];
    const bool up = direction == Direction::kUpload;
    Ticket& ticket = up ? state.load : state.store;
    const int64_t end_ns = now_ns();
    EngineStats& stats = state_.recorder.stats;
    (up ? stats.upload_s : stats.download_s) += static_cast<double>(end_ns - ticket.start_ns) * 1e-9;
    state_.recorder.add({up ? TicketKind::kUpload : TicketKind::kDownload, ticket.block, slot,
                         state_.block_bytes[ticket.block], ticket.start_ns, end_ns});
    if (up) {
        state.present = true;
        state.readers.clear();
    } else {
        storing_slot_[ticket.block] = -1;
    }
    ticket.phase = Phase::kNone;
    state_.changed.notify_all();
    work_.notify_all();
}

void DiskTransport::queue(Ticket& ticket, int block, bool urgent, int64_t version) {
    ticket = {};
    ticket.phase = Phase::kQueued;
    ticket.block = block;
    ticket.urgent = urgent;
    ticket.order = next_order_++;
    ticket.version = version;
    ticket.num_chunks =
        std::max<size_t>(1, (state_.block_bytes[block] + options_.chunk_bytes - 1) / options_.chunk_bytes);
    work_.notify_all();
}

SlotPhase DiskTransport::phase(int slot) {
    const SlotState& state = slots_[slot];
    return {.queued = state.load.phase == Phase::kQueued,
            .loading = state.load.phase == Phase::kRunning,
            .storing = state.store.phase != Phase::kNone,
            .gated = state.store.phase == Phase::kQueued && !is_open(state.store)};
}

bool DiskTransport::take(int slot) {
    Ticket& load = slots_[slot].load;
    if (load.phase == Phase::kRunning)
        return false;
    if (load.phase == Phase::kQueued) {
        load.phase = Phase::kNone;
        ++state_.recorder.stats.recalled_uploads;
    }
    return true;
}

void DiskTransport::upload(int block, int slot, bool urgent) {
    SlotState& state = slots_[slot];
    // While its download is to come or under way no other block has come in: the bytes are still there.
    state.present = state.store.phase != Phase::kNone && state.store.block == block;
    if (!state.present)
        queue(state.load, block, urgent, 0);
}

void DiskTransport::hurry(int slot) {
    if (slots_[slot].load.phase != Phase::kNone)
        slots_[slot].load.urgent = true;
}

void DiskTransport::download(int block, int slot, int64_t version) {
    storing_slot_[block] = slot;
    queue(slots_[slot].store, block, false, version);
}

std::optional<int64_t> DiskTransport::recall_download(int block, int slot) {
    Ticket& store = slots_[slot].store;
    if (store.phase != Phase::kQueued || store.block != block)
        return std::nullopt;
    store.phase = Phase::kNone;
    storing_slot_[block] = -1;
    ++state_.recorder.stats.recalled_downloads;
    work_.notify_all();
    return store.version;
}

void DiskTransport::await(Lock& lock, int block, int slot, Stream stream) {
    const SlotState& state = slots_[slot];
    state_.changed.wait(lock, [&] {
        const bool loaded = state.present || !kept(Ordering::file_reader_after_upload);
        const bool stored = state.store.phase == Phase::kNone || !kept(Ordering::file_reader_after_slot_is_stored);
        return !state_.error.empty() || state_.closing || (loaded && stored);
    });
    state_.raise_if_failed();
    if (state_.closing)
        fail("the copy engine was closed while block ", block, " was awaited");
    if (kept(Ordering::file_reader_after_readers))
        state.readers.wait(device_, stream, true);
}

void DiskTransport::reader_done(int slot, Stream stream) {
    if (!device_.is_cpu()) // there, a reader is done when it releases
        slots_[slot].readers.record(device_, stream);
}

void DiskTransport::set_durable(int64_t version) {
    durable_ = version;
    work_.notify_all();
    state_.changed.notify_all();
}

void DiskTransport::flush(Lock& lock) {
    state_.changed.wait(lock, [&] {
        return !state_.error.empty() || state_.closing ||
               std::all_of(storing_slot_.begin(), storing_slot_.end(), [](int slot) { return slot < 0; });
    });
    state_.raise_if_failed();
    if (state_.closing)
        fail("the copy engine was closed while it was flushed");
}

} // namespace distzo2
