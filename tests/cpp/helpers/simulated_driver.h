// A CUDA driver of threads, as a cu::DriverTable: each stream is a thread with its own queue, so that work on two
// streams is ordered by events alone, as on a GPU. It refuses what a real driver refuses or only punishes: calls
// without a context or from a host function, copies outside of an allocation, from memory that is not pinned or across
// two registrations, use of destroyed handles, waits that spin. What tests ask of a driver besides (test_driver.h) is
// not its affair.
//
// Its time is the machine's, or simulated (Options::copy_ns). Then each thread, a stream's or the host's, has a clock:
// work begins at the latest of its stream's clock, the host's clock when it issued the work, and the events that the
// stream waits for. Copies and spend() take time and nothing else does, so that times do not depend on the machine.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/common.h"
#include "runtime/device/driver.h"

namespace simulated {

using namespace distzo2::cu;

inline constexpr Result kInvalidHandle = 400;
inline constexpr Result kNotPermitted = 800;

// Simulated time of the calling thread.
inline int64_t& clock_ns() {
    thread_local int64_t time_ns = 0;
    return time_ns;
}
// For host functions: what this thread does takes so long.
inline void spend(int64_t duration_ns) { clock_ns() += duration_ns; }

struct Record { // of an event, at one time
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    int64_t time_ns = 0;
};

struct EventState {
    bool timed = false;
    bool blocking = false;
    std::shared_ptr<Record> last;
};

class StreamState {
  public:
    StreamState() : thread_([this] { run(); }) {}
    ~StreamState() {
        push(nullptr);
        thread_.join();
    }
    void push(std::function<void()> work) {
        const std::lock_guard lock(mutex_);
        queue_.emplace_back(clock_ns(), std::move(work));
        changed_.notify_one();
    }

  private:
    void run() {
        std::unique_lock lock(mutex_);
        while (true) {
            changed_.wait(lock, [this] { return !queue_.empty(); });
            const auto [issued_ns, work] = std::move(queue_.front());
            queue_.pop_front();
            if (!work)
                return;
            lock.unlock();
            clock_ns() = std::max(clock_ns(), issued_ns);
            work();
            lock.lock();
        }
    }
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::pair<int64_t, std::function<void()>>> queue_; // with the time of issue
    std::thread thread_;
};

struct Options {
    int num_devices = 1;
    bool serial_host_functions = false; // those of all streams wait for one another, as a real driver's may
    bool abort_on_misuse = false;       // where nobody can ask for misuse()
    int64_t copy_ns = 0;                // what a copy takes; time is simulated if it is above 0
};

// One at a time.
class Driver {
  public:
    explicit Driver(const Options& options = {}) : options_(options) {
        current() = this;
        clock_ns() = 0;
        streams_[nullptr] = std::make_unique<StreamState>(); // the legacy default stream
    }
    ~Driver() {
        streams_.clear();
        for (const auto& [address, num_bytes] : allocations_)
            std::free(reinterpret_cast<void*>(address));
        current() = nullptr;
    }
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

    // Of the driver that lives at the time of a call.
    static const DriverTable& table() {
        static const DriverTable table = make_table();
        return table;
    }

    // What went wrong so far; empty when nothing was.
    std::string misuse() {
        const std::lock_guard lock(mutex_);
        return misuse_;
    }
    // cuStreamWaitValue32 (of a value that is at least so large) and cuStreamWriteValue32.
    static Result stream_wait_value(Stream stream, DevicePtr address, uint32_t value, unsigned flags);
    static Result stream_write_value(Stream stream, DevicePtr address, uint32_t value, unsigned flags);

  private:
    static Driver*& current() {
        static Driver* driver = nullptr;
        return driver;
    }
    static std::vector<Context>& contexts() {
        thread_local std::vector<Context> stack;
        return stack;
    }
    static bool& in_callback() {
        thread_local bool inside = false;
        return inside;
    }

    Result complain(const char* call, const std::string& what, Result result) {
        if (misuse_.empty())
            misuse_ = distzo2::join_text(call, ": ", what);
        if (options_.abort_on_misuse) {
            std::fprintf(stderr, "simulated driver: %s\n", misuse_.c_str());
            std::abort();
        }
        return result;
    }
    // With the lock held: whether the call may go on.
    Result enter(const char* call, bool needs_context = true) {
        if (in_callback())
            return complain(call, "called from a host function", kNotPermitted);
        if (needs_context && contexts().empty())
            return complain(call, "no current context", kInvalidContext);
        return kSuccess;
    }
    static bool inside(const std::map<uintptr_t, size_t>& ranges, uintptr_t address, size_t num_bytes) {
        auto range = ranges.upper_bound(address);
        if (range == ranges.begin())
            return false;
        --range;
        return address + num_bytes <= range->first + range->second;
    }
    Result copy(const char* call, uintptr_t device, uintptr_t host, size_t num_bytes, Stream stream, bool up) {
        if (!inside(allocations_, device, num_bytes))
            return complain(call, "outside of every device allocation", kInvalidValue);
        if (!inside(registrations_, host, num_bytes))
            return complain(call, "host memory is not within one registration", kInvalidValue);
        auto* to = reinterpret_cast<void*>(up ? device : host);
        const auto* from = reinterpret_cast<const void*>(up ? host : device);
        streams_.at(stream)->push([to, from, num_bytes, copy_ns = options_.copy_ns] {
            std::memcpy(to, from, num_bytes);
            spend(copy_ns);
        });
        return kSuccess;
    }
    bool simulates_time() const { return options_.copy_ns > 0; }
    void complete(Record& record) const {
        const std::lock_guard lock(record.mutex);
        record.done = true;
        record.time_ns = simulates_time() ? clock_ns() : distzo2::now_ns();
        record.changed.notify_all();
    }
    static void await(Record& record) {
        std::unique_lock lock(record.mutex);
        record.changed.wait(lock, [&] { return record.done; });
        clock_ns() = std::max(clock_ns(), record.time_ns);
    }
    std::shared_ptr<Record> push_record(Stream stream) {
        auto record = std::make_shared<Record>();
        streams_.at(stream)->push([this, record] { complete(*record); });
        return record;
    }

// Each function of the table: find the driver, take its lock, check what all calls need.
#define SIMULATED_CALL(name, needs_context)                                                                            \
    Driver& d = *current();                                                                                            \
    std::unique_lock lock(d.mutex_);                                                                                   \
    if (const Result entered = d.enter(name, needs_context); entered != kSuccess)                                      \
    return entered
#define SIMULATED_HANDLE(name, handles, handle)                                                                        \
    if (d.handles.count(handle) == 0)                                                                                  \
    return d.complain(name, "unknown handle", kInvalidHandle)

    static DriverTable make_table() {
        DriverTable t;
        t.init = [](unsigned) { return kSuccess; };
        t.get_error_name = [](Result result, const char** text) {
            *text = result == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY"
                    : result == kNoDevice  ? "CUDA_ERROR_NO_DEVICE"
                                           : "CUDA_ERROR_UNKNOWN";
            return kSuccess;
        };
        t.get_error_string = [](Result, const char** text) {
            *text = "said by the simulated driver";
            return kSuccess;
        };
        t.device_get_count = [](int* count) {
            *count = current()->options_.num_devices;
            return kSuccess;
        };
        t.device_get = [](DeviceId* device, int ordinal) {
            *device = ordinal;
            return kSuccess;
        };
        t.device_pci_bus_id = [](char* text, int num_chars, DeviceId device) {
            std::snprintf(text, static_cast<size_t>(num_chars), "0000:%02X:00.0", 0xA0 + device);
            return kSuccess;
        };
        t.primary_context_retain = [](Context* context, DeviceId device) {
            SIMULATED_CALL("primary_context_retain", false);
            *context = reinterpret_cast<Context>(uintptr_t{0x1000} + static_cast<uintptr_t>(device));
            return kSuccess;
        };
        t.primary_context_release = [](DeviceId) {
            SIMULATED_CALL("primary_context_release", false);
            return kSuccess;
        };
        t.context_push = [](Context context) {
            contexts().push_back(context);
            return kSuccess;
        };
        t.context_pop = [](Context* context) {
            if (contexts().empty())
                return kInvalidContext;
            *context = contexts().back();
            contexts().pop_back();
            return kSuccess;
        };
        t.stream_priority_range = [](int* least, int* greatest) {
            *least = 0;
            *greatest = -5;
            return kSuccess;
        };
        t.stream_create = [](Stream* stream, unsigned flags, int) {
            SIMULATED_CALL("stream_create", true);
            if (flags != kStreamNonBlocking)
                return d.complain("stream_create", "blocks the default stream", kInvalidValue);
            *stream = reinterpret_cast<Stream>(++d.next_handle_);
            d.streams_[*stream] = std::make_unique<StreamState>();
            return kSuccess;
        };
        t.stream_destroy = [](Stream stream) {
            SIMULATED_CALL("stream_destroy", true);
            SIMULATED_HANDLE("stream_destroy", streams_, stream);
            auto state = std::move(d.streams_[stream]);
            d.streams_.erase(stream);
            lock.unlock();
            return kSuccess; // `state` ends when its queue is empty
        };
        t.stream_wait_event = [](Stream stream, Event event, unsigned) {
            SIMULATED_CALL("stream_wait_event", true);
            SIMULATED_HANDLE("stream_wait_event", streams_, stream);
            SIMULATED_HANDLE("stream_wait_event", events_, event);
            if (const auto record = d.events_[event].last)
                d.streams_[stream]->push([record] { await(*record); });
            return kSuccess;
        };
        t.event_create = [](Event* event, unsigned flags) {
            SIMULATED_CALL("event_create", true);
            *event = reinterpret_cast<Event>(++d.next_handle_);
            d.events_[*event] = {(flags & kEventDisableTiming) == 0, (flags & kEventBlockingSync) != 0, nullptr};
            return kSuccess;
        };
        t.event_record = [](Event event, Stream stream) {
            SIMULATED_CALL("event_record", true);
            SIMULATED_HANDLE("event_record", streams_, stream);
            SIMULATED_HANDLE("event_record", events_, event);
            d.events_[event].last = d.push_record(stream);
            return kSuccess;
        };
        t.event_query = [](Event event) {
            SIMULATED_CALL("event_query", true);
            SIMULATED_HANDLE("event_query", events_, event);
            const auto record = d.events_[event].last;
            lock.unlock();
            if (!record)
                return kSuccess;
            std::unique_lock record_lock(record->mutex);
            if (d.simulates_time()) // the answer is that of the caller's clock, however far the threads are
                record->changed.wait(record_lock, [&] { return record->done; });
            return record->done && (!d.simulates_time() || record->time_ns <= clock_ns()) ? kSuccess : kNotReady;
        };
        t.event_synchronize = [](Event event) {
            SIMULATED_CALL("event_synchronize", true);
            SIMULATED_HANDLE("event_synchronize", events_, event);
            if (!d.events_[event].blocking)
                return d.complain("event_synchronize", "an event whose waiters spin", kInvalidHandle);
            const auto record = d.events_[event].last;
            lock.unlock();
            if (record)
                await(*record);
            return kSuccess;
        };
        t.event_elapsed_ms = [](float* milliseconds, Event start, Event end) {
            SIMULATED_CALL("event_elapsed_ms", true);
            const EventState& a = d.events_[start];
            const EventState& b = d.events_[end];
            if (!a.timed || !b.timed || !a.last || !b.last)
                return d.complain("event_elapsed_ms", "an event without time", kInvalidHandle);
            const std::scoped_lock records(a.last->mutex, b.last->mutex);
            if (!a.last->done || !b.last->done)
                return kNotReady;
            *milliseconds = static_cast<float>(static_cast<double>(b.last->time_ns - a.last->time_ns) * 1e-6);
            return kSuccess;
        };
        t.event_destroy = [](Event event) {
            SIMULATED_CALL("event_destroy", true);
            SIMULATED_HANDLE("event_destroy", events_, event);
            d.events_.erase(event);
            return kSuccess;
        };
        t.copy_to_device = [](DevicePtr to, const void* from, size_t num_bytes, Stream stream) {
            SIMULATED_CALL("copy_to_device", true);
            SIMULATED_HANDLE("copy_to_device", streams_, stream);
            return d.copy("copy_to_device", to, reinterpret_cast<uintptr_t>(from), num_bytes, stream, true);
        };
        t.copy_to_host = [](void* to, DevicePtr from, size_t num_bytes, Stream stream) {
            SIMULATED_CALL("copy_to_host", true);
            SIMULATED_HANDLE("copy_to_host", streams_, stream);
            return d.copy("copy_to_host", from, reinterpret_cast<uintptr_t>(to), num_bytes, stream, false);
        };
        t.host_register = [](void* address, size_t num_bytes, unsigned) {
            SIMULATED_CALL("host_register", true);
            const auto start = reinterpret_cast<uintptr_t>(address);
            const auto next = d.registrations_.lower_bound(start);
            if ((next != d.registrations_.end() && next->first < start + num_bytes) ||
                inside(d.registrations_, start, 1))
                return d.complain("host_register", "is registered already", kAlreadyRegistered);
            d.registrations_[start] = num_bytes;
            return kSuccess;
        };
        t.host_unregister = [](void* address) {
            SIMULATED_CALL("host_unregister", true);
            if (d.registrations_.erase(reinterpret_cast<uintptr_t>(address)) == 0)
                return d.complain("host_unregister", "is not registered", kNotRegistered);
            return kSuccess;
        };
        t.launch_host_function = [](Stream stream, HostFunction function, void* argument) {
            SIMULATED_CALL("launch_host_function", true);
            SIMULATED_HANDLE("launch_host_function", streams_, stream);
            d.streams_[stream]->push([&d, function, argument] {
                std::unique_lock turn(d.host_functions_, std::defer_lock);
                if (d.options_.serial_host_functions)
                    turn.lock();
                in_callback() = true;
                function(argument);
                in_callback() = false;
            });
            return kSuccess;
        };
        t.memory_allocate = [](DevicePtr* address, size_t num_bytes) {
            SIMULATED_CALL("memory_allocate", true);
            void* memory = std::malloc(num_bytes);
            if (memory == nullptr)
                return kOutOfMemory;
            std::memset(memory, 0xFF, num_bytes);
            *address = reinterpret_cast<DevicePtr>(memory);
            d.allocations_[reinterpret_cast<uintptr_t>(memory)] = num_bytes;
            return kSuccess;
        };
        t.memory_free = [](DevicePtr address) {
            SIMULATED_CALL("memory_free", true);
            if (d.allocations_.erase(static_cast<uintptr_t>(address)) == 0)
                return d.complain("memory_free", "is not allocated", kInvalidValue);
            std::free(reinterpret_cast<void*>(address));
            return kSuccess;
        };
        return t;
    }

    const Options options_;
    std::mutex host_functions_;
    std::mutex mutex_;
    std::string misuse_;
    uintptr_t next_handle_ = 0x100;
    std::map<Stream, std::unique_ptr<StreamState>> streams_;
    std::map<Event, EventState> events_;
    std::map<uintptr_t, size_t> registrations_; // address to bytes
    std::map<uintptr_t, size_t> allocations_;
};

inline Result Driver::stream_wait_value(Stream stream, DevicePtr address, uint32_t value, unsigned) {
    SIMULATED_CALL("stream_wait_value", true);
    SIMULATED_HANDLE("stream_wait_value", streams_, stream);
    d.streams_[stream]->push([cell = reinterpret_cast<uint32_t*>(address), value] {
        while (std::atomic_ref(*cell).load() < value)
            std::this_thread::sleep_for(std::chrono::microseconds(50));
    });
    return kSuccess;
}

inline Result Driver::stream_write_value(Stream stream, DevicePtr address, uint32_t value, unsigned) {
    SIMULATED_CALL("stream_write_value", true);
    SIMULATED_HANDLE("stream_write_value", streams_, stream);
    d.streams_[stream]->push(
        [cell = reinterpret_cast<uint32_t*>(address), value] { std::atomic_ref(*cell).store(value); });
    return kSuccess;
}
#undef SIMULATED_CALL
#undef SIMULATED_HANDLE

} // namespace simulated
