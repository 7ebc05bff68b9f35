// What each instruction set's translation unit offers to dispatch.cpp. Ranges of a visit count the elements of all
// segments, one after another; ranges of a request count its own, those of a lookup the elements of its result, of
// decoding the weights of all matrices. The caller has checked the tables and set the floating-point environment.
#pragma once

#include "kernels/packed.h"
#include "kernels/types.h"

namespace distzo2 {

struct CpuLevel {
    void (*materialize)(const Materialize& visit, int64_t begin, int64_t end);
    void (*generate)(const InPlace& request, int64_t begin, int64_t end);
    void (*lookup)(const Lookup& request, int64_t begin, int64_t end);
    void (*decode)(const Decode& request, int64_t begin, int64_t end);
};

// For the factors of low-rank noise: memory of the calling thread, at a multiple of 64 bytes, which it keeps.
void* factor_memory(int64_t num_bytes);

// In files of their own, decode_*.cpp.
void decode_portable(const Decode& request, int64_t begin, int64_t end);
void decode_avx2(const Decode& request, int64_t begin, int64_t end);
void decode_avx512(const Decode& request, int64_t begin, int64_t end);

extern const CpuLevel kPortableLevel;
extern const CpuLevel kAvx2Level;
extern const CpuLevel kAvx512Level;

} // namespace distzo2
