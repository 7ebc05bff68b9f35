// A ring of the kernel's io_uring, by its system calls alone: reads are queued, handed over together, and end in any
// order. One thread uses it, but for wake(), which any thread may call. Memory that a read was given belongs to the
// kernel until the read's completion has been taken; the destructor waits for what is under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

struct io_uring_sqe;
struct io_uring_cqe;

namespace distzo2 {

class IoRing {
  public:
    // For `depth` reads at once. Null, and why, where the kernel has no ring for us (old, or forbidden).
    static std::unique_ptr<IoRing> create(unsigned depth, std::string* reason);
    ~IoRing();
    IoRing(const IoRing&) = delete;
    IoRing& operator=(const IoRing&) = delete;

    // Queues a read; at most `depth` may be queued and under way. Any tag but kWake.
    void read(int descriptor, void* to, size_t num_bytes, size_t offset, uint64_t tag);
    // Hands over what is queued. With `wait`, returns when a completion is there, or after wake(). Throws
    // std::runtime_error when the kernel takes no more.
    void submit(bool wait);

    struct Completion {
        uint64_t tag;
        int result; // bytes, or a negative errno
    };
    bool next(Completion* completion); // takes a completion, if there is one
    unsigned num_in_flight() const { return num_in_flight_; }
    // Waits until nothing is in flight, and lets it go; what has not been handed over is forgotten.
    void drain() noexcept;

    void wake() noexcept; // submit(true) of the ring's thread returns, now or next time

  private:
    IoRing() = default;
    bool open(unsigned depth, std::string* reason);
    bool has_reads(std::string* reason) const;
    void push(int descriptor, void* to, size_t num_bytes, size_t offset, uint64_t tag);
    int enter(unsigned num_to_submit, bool wait) const;

    static constexpr uint64_t kWake = UINT64_MAX;
    int ring_ = -1;
    int event_ = -1;           // an eventfd; a read of it is always under way
    uint64_t event_count_ = 0; // which that read fills
    bool listening_ = false;
    unsigned num_queued_ = 0;
    unsigned num_in_flight_ = 0; // handed over, without the eventfd's
    // Shared with the kernel.
    void* queues_ = nullptr;
    size_t queues_bytes_ = 0;
    io_uring_sqe* entries_ = nullptr;
    size_t entries_bytes_ = 0;
    unsigned* submit_head_ = nullptr;
    unsigned* submit_tail_ = nullptr;
    unsigned* submit_array_ = nullptr;
    unsigned submit_mask_ = 0;
    unsigned* complete_head_ = nullptr;
    unsigned* complete_tail_ = nullptr;
    unsigned complete_mask_ = 0;
    io_uring_cqe* completions_ = nullptr;
};

} // namespace distzo2
