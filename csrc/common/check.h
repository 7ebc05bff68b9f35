// Run-time checks of the torch-free core. A failed check throws std::runtime_error whose text is
// "<file>:<line>: expected <condition>: <what came>"; nothing here prints, exits or allocates unless a check fails.
// Host only, on no stream. DZO_CUDA_CHECK needs <cuda_runtime_api.h> at the place of use, DZO_CHECK needs nothing.
#pragma once

#include <sstream>
#include <stdexcept>

namespace distzo2 {

template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail_check(const char* file, int line, const char* expected,
                                                       const Parts&... parts) {
    std::ostringstream text;
    text << file << ':' << line << ": expected " << expected;
    if constexpr (sizeof...(parts) > 0) {
        text << ": ";
        (text << ... << parts);
    }
    throw std::runtime_error(text.str());
}

} // namespace distzo2

// DZO_CHECK(condition, parts...): the parts are streamed one after another and should give the values that came.
#define DZO_CHECK(condition, ...)                                                                                      \
    do {                                                                                                               \
        if (!(condition)) [[unlikely]]                                                                                 \
            ::distzo2::fail_check(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__);                          \
    } while (false)

// DZO_CUDA_CHECK(call): a CUDA runtime call that must return cudaSuccess.
#define DZO_CUDA_CHECK(call)                                                                                           \
    do {                                                                                                               \
        const cudaError_t dzo_error_ = (call);                                                                         \
        if (dzo_error_ != cudaSuccess) [[unlikely]]                                                                    \
            ::distzo2::fail_check(__FILE__, __LINE__, #call " == cudaSuccess", cudaGetErrorName(dzo_error_), " (",     \
                                  cudaGetErrorString(dzo_error_), ")");                                                \
    } while (false)

// To be placed after every kernel launch: a bad launch configuration or a missing device image shows here.
#define DZO_CUDA_CHECK_LAUNCH() DZO_CUDA_CHECK(cudaGetLastError())
