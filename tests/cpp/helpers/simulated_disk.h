// A file of a disk that may lose its power: FileCalls over memory that keeps a log of writes and syncs. What was synced
// is on the disk; of what was not, a power cut leaves any part.
#pragma once

#include <cerrno>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <vector>

#include "runtime/common.h"
#include "runtime/disk/file_calls.h"

namespace simulated {

class Disk final : public distzo2::FileCalls {
  public:
    struct Operation {
        size_t offset = 0;
        std::vector<std::byte> bytes; // none: a sync
        bool is_sync() const { return bytes.empty(); }
    };

    Disk() = default;
    explicit Disk(std::vector<std::byte> image) : contents_(std::move(image)), present_(!contents_.empty()) {}

    std::vector<Operation> log;
    std::function<void()> during_sync; // called by a sync before it takes effect
    bool misaligned = false;           // a direct transfer was

    const std::vector<std::byte>& contents() const { return contents_; }

    int open(const char*, int) override {
        present_ = true;
        return 1000;
    }
    int close(int) override { return 0; }
    int lock(int) override { return 0; }
    int set_direct(int, bool direct) override {
        direct_ = direct;
        return 0;
    }
    int stat(const char*, struct stat* status) override {
        if (!present_) {
            errno = ENOENT;
            return -1;
        }
        *status = {};
        status->st_mode = S_IFREG;
        status->st_size = static_cast<off_t>(contents_.size());
        return 0;
    }
    int size(int, size_t* num_bytes) override {
        *num_bytes = contents_.size();
        return 0;
    }
    int free_bytes(int, size_t* num_bytes) override {
        *num_bytes = distzo2::kGiB;
        return 0;
    }
    int truncate(int, size_t num_bytes) override {
        contents_.resize(num_bytes);
        return 0;
    }
    int allocate(int, size_t num_bytes) override {
        contents_.resize(num_bytes);
        return 0;
    }
    ssize_t read(int, void* to, size_t num_bytes, size_t offset) override {
        const std::lock_guard lock(mutex_);
        check_alignment(to, num_bytes, offset);
        if (offset >= contents_.size())
            return 0;
        const size_t count = std::min(num_bytes, contents_.size() - offset);
        std::memcpy(to, contents_.data() + offset, count);
        return static_cast<ssize_t>(count);
    }
    ssize_t write(int, const void* from, size_t num_bytes, size_t offset) override {
        const std::lock_guard lock(mutex_);
        check_alignment(from, num_bytes, offset);
        const auto* bytes = static_cast<const std::byte*>(from);
        std::memcpy(contents_.data() + offset, bytes, num_bytes);
        log.push_back({offset, {bytes, bytes + num_bytes}});
        return static_cast<ssize_t>(num_bytes);
    }
    int sync(int) override {
        if (during_sync)
            during_sync();
        const std::lock_guard lock(mutex_);
        log.push_back({});
        return 0;
    }
    int sync_directory(const char*) override { return 0; }
    int unlink(const char*) override {
        present_ = false;
        return 0;
    }

  private:
    void check_alignment(const void* memory, size_t num_bytes, size_t offset) {
        if (direct_ && (!distzo2::is_page_aligned(memory) || num_bytes % distzo2::kPageBytes != 0 ||
                        offset % distzo2::kPageBytes != 0))
            misaligned = true;
    }
    std::mutex mutex_;
    std::vector<std::byte> contents_;
    bool present_ = false;
    bool direct_ = false;
};

inline void apply(std::vector<std::byte>& image, const Disk::Operation& operation, size_t num_bytes) {
    if (num_bytes > 0)
        std::memcpy(image.data() + operation.offset, operation.bytes.data(), num_bytes);
}

// Sectors of 512 bytes, each of which is written or is not.
inline void apply_some_sectors(std::vector<std::byte>& image, const Disk::Operation& operation, std::mt19937& random) {
    for (size_t at = 0; at < operation.bytes.size(); at += 512)
        if (random() % 2 == 0)
            std::memcpy(image.data() + operation.offset + at, operation.bytes.data() + at,
                        std::min<size_t>(512, operation.bytes.size() - at));
}

// Calls visit(cut, image) with what a power cut after `cut` operations of the log may leave of a disk that held `image`
// before: what was synced, and of the rest all, none, or some; the last of the writes torn, at any byte of an entry's
// head and at others; all of them torn, at a byte or sector by sector.
template <typename Visit>
void for_each_cut(std::vector<std::byte> image, const std::vector<Disk::Operation>& log, unsigned seed, Visit visit) {
    std::mt19937 random(seed);
    size_t first_pending = 0;
    for (size_t cut = 0; cut <= log.size(); ++cut) {
        if (cut > 0 && log[cut - 1].is_sync()) {
            for (; first_pending < cut; ++first_pending)
                apply(image, log[first_pending], log[first_pending].bytes.size());
            visit(cut, image);
            continue;
        }
        const auto with_some = [&](int one_in, const auto& finish) {
            std::vector<std::byte> left = image;
            for (size_t i = first_pending; i < cut; ++i)
                if (one_in == 0 || (one_in > 1 && random() % static_cast<unsigned>(one_in) == 0))
                    apply(left, log[i], log[i].bytes.size());
            finish(left);
            visit(cut, left);
        };
        const auto nothing_more = [](std::vector<std::byte>&) {};
        for (const int one_in : {0, 1, 2, 2, 2, 3})
            with_some(one_in, nothing_more);
        if (cut == first_pending)
            continue;
        const Disk::Operation& last = log[cut - 1];
        const size_t num_bytes = last.bytes.size();
        for (size_t at = 1; at < num_bytes; at += at < 72 || at + 4 > num_bytes ? 1 : 331)
            with_some(2, [&](std::vector<std::byte>& left) { apply(left, last, at); });
        for (int i = 0; i < 4; ++i)
            with_some(2, [&](std::vector<std::byte>& left) {
                for (size_t j = first_pending; j < cut; ++j)
                    apply_some_sectors(left, log[j], random);
            });
        for (int i = 0; i < 6; ++i) // all of them torn at once
            with_some(1, [&](std::vector<std::byte>& left) {
                for (size_t j = first_pending; j < cut; ++j)
                    apply(left, log[j],
                          random() % std::min<size_t>(random() % 2 == 0 ? 100 : SIZE_MAX, log[j].bytes.size()));
            });
    }
}

} // namespace simulated
