#include "kernels/simd_avx2.h"

#include "kernels/cpu_levels.h"

namespace distzo2 {

const CpuLevel kAvx2Level = make_level<Lanes>();

} // namespace distzo2
