#include "runtime/pool/memory_budget.h"

#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <sstream>

#include "runtime/common.h"

namespace distzo2 {

namespace {

// A file that holds one number; nothing for "max", for v1's "no limit" (a huge page multiple), or for no file.
std::optional<size_t> read_number(const std::string& path) {
    std::ifstream file(path);
    std::string word;
    if (!(file >> word) || word == "max")
        return std::nullopt;
    errno = 0;
    const unsigned long long value = std::strtoull(word.c_str(), nullptr, 10);
    if (errno != 0 || value >= (1ull << 62))
        return std::nullopt;
    return static_cast<size_t>(value);
}

// The number behind `key` in a file of "key number" or "key: number kB" lines; 0 if there is none.
size_t read_field(const std::string& path, const std::string& key) {
    std::ifstream file(path);
    std::string line;
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string name;
        size_t value = 0;
        std::string unit;
        if (words >> name >> value && (name == key || name == key + ":")) {
            words >> unit;
            return unit == "kB" ? value * 1024 : value;
        }
    }
    return 0;
}

struct CgroupFiles {
    const char* limit;
    const char* usage;
    const char* inactive; // file cache, which the kernel frees before it refuses memory
    const char* active;
};

constexpr CgroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file", "active_file"};
constexpr CgroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
                                   "total_active_file"};

// Least over the group and its ancestors, since each level binds. A container sees its own group as the mount's root,
// although /proc names it by a path that does not exist inside: the walk ends at the root in any case.
size_t cgroup_remaining(const std::string& mount, std::string group, const CgroupFiles& files) {
    size_t remaining = kUnlimited;
    while (true) {
        const std::string directory = mount + group + "/";
        const auto limit = read_number(directory + files.limit);
        const auto usage = read_number(directory + files.usage);
        if (limit && usage) {
            const std::string stat = directory + "memory.stat";
            const size_t cache = read_field(stat, files.inactive) + read_field(stat, files.active);
            const size_t in_use = *usage - std::min(cache, *usage);
            remaining = std::min(remaining, *limit - std::min(in_use, *limit));
        }
        if (group.empty())
            return remaining;
        group.resize(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
    }
}

size_t all_cgroups_remaining(const std::string& root) {
    const std::string mount = root + "/sys/fs/cgroup";
    size_t remaining = kUnlimited;
    std::ifstream file(root + "/proc/self/cgroup"); // lines "hierarchy:controllers:path"
    std::string line;
    while (std::getline(file, line)) {
        const size_t first = line.find(':');
        const size_t second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos)
            continue;
        const std::string controllers = join_text(',', line.substr(first + 1, second - first - 1), ',');
        std::string group = line.substr(second + 1);
        if (group == "/")
            group.clear();
        if (controllers == ",,") {
            for (const char* place : {"", "/unified"})
                remaining = std::min(remaining, cgroup_remaining(mount + place, group, kVersion2));
        } else if (controllers.find(",memory,") != std::string::npos) {
            remaining = std::min(remaining, cgroup_remaining(mount + "/memory", group, kVersion1));
        }
    }
    return remaining;
}

size_t memlock_limit(const std::string& root) {
    constexpr int kCapIpcLock = 14;
    std::ifstream file(root + "/proc/self/status");
    std::string line;
    while (std::getline(file, line))
        if (line.compare(0, 7, "CapEff:") == 0 &&
            (std::strtoull(line.c_str() + 7, nullptr, 16) >> kCapIpcLock & 1) != 0)
            return kUnlimited;
    rlimit limit{};
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
        return kUnlimited;
    return limit.rlim_cur;
}

std::string limit_text(size_t num_bytes) { return num_bytes == kUnlimited ? "no limit" : bytes_text(num_bytes); }

} // namespace

void MemoryBudget::limit_to_these() {
    const size_t least = std::min(cgroup_bytes, available_bytes);
    allowed_bytes = least == kUnlimited ? kUnlimited : least - least / 10;
    if (asked_bytes != kUnlimited)
        allowed_bytes = std::min(asked_bytes, cgroup_bytes);
}

std::string MemoryBudget::text() const {
    return join_text("cgroup limit leaves: ", limit_text(cgroup_bytes), ", MemAvailable: ", limit_text(available_bytes),
                     ", RLIMIT_MEMLOCK: ", limit_text(memlock_bytes));
}

MemoryBudget read_memory_budget(const std::string& root) {
    MemoryBudget budget;
    budget.cgroup_bytes = all_cgroups_remaining(root);
    if (const size_t available = read_field(root + "/proc/meminfo", "MemAvailable"))
        budget.available_bytes = available;
    budget.memlock_bytes = memlock_limit(root);
    budget.limit_to_these();
    return budget;
}

void check_memory_budget(const std::string& what, size_t num_bytes, const MemoryBudget& budget, int num_ranks) {
    const size_t share = budget.allowed_bytes / static_cast<size_t>(num_ranks);
    if (num_bytes <= share)
        return;
    const std::string whose = num_ranks == 1 ? "" : join_text(" by each of ", num_ranks, " ranks");
    const bool asked = budget.asked_bytes != kUnlimited;
    fail(what, " needs ", bytes_text(num_bytes), " of host memory, but only ", bytes_text(share), " may be taken",
         whose, asked ? " (host_memory= or --host-memory: " : " (nine tenths of the least of: ",
         asked ? join_text(bytes_text(budget.asked_bytes), ", ") : "", budget.text(),
         asked ? ")" : "; host_memory= or --host-memory sets another limit)");
}

} // namespace distzo2
