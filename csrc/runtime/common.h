// What the files of the runtime share: the clock of all times, page arithmetic, and errors that come from outside
// (disk, memory, driver), which carry no file:line of ours but the name of what failed. Host only, no torch, no CUDA.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <string>

namespace distzo2 {

inline constexpr size_t kPageBytes = 4096; // alignment of blocks, of slots, and of O_DIRECT transfers
inline constexpr size_t kMiB = size_t{1} << 20;
inline constexpr size_t kGiB = size_t{1} << 30;

constexpr size_t align_up(size_t num_bytes, size_t alignment) {
    return (num_bytes + alignment - 1) / alignment * alignment;
}

constexpr size_t align_down(size_t num_bytes, size_t alignment) { return num_bytes / alignment * alignment; }

inline bool is_page_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kPageBytes == 0; }

// Nanoseconds of the monotonic clock, which is also Python's time.monotonic_ns().
inline int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

template <typename... Parts>
std::string join_text(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

// Throws std::runtime_error with the parts streamed one after another.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    throw std::runtime_error(join_text(parts...));
}

// "No space left on device (errno 28)"
inline std::string errno_text(int error) { return join_text(std::strerror(error), " (errno ", error, ")"); }

// "0xE3069283"
inline std::string hex_text(uint32_t value) {
    std::ostringstream text;
    text << "0x" << std::hex << std::uppercase << std::setw(8) << std::setfill('0') << value;
    return text.str();
}

// "1234567 bytes (1.18 MiB)"
inline std::string bytes_text(size_t num_bytes) {
    const double value = static_cast<double>(num_bytes);
    std::ostringstream text;
    text.precision(4);
    text << num_bytes << " bytes";
    if (num_bytes >= kMiB)
        text << " (" << (num_bytes >= kGiB ? value / kGiB : value / kMiB) << (num_bytes >= kGiB ? " GiB)" : " MiB)");
    return text.str();
}

} // namespace distzo2
