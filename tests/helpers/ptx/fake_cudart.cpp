// A CUDA runtime that hands launches to a callback, and the entries of kernels.h for ctypes. Linked with the compiled
// kernels, so that the host code that chooses kernels, grids and tables is the one that ships.
#include <cuda_runtime_api.h>

#include <exception>
#include <map>
#include <string>

#include "kernels/kernels.h"
#include "kernels/visits.h"

using namespace distzo2;

namespace {

struct Callbacks {
    void (*launch)(const char* kernel, const unsigned* grid_and_block, void** arguments, void* stream);
    uint64_t (*allocate)(uint64_t num_bytes, void* stream);
    void (*release)(uint64_t address, void* stream);
};

Callbacks callbacks;
std::map<const void*, std::string>& names() { // made at the first registration, which is before main
    static std::map<const void*, std::string> made;
    return made;
}
struct {
    dim3 grid, block;
    cudaStream_t stream;
} configuration;

std::string failure;
int current_device = -1; // made so by the entries' caller
cudaStream_t callers_stream = nullptr, idle_stream = nullptr;

template <class Body>
const char* guarded(int device, void* stream, Body body) {
    try {
        current_device = device;
        callers_stream = static_cast<cudaStream_t>(stream);
        body();
        return nullptr;
    } catch (const std::exception& error) {
        failure = error.what();
        return failure.c_str();
    }
}

} // namespace

extern "C" {

// What compiled CUDA code calls.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t, cudaStream_t stream) {
    configuration = {grid, block, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = 0;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t,
                               cudaStream_t stream) {
    const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
    callbacks.launch(names().at(kernel).c_str(), sizes, arguments, stream);
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}
// There is no cudaSetDevice, which makes a context. Device 0 has the multiprocessors of an H200; the others have one,
// so that a thread loops over octets of a small visit, and device 2 has no memory pools.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? (device == 0 ? 132 : 1) : device != 2;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaMemPoolCreate(cudaMemPool_t*, const cudaMemPoolProps*) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t num_bytes, cudaMemPool_t, cudaStream_t stream) {
    *pointer = reinterpret_cast<void*>(callbacks.allocate(num_bytes, stream));
    return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
    callbacks.release(reinterpret_cast<uint64_t>(pointer), stream);
    return cudaSuccess;
}
// Memory that is freed in no stream's order belongs to the stream that was waited for.
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    idle_stream = stream;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, size_t num_bytes) {
    idle_stream = nullptr;
    return cudaMallocFromPoolAsync(pointer, num_bytes, nullptr, callers_stream);
}
cudaError_t cudaFree(void* pointer) { return cudaFreeAsync(pointer, idle_stream); }

// The entries. Each returns what was thrown, or null.
void set_callbacks(const Callbacks* given) { callbacks = *given; }

const char* run_materialize(const Materialize* visit, int device, void* stream) {
    return guarded(device, stream, [&] { materialize_cuda(*visit, device, stream); });
}
const char* run_generate(const InPlace* place, int device, void* stream) {
    return guarded(device, stream, [&] { generate_cuda(*place, device, stream); });
}
const char* run_lookup(const Lookup* request, int device, void* stream) {
    return guarded(device, stream, [&] { lookup_cuda(*request, device, stream); });
}
const char* run_decode(const Decode* request, int device, void* stream) {
    return guarded(device, stream, [&] { decode_cuda(*request, device, stream); });
}
const char* run_perturb(const InPlace* place, float scale, int device, void* stream) {
    return guarded(device, stream, [&] { perturb_cuda(*place, scale, device, stream); });
}
const char* run_update(const InPlace* place, float lr, float coef, float weight_decay, int device, void* stream) {
    return guarded(device, stream, [&] { update_cuda(*place, lr, coef, weight_decay, device, stream); });
}
}
