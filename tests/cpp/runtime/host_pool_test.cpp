// HostPool and the memory budget: layout, accounting, refusals that name their numbers, pinning in chunks with
// rollback.
#include "testing.h"

#include <sys/mman.h>
#include <sys/syscall.h>

#include <cmath>
#include <fstream>
#include <thread>

#include "runtime/device/cuda_device.h"
#include "runtime/pool/memory_budget.h"
#include "test_driver.h"
#include "watchdog.h"

using namespace distzo2;

namespace {

std::shared_ptr<HostPool> make_pool(std::vector<size_t> sizes, const HostPoolOptions& options = {},
                                    const std::string& device = "cpu") {
    return std::make_shared<HostPool>(std::move(sizes), make_device(device), options);
}

void write_file(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    std::ofstream(path) << text;
}

} // namespace

TEST(blocks_are_aligned_apart_and_zero) {
    const std::vector<size_t> sizes = {1, 4096, 4097, 0, 3 * kMiB + 5};
    const auto pool = make_pool(sizes);
    for (size_t block = 0; block < sizes.size(); ++block) {
        CHECK(is_page_aligned(pool->address(block)));
        CHECK_EQ(pool->num_bytes(block), sizes[block]);
        if (block > 0)
            CHECK(pool->address(block) >= pool->address(block - 1) + sizes[block - 1]);
        for (size_t i = 0; i < sizes[block]; i += 1000)
            CHECK(pool->address(block)[i] == std::byte{0});
    }
    const HostPool::Stats stats = pool->stats();
    CHECK_EQ(stats.bytes_used, 1 + 4096 + 4097 + 3 * kMiB + 5);
    CHECK_EQ(stats.bytes_padded, 4096 + 4096 + 8192 + 3 * kMiB + 4096);
    CHECK_EQ(stats.bytes_pinned, 0u);
    CHECK_EQ(stats.chunks, 1u);
}

TEST(bad_arguments_are_refused) {
    CHECK_THROWS(make_pool({}), "at least one block");
    CHECK_THROWS(make_pool({SIZE_MAX}), "a block of");
    CHECK_THROWS(make_pool({1}, {.chunk_bytes = 1000}), "multiple of 4096");
    CHECK_THROWS(make_pool({1})->address(1), "no block 1");
    CHECK_THROWS(make_device("tpu"), "unknown device 'tpu'");
    CHECK_THROWS(make_device("cuda:x"), "unknown device");
    CHECK_THROWS(make_device("cuda:"), "unknown device");
    CHECK_THROWS(make_pool({1}, {.pin = true}), "cannot be pinned for the device 'cpu'");
}

TEST(budget_refusal_names_each_number) {
    CHECK_THROWS(make_pool({2 * kMiB}, {.host_memory = kMiB}), "the host pool needs 2097152 bytes",
                 "--host-memory: 1048576 bytes", "cgroup limit", "MemAvailable", "RLIMIT_MEMLOCK");
    CHECK_THROWS(make_pool({size_t{1} << 50}), "nine tenths of the least of: cgroup limit leaves",
                 "host_memory= or --host-memory sets another limit");
}

TEST(asked_memory_stands_for_what_is_available_and_not_for_a_cgroup) {
    const MemoryBudget machine{.cgroup_bytes = 2 * kMiB, .available_bytes = kMiB};
    CHECK_THROWS(make_pool({kMiB}, {.machine = machine}), "nine tenths");
    make_pool({2 * kMiB}, {.host_memory = 3 * kMiB, .machine = machine});
    CHECK_THROWS(make_pool({2 * kMiB + 1}, {.host_memory = 3 * kMiB, .machine = machine}), "cgroup limit leaves: 2097");
    CHECK_THROWS(make_pool({kMiB}, {.host_memory = 3 * kMiB, .num_ranks = 3, .machine = machine}), "each of 3 ranks");
}

TEST(budget_is_shared_by_the_ranks_of_a_machine) {
    const HostPoolOptions options{.host_memory = 4 * kMiB, .num_ranks = 3};
    const auto pool = make_pool({kMiB}, options);
    CHECK_THROWS(make_pool({2 * kMiB}, options), "only 1398101 bytes (1.333 MiB) may be taken by each of 3 ranks");
    CHECK_THROWS(make_pool({1}, {.num_ranks = 0}), "num_ranks must be at least 1");

    // A reading of before any of them was made counts instead of what the machine says by now.
    MemoryBudget before{.cgroup_bytes = 5'000'000, .available_bytes = 4'000'000};
    make_pool({439 * kPageBytes}, {.num_ranks = 2, .machine = before});
    CHECK_THROWS(make_pool({1'810'000}, {.num_ranks = 2, .machine = before}), "only 1800000 bytes",
                 "by each of 2 ranks", "cgroup limit leaves: 5000000 bytes", "MemAvailable: 4000000 bytes");
}

TEST(memory_comes_from_the_numa_node_of_the_device) {
    const ScratchDirectory root;
    write_file(root.file("sys/bus/pci/devices/0000:a1:00.0/numa_node"), "1\n");
    CHECK_EQ(numa_node_of("0000:A1:00.0", root.file("")), 1);
    CHECK_EQ(numa_node_of("0000:A2:00.0", root.file("")), -1);
    CHECK_EQ(make_pool({1})->stats().numa_node, -1);
    Arena arena(64 * 1024);
    const bool chosen = arena.prefer_node(0); // there is always this one, though not always a choice
    CHECK(!arena.prefer_node(1023) && !arena.prefer_node(-1));
    arena.touch(0, arena.num_bytes());
    int mode = -1;
    unsigned long nodes[16] = {};
    if (chosen && syscall(SYS_get_mempolicy, &mode, nodes, 8 * sizeof nodes, arena.data(), 2) == 0) { // MPOL_F_ADDR
        CHECK_EQ(mode, 1);                                                                            // MPOL_PREFERRED
        CHECK_EQ(nodes[0], 1ul);
    }
}

TEST(huge_pages_are_given_up_where_they_stall) {
    HostPoolOptions options;
    CHECK_EQ(make_pool({2 * kMiB}, options)->stats().huge_pages, Arena(1).uses_huge_pages());
    CHECK(stalled_for_huge_pages(kGiB, 10.0, 2e8, 5, 6));
    CHECK(!stalled_for_huge_pages(kGiB, 10.0, 2e8, 5, 5)); // slow for another reason
    CHECK(!stalled_for_huge_pages(kGiB, 1.0, 2e8, 5, 6));  // fast all the same
    options.min_huge_bytes_per_s = INFINITY;               // never reached
    const auto pool = make_pool({2 * kMiB}, options);
    CHECK(!pool->stats().huge_pages);
    CHECK(pool->address(0)[2 * kMiB - 1] == std::byte{0});
}

TEST(budget_reads_cgroup_v2_at_every_level) {
    const ScratchDirectory root;
    write_file(root.file("proc/meminfo"), "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n");
    write_file(root.file("proc/self/cgroup"), "0::/jobs/one\n");
    write_file(root.file("proc/self/status"), "Name:\tx\nCapEff:\t0000000000004000\n");
    write_file(root.file("sys/fs/cgroup/jobs/memory.max"), "3000000\n");
    write_file(root.file("sys/fs/cgroup/jobs/memory.current"), "2000000\n");
    write_file(root.file("sys/fs/cgroup/jobs/memory.stat"), "anon 5\ninactive_file 300000\nactive_file 200000\n");
    write_file(root.file("sys/fs/cgroup/jobs/one/memory.max"), "max\n");
    write_file(root.file("sys/fs/cgroup/jobs/one/memory.current"), "7\n");
    const MemoryBudget budget = read_memory_budget(root.file(""));
    CHECK_EQ(budget.cgroup_bytes, 1500000u);
    CHECK_EQ(budget.available_bytes, 8000u * 1024);
    CHECK_EQ(budget.memlock_bytes, kUnlimited); // CAP_IPC_LOCK
    CHECK_EQ(budget.allowed_bytes, 1350000u);
}

TEST(budget_reads_cgroup_v1_and_no_limit) {
    const ScratchDirectory root;
    write_file(root.file("proc/meminfo"), "MemAvailable: 10 kB\n");
    write_file(root.file("proc/self/cgroup"), "5:cpu:/\n4:memory:/a\n0::/\n");
    write_file(root.file("sys/fs/cgroup/memory/a/memory.limit_in_bytes"), "5000\n");
    write_file(root.file("sys/fs/cgroup/memory/a/memory.usage_in_bytes"), "6000\n");
    write_file(root.file("sys/fs/cgroup/memory/a/memory.stat"), "total_inactive_file 2500\n");
    CHECK_EQ(read_memory_budget(root.file("")).cgroup_bytes, 1500u);
    write_file(root.file("sys/fs/cgroup/memory/a/memory.limit_in_bytes"), "9223372036854771712\n");
    CHECK_EQ(read_memory_budget(root.file("")).cgroup_bytes, kUnlimited);
    CHECK_EQ(read_memory_budget(root.file("")).allowed_bytes, 10240u - 1024u);
    CHECK_EQ(read_memory_budget(root.file("nothing")).allowed_bytes, kUnlimited);
}

TEST(pieces_never_cross_a_chunk) {
    auto* const arena = reinterpret_cast<std::byte*>(0x100000);
    std::vector<std::pair<size_t, size_t>> parts;
    HostPool::for_each_chunk(arena, 8192, arena + 5000, 20000,
                             [&](std::byte* start, size_t num_bytes) { parts.emplace_back(start - arena, num_bytes); });
    const std::vector<std::pair<size_t, size_t>> expected = {{5000, 3192}, {8192, 8192}, {16384, 8192}, {24576, 424}};
    CHECK(parts == expected);
}

TEST(pinning_is_in_chunks_and_undone) {
    TestDriver driver;
    driver.max_registration_bytes = 64 * 1024; // as a real one refuses one that is too large
    {
        const auto pool = make_pool({150000, 10}, {.pin = true, .chunk_bytes = 64 * 1024}, "cuda:0");
        CHECK_EQ(driver.num_registrations(), 3);
        CHECK_EQ(pool->stats().bytes_pinned, pool->stats().bytes_padded);
        CHECK_EQ(pool->stats().chunks, 3u);
        const auto arena = pool->arena();
        pool->close();
        CHECK_THROWS(pool->address(0), "closed");
        CHECK_EQ(arena->num_bytes_pinned(), pool->stats().bytes_padded); // as long as somebody holds it
    }
    CHECK_EQ(driver.leaks(), TestDriver::kNoLeaks);
    CHECK_EQ(driver.misuse(), "");
}

TEST(failed_pin_rolls_back) {
    TestDriver driver;
    driver.failing_call = "host_register";
    driver.calls_before_failure = 2;
    const HostPoolOptions options{.pin = true, .chunk_bytes = 4096};
    CHECK_THROWS(make_pool({5 * 4096}, options, "cuda"),
                 "cannot pin chunk 2 of the host pool, 4096 bytes after 8192 bytes of 20480 bytes",
                 "CUDA_ERROR_OUT_OF_MEMORY", "RLIMIT_MEMLOCK");
    CHECK_EQ(driver.num_registrations(), 2);
    CHECK_EQ(driver.leaks(), TestDriver::kNoLeaks);
    driver.calls_before_failure = 5;
    HostPoolOptions interrupted = options;
    interrupted.between_chunks = [] { throw std::runtime_error("interrupted"); };
    CHECK_THROWS(make_pool({5 * 4096}, interrupted, "cuda"), "interrupted");
    CHECK_EQ(driver.leaks(), TestDriver::kNoLeaks);

    driver.calls_before_failure = 1;
    HostPoolOptions lenient = options;
    lenient.allow_pageable = true;
    const auto pool = make_pool({5 * 4096}, lenient, "cuda");
    CHECK_EQ(pool->stats().bytes_pinned, 0u);
    CHECK(pool->stats().pin_error.find("cannot pin chunk 1") != std::string::npos);
    CHECK_EQ(driver.leaks(), TestDriver::kNoLeaks);
    CHECK_EQ(driver.misuse(), "");
}

// With each registration waiting for the next chunk's pages, in series would hang.
TEST(a_chunk_is_pinned_while_the_next_one_is_touched) {
    constexpr size_t kChunk = 32 * kPageBytes;
    constexpr size_t kNumChunks = 6; // less than a huge page in all
    TestDriver driver;
    const auto is_present = [](std::byte* page) {
        unsigned char present = 0;
        return mincore(page, 1, &present) == 0 && (present & 1) != 0;
    };
    std::byte* begin = nullptr;
    size_t most_ahead = 0;
    driver.before_pinning = [&](void* address, size_t num_bytes) {
        auto* const chunk = static_cast<std::byte*>(address);
        begin = begin == nullptr ? chunk : begin;
        for (size_t page = 0; page < num_bytes; page += kPageBytes)
            CHECK(is_present(chunk + page));
        std::byte* const end = begin + kNumChunks * kChunk;
        while (chunk + kChunk < end && !is_present(chunk + 2 * kChunk - kPageBytes))
            std::this_thread::yield();
        for (size_t ahead = 0; chunk + ahead * kChunk < end && is_present(chunk + ahead * kChunk); ++ahead)
            most_ahead = std::max(most_ahead, ahead);
    };
    const auto pool = make_pool({kNumChunks * kChunk}, {.pin = true, .chunk_bytes = kChunk}, "cuda");
    CHECK_EQ(most_ahead, 1u);
    CHECK_EQ(pool->stats().bytes_pinned, kNumChunks * kChunk);
    CHECK(pool->stats().touch_ns > 0 && pool->stats().pin_ns > 0);
}

TEST(missing_devices_are_named) {
    TestDriver driver(2);
    CHECK_EQ(make_device("cuda:1")->name(), "cuda:1");
    CHECK_THROWS(make_device("cuda:99"), "cuda:99 was asked for, and the CUDA driver lists");
    CHECK(cu::available().first);
    driver.lists_no_devices = true;
    CHECK(!cu::available().first);
    CHECK(cu::available().second.find("no CUDA device") != std::string::npos);
    CHECK_EQ(driver.leaks(), TestDriver::kNoLeaks);
}
