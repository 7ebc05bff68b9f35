// Counts this process's large allocations, in place of the C and C++ libraries' functions; for one executable.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "runtime/common.h"

// Allocations of more than 64 KiB by anything in this process; not counted under a sanitizer, whose allocator it is.
inline std::atomic<int> num_large_allocations{0};

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
extern "C" void* __libc_memalign(size_t alignment, size_t num_bytes);
extern "C" void* aligned_alloc(size_t alignment, size_t num_bytes) {
    num_large_allocations += num_bytes > 65536;
    return __libc_memalign(alignment, num_bytes);
}
static void* counted(size_t num_bytes, size_t alignment) {
    num_large_allocations += num_bytes > 65536;
    void* memory = alignment == 0 ? std::malloc(num_bytes) : __libc_memalign(alignment, num_bytes);
    if (memory == nullptr)
        throw std::bad_alloc();
    return memory;
}
void* operator new(size_t num_bytes) { return counted(num_bytes, 0); }
void* operator new(size_t num_bytes, std::align_val_t alignment) {
    return counted(num_bytes, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
#endif
