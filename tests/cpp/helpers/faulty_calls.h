// FileCalls that fail: the system's own, of which one kind gives an error, falls short, or is interrupted.
#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <string>

#include "runtime/common.h"
#include "runtime/disk/file_calls.h"

class FaultyCalls final : public distzo2::FileCalls {
  public:
    // The kind of call that fails with `error` from its `after`-th time on, in the part of the file from `from_offset`.
    std::string failing;
    int error = EIO;
    std::atomic<int> after{0};
    size_t from_offset = 0;
    std::atomic<bool> short_transfers{false}; // of a page at most, and every third interrupted
    std::atomic<bool> on{false};
    std::atomic<int> num_failed{0};

    int open(const char* path, int flags) override { return fails("open") ? -1 : FileCalls::open(path, flags); }
    int truncate(int descriptor, size_t num_bytes) override {
        return fails("truncate") ? -1 : FileCalls::truncate(descriptor, num_bytes);
    }
    int allocate(int descriptor, size_t num_bytes) override {
        return fails("allocate") ? -1 : FileCalls::allocate(descriptor, num_bytes);
    }
    int sync(int descriptor) override {
        if (interrupted())
            return -1;
        return fails("sync") ? -1 : FileCalls::sync(descriptor);
    }
    int sync_directory(const char* path) override {
        return fails("sync_directory") ? -1 : FileCalls::sync_directory(path);
    }
    int unlink(const char* path) override { return fails("unlink") ? -1 : FileCalls::unlink(path); }
    ssize_t read(int descriptor, void* to, size_t num_bytes, size_t offset) override {
        if (interrupted() || fails("read", offset, num_bytes))
            return -1;
        return FileCalls::read(descriptor, to, shortened(num_bytes), offset);
    }
    ssize_t write(int descriptor, const void* from, size_t num_bytes, size_t offset) override {
        if (interrupted() || fails("write", offset, num_bytes))
            return -1;
        return FileCalls::write(descriptor, from, shortened(num_bytes), offset);
    }

  private:
    bool fails(const char* call, size_t offset = 0, size_t num_bytes = SIZE_MAX / 2) {
        if (!on || failing != call || offset + num_bytes <= from_offset || after.fetch_sub(1) > 0)
            return false;
        ++num_failed;
        errno = error;
        return true;
    }
    bool interrupted() {
        if (!short_transfers || ++count_ % 3 != 0)
            return false;
        errno = EINTR;
        return true;
    }
    size_t shortened(size_t num_bytes) const {
        return short_transfers ? std::min(num_bytes, distzo2::kPageBytes) : num_bytes;
    }
    std::atomic<int> count_{0};
};
