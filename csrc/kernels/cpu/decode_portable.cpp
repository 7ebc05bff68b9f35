#include "kernels/cpu/packed_portable.h"

#include "kernels/cpu/decode.h"
#include "kernels/cpu/level.h"

namespace distzo2 {

void decode_portable(const Decode& request, int64_t begin, int64_t end) { run_decode(request, begin, end); }

} // namespace distzo2
