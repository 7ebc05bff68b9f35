#include "kernels/cpu/simd_portable.h"

#include "kernels/cpu/make_level.h"

namespace distzo2 {

const CpuLevel kPortableLevel = make_level<Lanes>(&decode_portable);

} // namespace distzo2
