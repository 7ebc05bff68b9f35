#include "kernels/cpu/simd_avx2.h"

#include "kernels/cpu/make_level.h"

namespace distzo2 {

const CpuLevel kAvx2Level = make_level<Lanes>(&decode_avx2);

} // namespace distzo2
