// The kernels' C++ API: noise, the visit to packed weights (`Materialize`, types.h), and decoding quantized ones
// (`Decode`, packed.h), on the CPU and on CUDA.
// perturb, restore and update in place are visits of one segment. All entries refuse tables that point out of their
// buffers (std::runtime_error), do nothing for an empty problem, allocate nothing on the CPU, but for factors of
// low-rank noise, for which a thread keeps what it once needed, and give the same bits on every path. Other arguments
// are the caller's to check.
//
// CPU entries run on the calling thread and the threads of the ParallelFor, and return when done. CUDA entries enqueue
// on `stream` of `device` and return; every buffer is device memory, every table is host memory and may be freed on
// return.
#pragma once

#include <string>

#include "kernels/packed.h"
#include "kernels/types.h"

namespace distzo2 {

// Instruction sets of the CPU kernels. The best one that the machine has is used; the environment variable DISTZO2_SIMD
// (portable, avx2, avx512) names one, and is an error if it is not there.
enum class SimdLevel { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* simd_name(SimdLevel level);
bool simd_available(SimdLevel level); // compiled, and supported by this processor and its operating system
SimdLevel simd_level();               // the level in use
void set_simd_level(SimdLevel level); // for tests and benchmarks; throws if it is not available

// Runs body(context, begin, end) over disjoint ranges that cover [begin, end), each but the last at least `grain` long,
// and returns when all are done. Default: std::thread for as many as the machine has, when there is work for more than
// one.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
void set_parallel_for(ParallelFor parallel_for); // nullptr restores the default, which is
void run_on_std_threads(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);

// Throws where a row of the tables points out of its buffer or table.
void check(const Materialize& visit);
void check(const Decode& request);

void materialize_cpu(const Materialize& visit);
void generate_cpu(const InPlace& place);
void decode_cpu(const Decode& request);
void lookup_cpu(const Lookup& request); // throws std::out_of_range, naming it, for an id that is no row of the table

// w <- rne(fma(scale, z, w)). Restoring is the same with -scale; it does not bring the bits back.
void perturb_cpu(const InPlace& place, float scale);
// One update of one term; rounding bits are those of (seed, step, param, element).
void update_cpu(const InPlace& place, float lr, float coef, float weight_decay);

// before * kChecksumOdd + sum of w_i * m_i + 3 * tail + num_bytes, modulo 2^64. w_i are the data's 8-byte words, tail
// is what remains as a little-endian number, m_i = i * kChecksumOdd | 1 is odd, so that a change of one word always
// shows. `before` is the checksum of what came before, 0 at the start.
inline constexpr uint64_t kChecksumOdd = 0x9E3779B97F4A7C15; // of the golden ratio
uint64_t checksum_cpu(const void* data, int64_t num_bytes, uint64_t before);

// CUDA. In a build without nvcc these throw "distzo2 was built without CUDA kernels". `device` must be the calling
// thread's current one.
using CudaStream = void*; // a cudaStream_t
bool cuda_compiled();
void materialize_cuda(const Materialize& visit, int device, CudaStream stream);
void generate_cuda(const InPlace& place, int device, CudaStream stream);
void decode_cuda(const Decode& request, int device, CudaStream stream);
void lookup_cuda(const Lookup& request, int device, CudaStream stream); // a row of NaN for an id that is no row
void perturb_cuda(const InPlace& place, float scale, int device, CudaStream stream);
void update_cuda(const InPlace& place, float lr, float coef, float weight_decay, int device, CudaStream stream);

} // namespace distzo2
