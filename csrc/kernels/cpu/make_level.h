// What one instruction set offers, of the lanes V that the including translation unit has chosen.
#pragma once

#include "kernels/cpu/lookup.h"

namespace distzo2 {
namespace {

template <class V>
constexpr CpuLevel make_level() {
    return CpuLevel{&run_visit<V>, &run_request<V>, &run_lookup<V>};
}

} // namespace
} // namespace distzo2
