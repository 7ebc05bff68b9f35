#include "runtime/device/cuda_device.h"

#include <cctype>
#include <charconv>
#include <fstream>
#include <stdexcept>

#include "runtime/common.h"
#include "runtime/device/cpu_device.h"

// A driver call that must succeed; the failure names the call.
#define DZO_DRIVER(member, ...) cu::check(driver_, driver_.member(__VA_ARGS__), #member)

namespace distzo2 {
namespace {
constexpr size_t kCopyChunkBytes = 32 * kMiB; // long enough for full link speed, short enough for two streams to share
}

int numa_node_of(std::string bus_id, const std::string& root) {
    for (char& letter : bus_id)
        letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
    std::ifstream file(root + "/sys/bus/pci/devices/" + bus_id + "/numa_node");
    int node = -1;
    return file >> node ? node : -1;
}

CudaDevice::CudaDevice(const cu::DriverTable& driver, int ordinal)
    : driver_(driver), name_(join_text("cuda:", ordinal)) {
    int num_devices = 0;
    DZO_DRIVER(device_get_count, &num_devices);
    if (ordinal < 0 || ordinal >= num_devices)
        fail("no such device: ", name_, " was asked for, and the CUDA driver lists ", num_devices);
    DZO_DRIVER(device_get, &device_, ordinal);
    DZO_DRIVER(primary_context_retain, &context_, device_);
    try {
        const DeviceGuard guard(*this);
        DZO_DRIVER(stream_priority_range, &least_priority_, &greatest_priority_);
        char bus_id[32] = "";
        if (driver_.device_pci_bus_id(bus_id, static_cast<int>(sizeof bus_id), device_) == cu::kSuccess)
            numa_node_ = numa_node_of(bus_id);
    } catch (...) {
        driver_.primary_context_release(device_);
        throw;
    }
}

CudaDevice::~CudaDevice() { driver_.primary_context_release(device_); }

size_t CudaDevice::copy_chunk_bytes() const { return kCopyChunkBytes; }

void CudaDevice::enter() { DZO_DRIVER(context_push, context_); }

void CudaDevice::leave() noexcept {
    cu::Context popped = nullptr;
    driver_.context_pop(&popped);
}

Stream CudaDevice::create_stream(bool urgent) {
    Stream stream = nullptr;
    DZO_DRIVER(stream_create, &stream, cu::kStreamNonBlocking, urgent ? greatest_priority_ : least_priority_);
    return stream;
}

void CudaDevice::destroy_stream(Stream stream) noexcept {
    try {
        synchronize_stream(stream);
    } catch (const std::exception&) { // then the driver alone ends what is on it
    }
    driver_.stream_destroy(stream);
}

Event CudaDevice::create_event(bool timed) {
    Event event = nullptr;
    DZO_DRIVER(event_create, &event, cu::kEventBlockingSync | (timed ? 0 : cu::kEventDisableTiming));
    return event;
}

void CudaDevice::destroy_event(Event event) noexcept { driver_.event_destroy(event); }

void CudaDevice::record(Event event, Stream stream) { DZO_DRIVER(event_record, event, stream); }

void CudaDevice::wait(Stream stream, Event event) { DZO_DRIVER(stream_wait_event, stream, event, 0); }

bool CudaDevice::query(Event event) {
    const cu::Result result = driver_.event_query(event);
    if (result == cu::kNotReady)
        return false;
    cu::check(driver_, result, "event_query");
    return true;
}

void CudaDevice::synchronize(Event event) { DZO_DRIVER(event_synchronize, event); }

double CudaDevice::elapsed_ns(Event start, Event end) {
    float milliseconds = 0.0f;
    DZO_DRIVER(event_elapsed_ms, &milliseconds, start, end);
    return static_cast<double>(milliseconds) * 1e6;
}

// The event happens between the two looks at the clock; tried again while they lie far apart. A thread that slept would
// wake too late.
int64_t CudaDevice::record_and_date(Event event, Stream stream) {
    constexpr int kMaxTries = 5;
    constexpr int64_t kCloseNs = 30'000;
    int64_t before_ns = 0;
    int64_t after_ns = 0;
    for (int i = 0; i == 0 || (i < kMaxTries && after_ns - before_ns > kCloseNs); ++i) {
        before_ns = now_ns();
        record(event, stream);
        while (!query(event))
            ;
        after_ns = now_ns();
    }
    return before_ns + (after_ns - before_ns) / 2;
}

void CudaDevice::copy(Stream stream, void* to, const void* from, size_t num_bytes, Direction direction) {
    if (direction == Direction::kUpload)
        DZO_DRIVER(copy_to_device, reinterpret_cast<cu::DevicePtr>(to), from, num_bytes, stream);
    else
        DZO_DRIVER(copy_to_host, to, reinterpret_cast<cu::DevicePtr>(from), num_bytes, stream);
}

void CudaDevice::call(Stream stream, void (*function)(void*), void* argument) {
    DZO_DRIVER(launch_host_function, stream, function, argument);
}

// A driver call that fails returns its error and, unlike the runtime's cudaHostRegister, leaves none pending for the
// next caller to trip over.
void CudaDevice::register_host(void* address, size_t num_bytes) {
    DZO_DRIVER(host_register, address, num_bytes, cu::kRegisterPortable);
}

void CudaDevice::unregister_host(void* address) noexcept { driver_.host_unregister(address); }

std::shared_ptr<Device> make_device(const std::string& name) {
    if (name == "cpu")
        return std::make_shared<CpuDevice>();
    const std::string prefix = "cuda";
    if (name.compare(0, prefix.size(), prefix) == 0) {
        int ordinal = 0;
        const char* digits = name.c_str() + prefix.size() + 1;
        const char* end = name.c_str() + name.size();
        const bool plain = name == prefix;
        if (plain || (name[prefix.size()] == ':' && digits < end &&
                      std::from_chars(digits, end, ordinal) == std::from_chars_result{end, std::errc{}}))
            return std::make_shared<CudaDevice>(cu::driver(), ordinal);
    }
    throw std::invalid_argument(join_text("unknown device '", name, "': expected cpu, cuda or cuda:N"));
}

} // namespace distzo2
