#include "kernels/cpu/simd_avx512.h"

#include "kernels/cpu/make_level.h"

namespace distzo2 {

const CpuLevel kAvx512Level = make_level<Lanes>(&decode_avx512);

} // namespace distzo2
