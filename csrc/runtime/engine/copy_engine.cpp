#include "runtime/engine/copy_engine.h"

#include <unistd.h>

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace distzo2 {

// Holds the lock and the device for a public function. What a transfer or the driver throws is kept as the engine's
// failure, since the order of what was issued can no longer be vouched for; what the caller did wrong is not.
struct CopyEngine::Call {
    explicit Call(CopyEngine& engine, bool raise = true) : engine_(engine), lock(engine.state_->mutex) {
        if (engine.state_->closing)
            throw std::logic_error("the copy engine is closed");
        if (raise)
            engine.state_->raise_if_failed();
        engine.state_->device->enter();
        ++engine.num_calls_;
    }
    ~Call() {
        engine_.state_->device->leave();
        if (!lock.owns_lock())
            lock.lock();
        if (--engine_.num_calls_ == 0 && engine_.state_->closing)
            engine_.state_->changed.notify_all();
    }
    template <typename Body>
    auto run(Body body) {
        try {
            return body();
        } catch (const std::logic_error&) {
            throw;
        } catch (const std::exception& error) {
            if (!lock.owns_lock())
                lock.lock();
            if (!engine_.state_->closing)
                engine_.state_->fail(error.what());
            throw;
        }
    }
    CopyEngine& engine_;
    Lock lock;
};

CopyEngine::CopyEngine(std::shared_ptr<Device> device, const HostPool& pool, std::vector<std::byte*> slots,
                       size_t slot_bytes, Stream stream)
    : state_(std::make_unique<EngineState>()), slots_(slots.size()), slot_of_block_(pool.num_blocks(), -1),
      owner_process_(getpid()) {
    state_->device = std::move(device);
    state_->block_bytes = pool.block_bytes();
    state_->slots = std::move(slots);
    state_->slot_bytes = slot_bytes;
    check_slots();
    transport_ = std::make_unique<StreamTransport>(*state_, pool);
    order_slots_behind(stream);
}

CopyEngine::CopyEngine(std::shared_ptr<Device> device, std::shared_ptr<BlockFile> file, std::vector<std::byte*> slots,
                       size_t slot_bytes, std::shared_ptr<HostPool> staging, const DiskOptions& options, Stream stream,
                       std::shared_ptr<RangeFiles> ranges)
    : state_(std::make_unique<EngineState>()), slots_(slots.size()), owner_process_(getpid()) {
    if (!file && !ranges)
        throw std::invalid_argument("copy engine: expected a source of blocks");
    state_->device = std::move(device);
    auto& block_bytes = state_->block_bytes;
    if (file)
        block_bytes = file->block_bytes();
    if (ranges)
        block_bytes.insert(block_bytes.end(), ranges->block_bytes().begin(), ranges->block_bytes().end());
    slot_of_block_.resize(block_bytes.size(), -1);
    state_->slots = std::move(slots);
    state_->slot_bytes = slot_bytes;
    check_slots();
    for (const std::byte* slot : state_->slots)
        if (state_->device->is_cpu() && !is_page_aligned(slot))
            throw std::invalid_argument("copy engine: slots that a file is read into must start at a multiple of 4096");
    transport_ =
        std::make_unique<DiskTransport>(*state_, std::move(file), std::move(ranges), std::move(staging), options);
    order_slots_behind(stream);
}

void CopyEngine::set_tails(std::vector<size_t> num_bytes) {
    const auto& sizes = state_->block_bytes;
    if (!std::equal(num_bytes.begin(), num_bytes.end(), sizes.begin(), sizes.end(), std::less_equal<size_t>()))
        throw std::invalid_argument("copy engine: expected a tail for each block, and none longer than its block");
    const Lock lock(state_->mutex);
    state_->tails = std::move(num_bytes);
}

void CopyEngine::check_slots() const {
    if (slots_.size() < 2)
        throw std::invalid_argument(join_text("copy engine: expected at least 2 slots, got ", slots_.size()));
    for (const std::byte* slot : state_->slots)
        if (slot == nullptr)
            throw std::invalid_argument("copy engine: a slot's address is 0");
}

// As if all that is on the stream had read every slot.
void CopyEngine::order_slots_behind(Stream stream) {
    const Lock lock(state_->mutex);
    const DeviceGuard guard(*state_->device);
    for (size_t i = 0; i < slots_.size(); ++i)
        transport_->reader_done(static_cast<int>(i), stream);
}

CopyEngine::~CopyEngine() { close(); }

void CopyEngine::close() noexcept {
    if (!state_)
        return;
    if (getpid() != owner_process_) { // a forked child has none of the threads: leave all as it is
        static_cast<void>(transport_.release());
        static_cast<void>(
            state_.release()); // even to destroy a condition waits for threads that it believes to be there
        return;
    }
    {
        Lock lock(state_->mutex);
        state_->closing = true;
        state_->changed.notify_all();
        if (closed_)
            return;
        closed_ = true;
        state_->changed.wait(lock, [&] { return num_calls_ == 0; });
    }
    transport_->stop();
    transport_.reset();
}

int CopyEngine::slot_of(int block) const {
    if (block < 0 || static_cast<size_t>(block) >= slot_of_block_.size())
        throw std::out_of_range(join_text("no block ", block, ": the copy engine has ", slot_of_block_.size()));
    if (state_->block_bytes[block] > state_->slot_bytes) // a file may hold others, which are read without slots
        throw std::invalid_argument(join_text("copy engine: block ", block, " has ", state_->block_bytes[block],
                                              " bytes, and a slot ", state_->slot_bytes));
    return slot_of_block_[block];
}

// A prefetch that nobody acquired for long was in vain, and its slot is like any other.
bool CopyEngine::is_wanted(const Slot& slot) const {
    return slot.wanted && num_acquires_ - slot.wanted_since <= 2 * slots_.size();
}

// The slot that costs least to give up, or -1: first by how long it makes wait, then by how long ago it was released.
int CopyEngine::choose(bool for_acquire) {
    constexpr int kNever = 100;
    int best = -1;
    int best_rank = kNever;
    uint64_t best_use = 0;
    for (size_t i = 0; i < slots_.size(); ++i) {
        const Slot& slot = slots_[i];
        if (slot.num_holders > 0)
            continue;
        const SlotPhase phase = transport_->phase(static_cast<int>(i));
        const bool wanted = is_wanted(slot);
        int rank = 0;
        if (!wanted && !phase.queued && !phase.loading)
            rank = phase.gated ? 3 : phase.storing ? 1 : 0;
        else if (!for_acquire)
            continue;
        else if (phase.queued)
            rank = phase.storing ? 4 : 2; // a prefetch that has not begun: only its turn is lost
        else
            rank = phase.loading ? 6 : 5;
        // Among prefetched ones the latest is needed last.
        const uint64_t use = slot.block < 0 ? 0 : wanted ? ~slot.last_use : slot.last_use;
        if (rank < best_rank || (rank == best_rank && use < best_use)) {
            best = static_cast<int>(i);
            best_rank = rank;
            best_use = use;
        }
    }
    return best;
}

void CopyEngine::assign(int index, int block, bool urgent) {
    Slot& slot = slots_[index];
    if (slot.block >= 0)
        slot_of_block_[slot.block] = -1;
    slot = {};
    slot.block = block;
    slot_of_block_[block] = index;
    transport_->upload(block, index, urgent);
}

bool CopyEngine::prefetch(int block) {
    Call call(*this);
    return call.run([&] {
        int index = slot_of(block);
        if (index < 0) {
            index = choose(false);
            if (index < 0 || !transport_->take(index))
                return false;
            assign(index, block, false);
        }
        Slot& slot = slots_[index];
        if (slot.num_holders == 0) {
            slot.wanted = true;
            slot.wanted_since = num_acquires_;
            slot.last_use = ++num_uses_;
        }
        return true;
    });
}

int CopyEngine::claim(Lock& lock, int block) {
    while (true) {
        if (const int index = slot_of(block); index >= 0) {
            ++state_->recorder.stats.hits;
            transport_->hurry(index);
            return index;
        }
        int index = transport_->storing_slot(block); // given to another block that has not come in: take it back
        if (index < 0 || slots_[index].num_holders > 0)
            index = choose(true);
        if (index < 0)
            throw std::logic_error(join_text("block ", block, " cannot be acquired: all ", slots_.size(),
                                             " slots are; release one first"));
        if (transport_->take(index)) {
            assign(index, block, true);
            return index;
        }
        state_->changed.wait(lock); // for the upload that is under way there
        if (state_->closing)
            throw std::logic_error("the copy engine is closed");
        state_->raise_if_failed();
    }
}

int CopyEngine::acquire(int block, Stream stream) {
    Call call(*this);
    return call.run([&] {
        const int64_t start_ns = now_ns();
        const int index = claim(call.lock, block);
        Slot& slot = slots_[index];
        ++num_acquires_;
        ++state_->recorder.stats.acquires;
        ++slot.num_holders;
        slot.wanted = false;
        // A download that has not begun waits for this holder, who may change the block.
        if (const auto version = transport_->recall_download(block, index)) {
            slot.dirty = true;
            slot.version = std::max(slot.version, *version);
        }
        try {
            transport_->await(call.lock, block, index, stream);
        } catch (...) {
            if (!call.lock.owns_lock())
                call.lock.lock();
            --slot.num_holders;
            throw;
        }
        const int64_t end_ns = now_ns();
        state_->recorder.stats.wait_s += static_cast<double>(end_ns - start_ns) * 1e-9;
        if (!transport_->times_waits())
            state_->recorder.add({TicketKind::kWait, block, index, state_->block_bytes[block], start_ns, end_ns});
        return index;
    });
}

void CopyEngine::release(int block, Stream stream, bool dirty, int64_t version) {
    Call call(*this);
    call.run([&] {
        const int index = slot_of(block);
        if (index < 0 || slots_[index].num_holders == 0)
            throw std::logic_error(join_text("block ", block, " was released and is not acquired"));
        Slot& slot = slots_[index];
        transport_->reader_done(index, stream);
        if (dirty) {
            slot.version = std::max(slot.version, version);
            slot.dirty = true;
        }
        slot.last_use = ++num_uses_;
        if (--slot.num_holders == 0 && slot.dirty) {
            slot.dirty = false;
            transport_->download(block, index, slot.version);
            slot.version = 0;
        }
    });
}

void CopyEngine::set_durable(int64_t version) {
    const std::lock_guard lock(state_->mutex);
    if (!state_->closing)
        transport_->set_durable(version);
}

void CopyEngine::fail(const std::string& reason) {
    const std::lock_guard lock(state_->mutex);
    state_->fail(reason);
}

void CopyEngine::drop(int block) {
    Call call(*this);
    call.run([&] {
        const int index = slot_of(block);
        if (index < 0)
            return;
        if (slots_[index].num_holders > 0)
            throw std::logic_error(join_text("block ", block, " is acquired and cannot be dropped"));
        transport_->take(index);
        slot_of_block_[block] = -1;
        slots_[index] = {};
    });
}

std::vector<int> CopyEngine::present() {
    Call call(*this);
    return call.run([&] {
        std::vector<int> blocks;
        for (size_t block = 0; block < slot_of_block_.size(); ++block)
            if (slot_of_block_[block] >= 0 && transport_->is_present(slot_of_block_[block]))
                blocks.push_back(static_cast<int>(block));
        return blocks;
    });
}

void CopyEngine::flush() {
    Call call(*this);
    call.run([&] { transport_->flush(call.lock); });
}

EngineStats CopyEngine::stats() {
    {
        const std::lock_guard lock(state_->mutex);
        if (state_->closing || !state_->error.empty())
            return state_->recorder.stats;
    }
    Call call(*this, false);
    return call.run([&] {
        transport_->update_stats();
        return state_->recorder.stats;
    });
}

void CopyEngine::reset_stats() {
    stats();
    const std::lock_guard lock(state_->mutex);
    state_->recorder.stats = {};
}

void CopyEngine::trace(bool enable) {
    stats();
    const std::lock_guard lock(state_->mutex);
    state_->recorder.trace(enable);
}

std::vector<TraceEvent> CopyEngine::events() {
    stats();
    const std::lock_guard lock(state_->mutex);
    return state_->recorder.events();
}

} // namespace distzo2
