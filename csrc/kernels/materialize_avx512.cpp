#include "kernels/simd_avx512.h"

#include "kernels/cpu_levels.h"

namespace distzo2 {

const CpuLevel kAvx512Level = make_level<Lanes>();

} // namespace distzo2
