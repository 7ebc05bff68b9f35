// Host memory of the weights: one contiguous arena of blocks, each aligned to a page. The arena is mapped without
// reservation, touched by several threads, and pinned in chunks of at most 1 GiB, since large registrations fail; a
// chunk is pinned while the next one is touched. A copy must not cross two registrations: for_each_chunk splits it.
// Blocks may be larger than a chunk.
//
//   | block 0 | pad | block 1        | pad | block 2 ...            padding: less than a page a block
//   | chunk 0: 1 GiB, pinned | chunk 1: 1 GiB, pinned | ...
//
// The arena lives as long as anyone holds it: the pool, an engine, or a tensor over one of its blocks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/common.h"
#include "runtime/device/device.h"
#include "runtime/pool/memory_budget.h"

namespace distzo2 {

// One thread makes pages present at 1 to 3 GB/s on a bare machine, and at a tenth of that under a hypervisor. A lower
// rate, while the kernel counts stalls for compaction, is the price of huge pages.
inline constexpr double kMinHugeBytesPerSecond = 2e8;
// Whether making `num_bytes` present in `seconds` was slow because memory was compacted: the kernel's counter of stalls
// rose. An infinite rate is never reached, whatever the counter says.
bool stalled_for_huge_pages(size_t num_bytes, double seconds, double min_bytes_per_s, uint64_t stalls_before,
                            uint64_t stalls_after);

// A page-aligned anonymous mapping that is unmapped, and unpinned, when the last holder lets go.
class Arena {
  public:
    explicit Arena(size_t num_bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    std::byte* data() const { return data_; }
    size_t num_bytes() const { return num_bytes_; }
    size_t num_bytes_pinned() const { return num_bytes_pinned_; }
    static size_t num_made(); // by this process so far

    // Takes the pages that become present from now on from this NUMA node while it has any. False where the node does
    // not exist or the kernel refuses.
    bool prefer_node(int node) noexcept;
    // Makes every page of [offset, offset + num_bytes) present, from several threads. Once that stalls, the arena uses
    // small pages. Throws std::runtime_error.
    void touch(size_t offset, size_t num_bytes, double min_huge_bytes_per_s = kMinHugeBytesPerSecond);
    bool uses_huge_pages() const { return huge_pages_.load(); } // asked for, not always given
    // Pins [offset, offset + num_bytes) for the device, while others may touch; throws what the driver says.
    void pin(const std::shared_ptr<Device>& device, size_t offset, size_t num_bytes);
    void unpin() noexcept;

  private:
    std::byte* data_ = nullptr;
    size_t num_bytes_ = 0;
    size_t num_bytes_pinned_ = 0;
    int owner_process_ = 0;
    std::shared_ptr<Device> device_;
    std::vector<std::byte*> registrations_;
    std::atomic<bool> huge_pages_{false};
};

struct HostPoolOptions {
    bool pin = false;
    bool allow_pageable = false; // use plain memory where pinning fails
    size_t chunk_bytes = kGiB;   // smaller in tests
    // What all ranks may take together instead of nine tenths of what the machine has available.
    size_t host_memory = kUnlimited;
    int num_ranks = 1; // pools like this one on the machine, which share what it says
    // What the machine said before any of them was made; without a value it is read now.
    std::optional<MemoryBudget> machine = std::nullopt;
    double min_huge_bytes_per_s = kMinHugeBytesPerSecond;
    std::function<void()> between_chunks = nullptr; // what it throws ends the making of the pool
};

class HostPool {
  public:
    // One block per entry of block_bytes. Throws std::runtime_error when the budget, the mapping or the pinning fails;
    // nothing stays allocated or pinned then.
    HostPool(std::vector<size_t> block_bytes, std::shared_ptr<Device> device, const HostPoolOptions& options);

    size_t num_blocks() const { return block_bytes_.size(); }
    size_t num_bytes(size_t block) const;
    std::byte* address(size_t block) const; // throws after close()
    const std::vector<size_t>& block_bytes() const { return block_bytes_; }
    std::shared_ptr<Arena> arena() const; // throws after close()

    struct Stats {
        size_t bytes_used;   // sum of the blocks
        size_t bytes_padded; // with each block rounded up to a page: what is mapped
        size_t bytes_pinned;
        size_t chunks;
        int numa_node;         // that was preferred, or -1
        bool huge_pages;       // asked for to the end
        int64_t touch_ns;      // in which pages became present, and ...
        int64_t pin_ns;        // ... in which they were pinned, at the same time but for the ends
        std::string pin_error; // why memory is pageable although pinned memory was asked for
    };
    Stats stats() const;

    // Calls visit(address, num_bytes) for the parts of [address, address + num_bytes) that lie in one chunk each.
    template <typename Visit>
    static void for_each_chunk(std::byte* arena, size_t chunk_bytes, std::byte* address, size_t num_bytes,
                               Visit visit) {
        while (num_bytes > 0) {
            const size_t into_chunk = static_cast<size_t>(address - arena) % chunk_bytes;
            const size_t part = num_bytes < chunk_bytes - into_chunk ? num_bytes : chunk_bytes - into_chunk;
            visit(address, part);
            address += part;
            num_bytes -= part;
        }
    }
    size_t chunk_bytes() const { return options_.chunk_bytes; }

    // Releases the arena; memory that an engine or a tensor holds is freed with the last holder.
    void close() noexcept;

  private:
    void check_block(size_t block) const;

    std::vector<size_t> block_bytes_;
    std::vector<size_t> offsets_;
    HostPoolOptions options_;
    std::shared_ptr<Arena> arena_;
    Stats stats_{};
};

} // namespace distzo2
