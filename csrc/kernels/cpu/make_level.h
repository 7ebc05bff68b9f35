// What one instruction set offers, of the lanes V that the including translation unit has chosen.
#pragma once

#include "kernels/cpu/lookup.h"

namespace distzo2 {
namespace {

template <class V>
constexpr CpuLevel make_level(void (*decode)(const Decode&, int64_t, int64_t) = nullptr) {
    return CpuLevel{&run_visit<V>, &run_request<V>, &run_lookup<V>, decode};
}

} // namespace
} // namespace distzo2
