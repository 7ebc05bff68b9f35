#include "runtime/io_ring.h"

#include <linux/io_uring.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "runtime/common.h"

namespace distzo2 {
namespace {

// The heads and tails are shared with the kernel: what stands before a tail is published by it.
unsigned load(const unsigned* index) { return __atomic_load_n(index, __ATOMIC_ACQUIRE); }
void store(unsigned* index, unsigned value) { __atomic_store_n(index, value, __ATOMIC_RELEASE); }

} // namespace

std::unique_ptr<IoRing> IoRing::create(unsigned depth, std::string* reason) {
    std::unique_ptr<IoRing> ring(new IoRing);
    return ring->open(depth, reason) ? std::move(ring) : nullptr;
}

bool IoRing::open(unsigned depth, std::string* reason) {
    io_uring_params parameters{};
    ring_ = static_cast<int>(syscall(__NR_io_uring_setup, depth + 1, &parameters)); // and the eventfd's
    if (ring_ < 0) {
        *reason = join_text("io_uring_setup: ", errno_text(errno));
        return false;
    }
    if ((parameters.features & IORING_FEAT_SINGLE_MMAP) == 0) { // before Linux 5.4
        *reason = "the kernel's io_uring is too old";
        return false;
    }
    if (!has_reads(reason))
        return false;
    queues_bytes_ = std::max(parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned),
                             parameters.cq_off.cqes + parameters.cq_entries * sizeof(io_uring_cqe));
    entries_bytes_ = parameters.sq_entries * sizeof(io_uring_sqe);
    void* const queues = mmap(nullptr, queues_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_,
                              static_cast<off_t>(IORING_OFF_SQ_RING));
    queues_ = queues == MAP_FAILED ? nullptr : queues;
    void* const entries = mmap(nullptr, entries_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_,
                               static_cast<off_t>(IORING_OFF_SQES));
    entries_ = entries == MAP_FAILED ? nullptr : static_cast<io_uring_sqe*>(entries);
    event_ = eventfd(0, EFD_CLOEXEC);
    if (queues_ == nullptr || entries_ == nullptr || event_ < 0) {
        *reason = join_text("io_uring's queues: ", errno_text(errno));
        return false;
    }
    auto* const base = static_cast<std::byte*>(queues_);
    const auto at = [base](unsigned offset) { return reinterpret_cast<unsigned*>(base + offset); };
    submit_head_ = at(parameters.sq_off.head);
    submit_tail_ = at(parameters.sq_off.tail);
    submit_array_ = at(parameters.sq_off.array);
    submit_mask_ = *at(parameters.sq_off.ring_mask);
    complete_head_ = at(parameters.cq_off.head);
    complete_tail_ = at(parameters.cq_off.tail);
    complete_mask_ = *at(parameters.cq_off.ring_mask);
    completions_ = reinterpret_cast<io_uring_cqe*>(base + parameters.cq_off.cqes);
    return true;
}

bool IoRing::has_reads(std::string* reason) const {
    constexpr unsigned kNumOperations = 64;
    std::vector<std::byte> memory(sizeof(io_uring_probe) + kNumOperations * sizeof(io_uring_probe_op));
    auto* const probe = reinterpret_cast<io_uring_probe*>(memory.data());
    if (syscall(__NR_io_uring_register, ring_, IORING_REGISTER_PROBE, probe, kNumOperations) != 0) {
        *reason = join_text("io_uring's probe: ", errno_text(errno)); // before Linux 5.6
        return false;
    }
    if (probe->last_op < IORING_OP_READ || (probe->ops[IORING_OP_READ].flags & IO_URING_OP_SUPPORTED) == 0) {
        *reason = "the kernel's io_uring has no reads";
        return false;
    }
    return true;
}

IoRing::~IoRing() {
    drain();
    if (listening_) { // the read of the eventfd ends as well
        wake();
        while (listening_) {
            if (enter(0, true) < 0 && errno != EINTR)
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            Completion ignored{};
            next(&ignored);
        }
    }
    if (entries_ != nullptr)
        munmap(entries_, entries_bytes_);
    if (queues_ != nullptr)
        munmap(queues_, queues_bytes_);
    if (event_ >= 0)
        close(event_);
    if (ring_ >= 0)
        close(ring_);
}

int IoRing::enter(unsigned num_to_submit, bool wait) const {
    return static_cast<int>(syscall(__NR_io_uring_enter, ring_, num_to_submit, wait ? 1 : 0,
                                    wait ? IORING_ENTER_GETEVENTS : 0, nullptr, 0));
}

void IoRing::push(int descriptor, void* to, size_t num_bytes, size_t offset, uint64_t tag) {
    const unsigned tail = *submit_tail_; // only written here
    const unsigned index = tail & submit_mask_;
    io_uring_sqe& entry = entries_[index];
    entry = {};
    entry.opcode = IORING_OP_READ;
    entry.fd = descriptor;
    entry.addr = reinterpret_cast<uint64_t>(to);
    entry.len = static_cast<unsigned>(num_bytes);
    entry.off = offset;
    entry.user_data = tag;
    submit_array_[index] = index;
    store(submit_tail_, tail + 1);
    ++num_queued_;
}

void IoRing::read(int descriptor, void* to, size_t num_bytes, size_t offset, uint64_t tag) {
    push(descriptor, to, num_bytes, offset, tag);
    ++num_in_flight_;
}

void IoRing::submit(bool wait) {
    if (wait && !listening_) {
        push(event_, &event_count_, sizeof event_count_, 0, kWake);
        listening_ = true;
    }
    constexpr int kMaxRefusals = 50'000;
    int num_refusals = 0;
    while (num_queued_ > 0 || (wait && load(complete_tail_) == *complete_head_)) {
        const bool has_completion = load(complete_tail_) != *complete_head_;
        const int result = enter(num_queued_, wait && !has_completion);
        if (result >= 0) {
            num_queued_ -= static_cast<unsigned>(result);
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EBUSY)
            fail("io_uring_enter: ", errno_text(errno));
        if (has_completion) // which the kernel wants taken first
            return;
        if (++num_refusals == kMaxRefusals)
            fail("io_uring_enter: ", errno_text(errno), ", for ", kMaxRefusals / 10'000, " s");
        std::this_thread::sleep_for(std::chrono::microseconds(100)); // short of memory: later
    }
}

bool IoRing::next(Completion* completion) {
    while (true) {
        const unsigned head = *complete_head_; // only written here
        if (head == load(complete_tail_))
            return false;
        const io_uring_cqe& entry = completions_[head & complete_mask_];
        *completion = {entry.user_data, entry.res};
        store(complete_head_, head + 1);
        if (completion->tag != kWake) {
            --num_in_flight_;
            return true;
        }
        listening_ = false;
    }
}

void IoRing::drain() noexcept {
    if (num_queued_ > 0) { // never handed over: the kernel has not seen them
        const unsigned forgotten = load(submit_tail_) - load(submit_head_);
        unsigned num_reads = 0;
        for (unsigned i = 0; i < forgotten; ++i) {
            const bool is_wake = entries_[(load(submit_head_) + i) & submit_mask_].user_data == kWake;
            listening_ = is_wake ? false : listening_;
            num_reads += is_wake ? 0 : 1;
        }
        store(submit_tail_, load(submit_head_));
        num_in_flight_ -= num_reads;
        num_queued_ = 0;
    }
    Completion ignored{};
    while (num_in_flight_ > 0)
        if (!next(&ignored) && enter(0, true) < 0 && errno != EINTR)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

void IoRing::wake() noexcept {
    const uint64_t one = 1;
    while (write(event_, &one, sizeof one) < 0 && errno == EINTR) {
    }
}

} // namespace distzo2
