// libcuda.so.1 as far as the runtime and its tests need it, over the simulated driver, so that finding, loading and
// calling the real one is tested too. Host functions of all streams wait for one another, as a real driver's may, and
// misuse ends the process. In its environment: FAKE_LIBCUDA_INIT, what cuInit gives; FAKE_LIBCUDA_DEVICES, a number.
// Built with FAKE_LIBCUDA_OLD, it is one of before CUDA 10.
#include <cstdlib>

#include "simulated_driver.h"

using CUresult = int;
using CUdevice = int;
using CUcontext = void*;
using CUstream = void*;
using CUevent = void*;
using CUdeviceptr = unsigned long long;
using CUhostFn = void (*)(void*);
using cuuint32_t = uint32_t;

namespace {

int number(const char* name, int otherwise) {
    const char* const text = std::getenv(name);
    return text != nullptr ? std::atoi(text) : otherwise;
}

// Never destroyed, as a driver is there to the process's end.
const distzo2::cu::DriverTable& driver() {
    static const auto* const simulation = new simulated::Driver(
        {.num_devices = number("FAKE_LIBCUDA_DEVICES", 1), .serial_host_functions = true, .abort_on_misuse = true});
    return simulation->table();
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) CUresult

EXPORT cuInit(unsigned flags) {
    const CUresult result = number("FAKE_LIBCUDA_INIT", 0);
    return result != 0 ? result : driver().init(flags);
}
EXPORT cuGetErrorName(CUresult error, const char** text) { return driver().get_error_name(error, text); }
EXPORT cuGetErrorString(CUresult error, const char** text) { return driver().get_error_string(error, text); }
EXPORT cuDeviceGetCount(int* count) { return driver().device_get_count(count); }
EXPORT cuDeviceGet(CUdevice* device, int ordinal) { return driver().device_get(device, ordinal); }
EXPORT cuDeviceGetPCIBusId(char* text, int num_chars, CUdevice device) {
    return driver().device_pci_bus_id(text, num_chars, device);
}
EXPORT cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return driver().primary_context_retain(context, device);
}
EXPORT cuDevicePrimaryCtxRelease_v2(CUdevice device) { return driver().primary_context_release(device); }
EXPORT cuCtxPushCurrent_v2(CUcontext context) { return driver().context_push(context); }
EXPORT cuCtxPopCurrent_v2(CUcontext* context) { return driver().context_pop(context); }
EXPORT cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return driver().stream_priority_range(least, greatest);
}
EXPORT cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    return driver().stream_create(stream, flags, priority);
}
EXPORT cuStreamDestroy_v2(CUstream stream) { return driver().stream_destroy(stream); }
EXPORT cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    return driver().stream_wait_event(stream, event, flags);
}
EXPORT cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
    return simulated::Driver::stream_wait_value(stream, address, value, flags);
}
EXPORT cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
    return simulated::Driver::stream_write_value(stream, address, value, flags);
}
EXPORT cuEventCreate(CUevent* event, unsigned flags) { return driver().event_create(event, flags); }
EXPORT cuEventRecord(CUevent event, CUstream stream) { return driver().event_record(event, stream); }
EXPORT cuEventQuery(CUevent event) { return driver().event_query(event); }
EXPORT cuEventSynchronize(CUevent event) { return driver().event_synchronize(event); }
EXPORT cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return driver().event_elapsed_ms(milliseconds, start, end);
}
EXPORT cuEventDestroy_v2(CUevent event) { return driver().event_destroy(event); }
EXPORT cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t num_bytes, CUstream stream) {
    return driver().copy_to_device(to, from, num_bytes, stream);
}
EXPORT cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t num_bytes, CUstream stream) {
    return driver().copy_to_host(to, from, num_bytes, stream);
}
EXPORT cuMemHostRegister_v2(void* address, size_t num_bytes, unsigned flags) {
    return driver().host_register(address, num_bytes, flags);
}
EXPORT cuMemHostUnregister(void* address) { return driver().host_unregister(address); }
EXPORT cuMemAlloc_v2(CUdeviceptr* address, size_t num_bytes) { return driver().memory_allocate(address, num_bytes); }
EXPORT cuMemFree_v2(CUdeviceptr address) { return driver().memory_free(address); }
#if !defined(FAKE_LIBCUDA_OLD)
EXPORT cuLaunchHostFunc(CUstream stream, CUhostFn function, void* argument) {
    return driver().launch_host_function(stream, function, argument);
}
#endif
