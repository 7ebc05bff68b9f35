// The CUDA driver as a table of functions, so that the runtime builds without a CUDA toolkit and loads without a
// driver. The process's table comes from libcuda.so.1 by dlopen at the first use; tests replace it by a simulated one.
// Types are those of the driver's binary interface: handles are pointers, device addresses 64-bit integers, results
// ints.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace distzo2::cu {

using Result = int;
using DeviceId = int;
using Context = void*;
using Stream = void*;
using Event = void*;
using DevicePtr = unsigned long long;
using HostFunction = void (*)(void* argument);

inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kNoDevice = 100;
inline constexpr Result kInvalidContext = 201;
inline constexpr Result kNotReady = 600;
inline constexpr Result kAlreadyRegistered = 712;
inline constexpr Result kNotRegistered = 713;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1; // who waits sleeps, where it would spin on a core
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kRegisterPortable = 1; // pinned for every context of the process

// X(member, exported symbol, parameters). The _v2 names are those that cuda.h's macros resolve to.
#define DZO_DRIVER_FUNCTIONS(X)                                                                                        \
    X(init, "cuInit", (unsigned flags))                                                                                \
    X(get_error_name, "cuGetErrorName", (Result error, const char** text))                                             \
    X(get_error_string, "cuGetErrorString", (Result error, const char** text))                                         \
    X(device_get_count, "cuDeviceGetCount", (int* count))                                                              \
    X(device_get, "cuDeviceGet", (DeviceId * device, int ordinal))                                                     \
    X(device_pci_bus_id, "cuDeviceGetPCIBusId", (char* text, int num_chars, DeviceId device))                          \
    X(primary_context_retain, "cuDevicePrimaryCtxRetain", (Context * context, DeviceId device))                        \
    X(primary_context_release, "cuDevicePrimaryCtxRelease_v2", (DeviceId device))                                      \
    X(context_push, "cuCtxPushCurrent_v2", (Context context))                                                          \
    X(context_pop, "cuCtxPopCurrent_v2", (Context * context))                                                          \
    X(stream_priority_range, "cuCtxGetStreamPriorityRange", (int* least, int* greatest))                               \
    X(stream_create, "cuStreamCreateWithPriority", (Stream * stream, unsigned flags, int priority))                    \
    X(stream_destroy, "cuStreamDestroy_v2", (Stream stream))                                                           \
    X(stream_wait_event, "cuStreamWaitEvent", (Stream stream, Event event, unsigned flags))                            \
    X(event_create, "cuEventCreate", (Event * event, unsigned flags))                                                  \
    X(event_record, "cuEventRecord", (Event event, Stream stream))                                                     \
    X(event_query, "cuEventQuery", (Event event))                                                                      \
    X(event_synchronize, "cuEventSynchronize", (Event event))                                                          \
    X(event_elapsed_ms, "cuEventElapsedTime", (float* milliseconds, Event start, Event end))                           \
    X(event_destroy, "cuEventDestroy_v2", (Event event))                                                               \
    X(copy_to_device, "cuMemcpyHtoDAsync_v2", (DevicePtr to, const void* from, size_t num_bytes, Stream stream))       \
    X(copy_to_host, "cuMemcpyDtoHAsync_v2", (void* to, DevicePtr from, size_t num_bytes, Stream stream))               \
    X(host_register, "cuMemHostRegister_v2", (void* address, size_t num_bytes, unsigned flags))                        \
    X(host_unregister, "cuMemHostUnregister", (void* address))                                                         \
    X(launch_host_function, "cuLaunchHostFunc", (Stream stream, HostFunction function, void* argument))                \
    X(memory_allocate, "cuMemAlloc_v2", (DevicePtr * address, size_t num_bytes))                                       \
    X(memory_free, "cuMemFree_v2", (DevicePtr address))

struct DriverTable {
#define DZO_DRIVER_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
    DZO_DRIVER_FUNCTIONS(DZO_DRIVER_MEMBER)
#undef DZO_DRIVER_MEMBER
};

// The process's table, loaded and initialised at the first call. Throws std::runtime_error naming what is missing: the
// library, a symbol, or what cuInit said. A failure is remembered.
const DriverTable& driver();

// Replaces libcuda by `table`, which must outlive its users; nullptr restores libcuda. For tests.
void set_driver(const DriverTable* table);

// True with "" where a driver and at least one device exist, otherwise false with the reason.
std::pair<bool, std::string> available();

// Throws std::runtime_error "<call>: CUDA_ERROR_NAME (text)" unless `result` is kSuccess.
void check(const DriverTable& table, Result result, const char* call);

} // namespace distzo2::cu
