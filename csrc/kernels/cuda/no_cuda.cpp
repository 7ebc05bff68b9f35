// The CUDA entries of kernels.h in a build without nvcc.
#include "kernels/kernels.h"

#if !defined(DISTZO2_WITH_CUDA)

#include <stdexcept>

namespace distzo2 {
namespace {

[[noreturn]] void fail() { throw std::runtime_error("distzo2 was built without CUDA kernels"); }

} // namespace

bool cuda_compiled() { return false; }
void materialize_cuda(const Materialize&, int, CudaStream) { fail(); }
void generate_cuda(const InPlace&, int, CudaStream) { fail(); }
void decode_cuda(const Decode&, int, CudaStream) { fail(); }
void lookup_cuda(const Lookup&, int, CudaStream) { fail(); }
void perturb_cuda(const InPlace&, float, int, CudaStream) { fail(); }
void update_cuda(const InPlace&, float, float, float, int, CudaStream) { fail(); }

} // namespace distzo2

#endif
