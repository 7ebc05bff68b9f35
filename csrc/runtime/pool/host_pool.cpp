#include "runtime/pool/host_pool.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <fstream>
#include <future>
#include <stdexcept>
#include <system_error>
#include <thread>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 // Linux 5.14
#endif

namespace distzo2 {
namespace {

constexpr size_t kTouchBytes = 16 * kMiB; // one thread's share at a time
constexpr unsigned kMaxTouchThreads = 16;

std::atomic<size_t> num_arenas_made{0};

// 0 or an errno. Populating gives an error where a store to the page would end the process.
int touch_range(std::byte* address, size_t num_bytes) {
    while (madvise(address, num_bytes, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINVAL) { // an older kernel: store to each page
            for (size_t i = 0; i < num_bytes; i += kPageBytes)
                *reinterpret_cast<volatile char*>(address + i) = 0;
            return 0;
        }
        if (errno != EINTR && errno != EAGAIN)
            return errno;
    }
    return 0;
}

// Of the whole machine, since it started; 0 where the kernel does not count them.
uint64_t compaction_stalls() {
    std::ifstream file("/proc/vmstat");
    std::string name;
    for (uint64_t value = 0; file >> name >> value;)
        if (name == "compact_stall")
            return value;
    return 0;
}

} // namespace

bool stalled_for_huge_pages(size_t num_bytes, double seconds, double min_bytes_per_s, uint64_t stalls_before,
                            uint64_t stalls_after) {
    if (std::isinf(min_bytes_per_s))
        return true;
    return stalls_after > stalls_before && static_cast<double>(num_bytes) < min_bytes_per_s * seconds;
}

Arena::Arena(size_t num_bytes) : num_bytes_(std::max(align_up(num_bytes, kPageBytes), kPageBytes)) {
    void* address =
        mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED)
        fail("cannot map ", bytes_text(num_bytes_), " of host memory: ", errno_text(errno));
    data_ = static_cast<std::byte*>(address);
    ++num_arenas_made;
    owner_process_ = getpid();
    huge_pages_ = madvise(data_, num_bytes_, MADV_HUGEPAGE) == 0; // a hint: fewer faults, fewer pages to pin
}

size_t Arena::num_made() { return num_arenas_made.load(); }

Arena::~Arena() {
    unpin();
    munmap(data_, num_bytes_);
}

bool Arena::prefer_node(int node) noexcept {
    constexpr int kPreferred = 1; // MPOL_PREFERRED of numaif.h
    constexpr size_t kBits = 8 * sizeof(unsigned long);
    if (node < 0)
        return false;
    std::vector<unsigned long> nodes(static_cast<size_t>(node) / kBits + 1);
    nodes[static_cast<size_t>(node) / kBits] = 1ul << (static_cast<size_t>(node) % kBits);
    return syscall(SYS_mbind, data_, num_bytes_, kPreferred, nodes.data(), nodes.size() * kBits + 1, 0) == 0;
}

void Arena::touch(size_t offset, size_t num_bytes, double min_huge_bytes_per_s) {
    std::byte* const begin = data_ + offset;
    std::atomic<size_t> next{0};
    std::atomic<int> error{0};
    const uint64_t stalls_before = compaction_stalls();
    const auto work = [&] {
        for (size_t start; (start = next.fetch_add(kTouchBytes)) < num_bytes && error.load() == 0;) {
            const size_t share = std::min(kTouchBytes, num_bytes - start);
            const int64_t start_ns = now_ns();
            if (const int code = touch_range(begin + start, share))
                error.store(code);
            const double seconds = static_cast<double>(now_ns() - start_ns) * 1e-9;
            if (static_cast<double>(share) < min_huge_bytes_per_s * seconds && // the counter takes 0.1 ms to read
                stalled_for_huge_pages(share, seconds, min_huge_bytes_per_s, stalls_before, compaction_stalls()) &&
                huge_pages_.exchange(false))
                madvise(data_, num_bytes_, MADV_NOHUGEPAGE); // those that are huge stay so
        }
    };
    const size_t num_shares = (num_bytes + kTouchBytes - 1) / kTouchBytes;
    const size_t num_threads =
        std::min<size_t>({num_shares, kMaxTouchThreads, std::max(1u, std::thread::hardware_concurrency())});
    std::vector<std::thread> threads;
    try {
        threads.reserve(num_threads);
        for (size_t i = 1; i < num_threads; ++i)
            threads.emplace_back(work);
    } catch (const std::system_error&) { // the threads there are, this one at least, do it all
    }
    work();
    for (std::thread& thread : threads)
        thread.join();
    if (error.load() != 0)
        fail("cannot get ", bytes_text(num_bytes), " of host memory: ", errno_text(error.load()));
}

void Arena::pin(const std::shared_ptr<Device>& device, size_t offset, size_t num_bytes) {
    const DeviceGuard guard(*device);
    registrations_.reserve(registrations_.size() + 1);
    // A forked child must not come to share these pages: its copy-on-write would move them away from the device's. Said
    // once, of all: it waits for those who touch.
    if (!device_)
        madvise(data_, num_bytes_, MADV_DONTFORK);
    device_ = device;
    device->register_host(data_ + offset, num_bytes);
    registrations_.push_back(data_ + offset);
    num_bytes_pinned_ += num_bytes;
}

void Arena::unpin() noexcept {
    if (device_ && getpid() == owner_process_) {
        madvise(data_, num_bytes_, MADV_DOFORK);
        try {
            const DeviceGuard guard(*device_);
            for (std::byte* address : registrations_)
                device_->unregister_host(address);
        } catch (const std::exception&) { // the driver is gone, and its registrations with it
        }
    }
    registrations_.clear();
    num_bytes_pinned_ = 0;
    device_.reset();
}

HostPool::HostPool(std::vector<size_t> block_bytes, std::shared_ptr<Device> device, const HostPoolOptions& options)
    : block_bytes_(std::move(block_bytes)), options_(options) {
    if (block_bytes_.empty())
        throw std::invalid_argument("HostPool: expected at least one block");
    if (options_.chunk_bytes == 0 || options_.chunk_bytes % kPageBytes != 0)
        throw std::invalid_argument(
            join_text("HostPool: chunk_bytes must be a multiple of 4096, got ", options_.chunk_bytes));
    if (options_.num_ranks < 1)
        throw std::invalid_argument(join_text("HostPool: num_ranks must be at least 1, got ", options_.num_ranks));
    for (const size_t num_bytes : block_bytes_) {
        offsets_.push_back(stats_.bytes_padded);
        if (num_bytes > SIZE_MAX / 4 - stats_.bytes_padded)
            throw std::invalid_argument(join_text("HostPool: a block of ", num_bytes, " bytes"));
        stats_.bytes_used += num_bytes;
        stats_.bytes_padded += align_up(num_bytes, kPageBytes);
    }
    MemoryBudget budget = options_.machine ? *options_.machine : read_memory_budget();
    budget.asked_bytes = options_.host_memory;
    budget.limit_to_these();
    check_memory_budget("the host pool", stats_.bytes_padded, budget, options_.num_ranks);

    auto arena = std::make_shared<Arena>(stats_.bytes_padded);
    stats_.numa_node = device ? device->numa_node() : -1;
    if (!arena->prefer_node(stats_.numa_node))
        stats_.numa_node = -1;
    const auto chunk_at = [&](size_t offset) { return std::min(options_.chunk_bytes, stats_.bytes_padded - offset); };
    const auto touch = [&](size_t offset) {
        const int64_t start_ns = now_ns();
        if (offset < stats_.bytes_padded)
            arena->touch(offset, chunk_at(offset), options_.min_huge_bytes_per_s);
        stats_.touch_ns += now_ns() - start_ns;
    };
    // One chunk ahead, so that a pin that fails does so before all memory was touched. What was pinned before it is
    // unpinned with the arena, or by unpin() where plain memory will do.
    bool pinning = options_.pin;
    touch(0);
    for (size_t offset = 0; offset < stats_.bytes_padded; offset += options_.chunk_bytes, ++stats_.chunks) {
        // By another thread, or by get() where there is none to be had. It has ended before the arena does, since the
        // destructor waits too.
        auto next = std::async(std::launch::async | std::launch::deferred, touch, offset + options_.chunk_bytes);
        const int64_t start_ns = now_ns();
        try {
            if (pinning)
                arena->pin(device, offset, chunk_at(offset));
        } catch (const std::runtime_error& error) {
            stats_.pin_error = join_text("cannot pin chunk ", stats_.chunks, " of the host pool, ",
                                         bytes_text(chunk_at(offset)), " after ", bytes_text(offset), " of ",
                                         bytes_text(stats_.bytes_padded), ": ", error.what(), "; ", budget.text());
            if (!options_.allow_pageable)
                throw std::runtime_error(stats_.pin_error);
            arena->unpin();
            pinning = false;
        }
        stats_.pin_ns += now_ns() - start_ns;
        next.get();
        if (options_.between_chunks)
            options_.between_chunks();
    }
    stats_.bytes_pinned = arena->num_bytes_pinned();
    stats_.huge_pages = arena->uses_huge_pages();
    arena_ = std::move(arena);
}

void HostPool::check_block(size_t block) const {
    if (block >= block_bytes_.size())
        throw std::out_of_range(join_text("no block ", block, ": the pool has ", block_bytes_.size()));
    if (!arena_)
        fail("the host pool is closed");
}

size_t HostPool::num_bytes(size_t block) const {
    if (block >= block_bytes_.size())
        throw std::out_of_range(join_text("no block ", block, ": the pool has ", block_bytes_.size()));
    return block_bytes_[block];
}

std::byte* HostPool::address(size_t block) const {
    check_block(block);
    return arena_->data() + offsets_[block];
}

std::shared_ptr<Arena> HostPool::arena() const {
    if (!arena_)
        fail("the host pool is closed");
    return arena_;
}

HostPool::Stats HostPool::stats() const { return stats_; }

void HostPool::close() noexcept { arena_.reset(); }

} // namespace distzo2
