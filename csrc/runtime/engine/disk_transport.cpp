#include "runtime/engine/disk_transport.h"

#include "runtime/mutations.h"

#include <algorithm>
#include <stdexcept>
#include <system_error>

namespace distzo2 {

DiskTransport::DiskTransport(EngineState& state, std::shared_ptr<BlockFile> file, std::shared_ptr<RangeFiles> ranges,
                             std::shared_ptr<HostPool> staging, const DiskOptions& options)
    : state_(state), device_(*state.device), file_(std::move(file)), ranges_(std::move(ranges)),
      num_file_blocks_(file_ ? static_cast<int>(file_->block_bytes().size()) : 0),
      part_bytes_(file_ ? file_->part_bytes() : kMiB), options_(options), slots_(state.slots.size()),
      storing_slot_(state.block_bytes.size(), -1), is_committing_(state.block_bytes.size(), 0) {
    if (options_.num_readers < 1 || options_.num_writers < 1 || options_.chunk_bytes == 0 ||
        options_.chunk_bytes % part_bytes_ != 0)
        throw std::invalid_argument(join_text("disk transport: expected at least one reader and writer and chunks of a "
                                              "multiple of ",
                                              part_bytes_, " bytes, got ", options_.num_readers, ", ",
                                              options_.num_writers, " and ", options_.chunk_bytes));
    if (!file_)
        options_.num_writers = 0;
    pieces_.resize(static_cast<size_t>(options_.num_readers + options_.num_writers));
    const DeviceGuard guard(device_);
    try {
        if (!device_.is_cpu())
            give_staging(std::move(staging));
        start_threads();
    } catch (...) {
        stop();
        throw;
    }
}

DiskTransport::~DiskTransport() { stop(); }

// Each read and write gets one chunk of staging; chunks shrink when the pool is smaller than one of full size for each.
void DiskTransport::give_staging(std::shared_ptr<HostPool> staging) {
    if (!staging)
        staging = std::make_shared<HostPool>(std::vector<size_t>(pieces_.size(), options_.chunk_bytes), state_.device,
                                             HostPoolOptions{.pin = true});
    staging_ = staging->arena();
    staging_chunk_bytes_ = staging->chunk_bytes();
    const size_t share = align_down(staging_->num_bytes() / pieces_.size(), part_bytes_);
    if (share == 0)
        throw std::invalid_argument(join_text("staging: ", bytes_text(staging_->num_bytes()), " are too few for ",
                                              pieces_.size(), " transfers, which need ", part_bytes_, " each"));
    options_.chunk_bytes = std::min(options_.chunk_bytes, share);
    for (size_t i = 0; i < pieces_.size(); ++i) {
        pieces_[i].staging = staging_->data() + i * options_.chunk_bytes;
        pieces_[i].stream = device_.create_stream(false);
        pieces_[i].copied = device_.create_event(false);
    }
}

void DiskTransport::start_threads() {
    const size_t num_readers = static_cast<size_t>(options_.num_readers);
    threads_.reserve(pieces_.size());
    to_commit_.reserve(is_committing_.size());
    try {
        if (file_ && file_->is_durable())
            committer_ = std::thread([this] { run_committer(); });
        for (size_t i = 0; i < pieces_.size(); ++i)
            threads_.emplace_back([this, i, num_readers] {
                if (i < num_readers)
                    run_reader(pieces_[i]);
                else
                    run_writer(pieces_[i]);
            });
    } catch (const std::system_error& error) {
        fail(file_ ? join_text("block file ", file_->path()) : "range files",
             ": cannot start a thread for its transfers: ", error.what());
    }
}

void DiskTransport::stop() noexcept {
    {
        const std::lock_guard lock(state_.mutex);
        stopping_ = true;
        loads_.notify_all();
        stores_.notify_all();
        if (file_ && !state_.error.empty() && !writes_given_up_.exchange(true))
            file_->wake(); // a writer may be waiting for a slot of the file that a failed download keeps
    }
    for (std::thread& thread : threads_)
        thread.join();
    threads_.clear();
    {
        const std::lock_guard lock(state_.mutex);
        writers_ended_ = true;
        commits_.notify_all();
    }
    if (committer_.joinable())
        committer_.join();
    try {
        const DeviceGuard guard(device_);
        for (const Piece& piece : pieces_) {
            if (piece.stream != nullptr)
                device_.destroy_stream(piece.stream);
            if (piece.copied != nullptr)
                device_.destroy_event(piece.copied);
        }
        for (SlotState& slot : slots_)
            slot.readers.destroy(device_);
    } catch (const std::exception&) { // the driver is gone, at the end of the process, and all of this with it
    }
    for (const SlotState& slot : slots_) // what failed midway
        if (slot.store.phase == Phase::kRunning && !slot.store.opening)
            file_->abandon(static_cast<size_t>(slot.store.block));
    for (size_t block = 0; block < is_committing_.size(); ++block)
        if (is_committing_[block] != 0)
            file_->abandon(block);
    pieces_.clear();
    slots_.clear();
}

// Whether an upload has chunks to begin, now or after what it waits for. Called with the lock held, as all that follow.
bool DiskTransport::has_loads() const {
    return std::any_of(slots_.begin(), slots_.end(), [](const SlotState& slot) {
        return slot.load.phase != Phase::kNone && slot.load.num_begun < slot.load.num_chunks;
    });
}

bool DiskTransport::may_load(const SlotState& slot) const {
    if (slot.store.phase != Phase::kNone && kept(Ordering::file_upload_after_slot_is_stored))
        return false;
    return is_stored(slot.load.block) || !kept(Ordering::file_upload_after_block_is_stored);
}

bool DiskTransport::is_stored(int block) const {
    return storing_slot_[block] < 0 && is_committing_[static_cast<size_t>(block)] == 0;
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
        if (ticket.phase == Phase::kNone || ticket.opening || ticket.num_begun == ticket.num_chunks)
            continue;
        if (!(up ? may_load(slots_[i])
                 : is_open(ticket) && !is_being_read(ticket.block) && is_committing_[ticket.block] == 0))
            continue;
        if (best_ticket == nullptr || ticket.urgent > best_ticket->urgent ||
            (ticket.urgent == best_ticket->urgent && ticket.order < best_ticket->order)) {
            best = static_cast<int>(i);
            best_ticket = &ticket;
        }
    }
    return best;
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
    if (up && storing_slot_[ticket.block] >= 0)
        stores_.notify_all();
    if (!up && has_loads())
        loads_.notify_all();
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
    if (state.present)
        return;
    queue(state.load, block, urgent, 0);
    loads_.notify_all();
}

void DiskTransport::hurry(int slot) {
    if (slots_[slot].load.phase != Phase::kNone)
        slots_[slot].load.urgent = true;
}

void DiskTransport::download(int block, int slot, int64_t version) {
    if (block >= num_file_blocks_)
        throw std::logic_error(join_text("copy engine: block ", block, " is of files that are only read"));
    storing_slot_[block] = slot;
    Ticket& store = slots_[slot].store;
    queue(store, block, false, version);
    if (!is_open(store))
        return; // set_durable() wakes the writers
    if (store.num_chunks == 1)
        stores_.notify_one();
    else
        stores_.notify_all();
}

std::optional<int64_t> DiskTransport::recall_download(int block, int slot) {
    Ticket& store = slots_[slot].store;
    if (store.phase != Phase::kQueued || store.block != block)
        return std::nullopt;
    store.phase = Phase::kNone;
    storing_slot_[block] = -1;
    ++state_.recorder.stats.recalled_downloads;
    if (has_loads())
        loads_.notify_all();
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
    stores_.notify_all();
    state_.changed.notify_all();
}

void DiskTransport::flush(Lock& lock) {
    state_.changed.wait(lock, [&] {
        return !state_.error.empty() || state_.closing ||
               (std::all_of(storing_slot_.begin(), storing_slot_.end(), [](int slot) { return slot < 0; }) &&
                std::none_of(is_committing_.begin(), is_committing_.end(), [](char one) { return one != 0; }));
    });
    state_.raise_if_failed();
    if (state_.closing)
        fail("the copy engine was closed while it was flushed");
}

} // namespace distzo2
