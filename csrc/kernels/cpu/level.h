// What each instruction set's translation unit offers to dispatch.cpp. Ranges of a visit count the elements of all
// segments, one after another; ranges of a request count its own, those of a lookup the elements of its result. The
// caller has checked the tables and set the floating-point environment.
#pragma once

#include "kernels/types.h"

namespace distzo2 {

struct CpuLevel {
    void (*materialize)(const Materialize& visit, int64_t begin, int64_t end);
    void (*generate)(const InPlace& request, int64_t begin, int64_t end);
    void (*lookup)(const Lookup& request, int64_t begin, int64_t end);
};

extern const CpuLevel kPortableLevel;
extern const CpuLevel kAvx2Level;
extern const CpuLevel kAvx512Level;

} // namespace distzo2
