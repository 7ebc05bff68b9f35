// How much host memory this process may still take: 90% of the least of what its control groups leave (v2 and v1, every
// level) and what the machine has available. Read from /proc and /sys at each call. Who knows better than MemAvailable
// (a cache that it does not count, swap) asks for a number of bytes; of a control group's limit no byte more can be
// had.
#pragma once

#include <cstddef>
#include <limits>
#include <string>

namespace distzo2 {

inline constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

struct MemoryBudget {
    size_t cgroup_bytes = kUnlimited;    // limit − usage + clean file cache, least over the levels
    size_t available_bytes = kUnlimited; // MemAvailable
    size_t memlock_bytes = kUnlimited;   // RLIMIT_MEMLOCK; kUnlimited with CAP_IPC_LOCK
    size_t asked_bytes = kUnlimited;     // what the user asked for, in place of the 90%; kUnlimited: nothing
    size_t allowed_bytes = 0;            // 90% of the lesser of the first two, or as asked: limit_to_these() sets it

    void limit_to_these();
    // "cgroup limit leaves 1 bytes (..), MemAvailable is .., ..."
    std::string text() const;
};

// `root` stands before /proc and /sys; tests give their own directory.
MemoryBudget read_memory_budget(const std::string& root = "");

// Throws std::runtime_error "<what> needs N bytes .." with every number of the budget unless it covers `num_bytes` for
// each of `num_ranks` processes.
void check_memory_budget(const std::string& what, size_t num_bytes, const MemoryBudget& budget, int num_ranks = 1);

} // namespace distzo2
