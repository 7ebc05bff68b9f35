// A device as the copy engine sees it: streams, which run work in order; events, which mark points in them; copies
// between host memory and slots; and registration of host memory. CpuDevice's streams are threads and its copies are
// memcpy; CudaDevice calls the driver's table.
//
// The caller's own stream is a Stream too. On a CPU it is nullptr, the calling thread: a record on it has happened, and
// a wait by it blocks. On CUDA it is the handle that torch gives (nullptr is the legacy default stream), and only
// synchronize() blocks.
//
// An event may be recorded again once nothing needs its last record; a wait refers to the last record before it.
// Records of one event must complete in order: on one stream, or each behind a wait for the one before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace distzo2 {

using Stream = void*;
using Event = void*;

enum class Direction { kUpload, kDownload }; // host to slot, slot to host

class Device {
  public:
    virtual ~Device() = default;

    virtual const std::string& name() const = 0;
    virtual bool is_cpu() const = 0;
    virtual int numa_node() const = 0;           // the best one for its host memory; -1 where there is no choice
    virtual size_t copy_chunk_bytes() const = 0; // a copy is issued in pieces of at most this many bytes

    virtual Stream create_stream(bool urgent) = 0;
    virtual void destroy_stream(Stream stream) noexcept = 0; // after what is queued on it

    virtual Event create_event(bool timed) = 0;
    virtual void destroy_event(Event event) noexcept = 0;
    virtual void record(Event event, Stream stream) = 0;
    virtual void wait(Stream stream, Event event) = 0; // an event never recorded counts as complete
    virtual bool query(Event event) = 0;
    virtual void synchronize(Event event) = 0;             // the thread sleeps
    virtual double elapsed_ns(Event start, Event end) = 0; // of two complete timed events
    // Records a timed event on an idle stream and gives its time on the monotonic clock.
    virtual int64_t record_and_date(Event event, Stream stream) = 0;

    virtual void copy(Stream stream, void* to, const void* from, size_t num_bytes, Direction direction) = 0;
    virtual void call(Stream stream, void (*function)(void*), void* argument) = 0;

    virtual void register_host(void* address, size_t num_bytes) = 0;
    virtual void unregister_host(void* address) noexcept = 0;

    // Waits for what is on the stream. Makes an event each time.
    void synchronize_stream(Stream stream) {
        const Event event = create_event(false);
        try {
            record(event, stream);
            synchronize(event);
        } catch (...) {
            destroy_event(event);
            throw;
        }
        destroy_event(event);
    }

    // Makes the device current on this thread for the lifetime of a DeviceGuard; they nest.
    virtual void enter() = 0;
    virtual void leave() noexcept = 0;
};

class DeviceGuard {
  public:
    explicit DeviceGuard(Device& device) : device_(device) { device_.enter(); }
    ~DeviceGuard() { device_.leave(); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    Device& device_;
};

// "cpu", "cuda" or "cuda:N". Throws std::invalid_argument for another name, std::runtime_error where the device or its
// driver is missing.
std::shared_ptr<Device> make_device(const std::string& name);

} // namespace distzo2
