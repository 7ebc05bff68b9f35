// The CUDA entry of decoding: one launch for each matrix, of which a unit has few, on the caller's stream.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "kernels/cuda/decode_device.h"
#include "kernels/kernels.h"

namespace distzo2 {
namespace {

constexpr int64_t kMaxThreads = 256;
constexpr int kMinBlocks = 4; // a multiprocessor: 64 registers, of which none are spilled

template <DType O>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) decode_kernel(const __grid_constant__ DeviceDecode decode) {
    decode_row_thread<O>(decode, blockIdx.x, threadIdx.x, blockDim.x);
}

} // namespace

void decode_cuda(const Decode& request, int device, CudaStream stream) {
    check(request);
    int current = -1;
    DZO_CUDA_CHECK(cudaGetDevice(&current));
    DZO_CHECK(device == current, "device ", device, " while ", current, " is current");
    const auto on = static_cast<cudaStream_t>(stream);
    for (int64_t m = 0; m < request.num_matrices; ++m) {
        const PackedMatrix& matrix = request.matrices[m];
        if (matrix.rows == 0 || matrix.cols == 0)
            continue;
        const DeviceDecode decode = device_decode(request, m);
        const int64_t warps = (matrix.cols + 32 * kOctet - 1) / (32 * kOctet);
        const auto num_blocks = static_cast<unsigned>(matrix.rows);
        const auto num_threads = static_cast<unsigned>(std::min(warps * 32, kMaxThreads));
        if (matrix.out_dtype == static_cast<int64_t>(DType::kFp32))
            decode_kernel<DType::kFp32><<<num_blocks, num_threads, 0, on>>>(decode);
        else if (matrix.out_dtype == static_cast<int64_t>(DType::kBf16))
            decode_kernel<DType::kBf16><<<num_blocks, num_threads, 0, on>>>(decode);
        else
            decode_kernel<DType::kFp16><<<num_blocks, num_threads, 0, on>>>(decode);
        DZO_CUDA_CHECK_LAUNCH();
    }
}

} // namespace distzo2
