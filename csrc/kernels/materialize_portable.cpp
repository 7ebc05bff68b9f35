#include "kernels/simd_portable.h"

#include "kernels/cpu_levels.h"

namespace distzo2 {

const CpuLevel kPortableLevel = make_level<Lanes>();

} // namespace distzo2
