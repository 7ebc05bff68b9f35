// The CUDA driver that a test runs over, in place of the process's own while it lives: the simulated one, or libcuda
// itself where DISTZO2_TEST_DRIVER is "real". Before either stands a table that counts the calls that succeed, fails
// those that it is told to, delays copies at random, and poisons what a copy is about to fill, so that tests see no
// difference. Without libcuda a test is skipped, with the loader's reason.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "runtime/common.h"
#include "runtime/device/driver.h"
#include "runtime/pool/host_pool.h"
#include "runtime_fixture.h"
#include "simulated_driver.h"
#include "testing.h"

namespace cu = distzo2::cu;

// The driver under a test, bare: what the test's own means use, neither counted nor failed. Its context stays.
class BareDriver {
  public:
    using MemoryOperation = cu::Result (*)(cu::Stream stream, cu::DevicePtr address, uint32_t value, unsigned flags);

    BareDriver(const cu::DriverTable& driver, MemoryOperation wait_value, MemoryOperation write_value)
        : table(driver), stream_wait_value(wait_value), stream_write_value(write_value) {
        cu::DeviceId device = 0;
        check(table.device_get(&device, 0), "device_get");
        check(table.primary_context_retain(&context_, device), "primary_context_retain");
        std::memset(poison_.data(), 0xFF, kPoisonBytes);
        const Current current(*this);
        check(table.host_register(poison_.data(), kPoisonBytes, cu::kRegisterPortable), "host_register");
    }
    ~BareDriver() {
        {
            const Current current(*this);
            table.host_unregister(poison_.data());
        }
        table.primary_context_release(0);
    }
    BareDriver(const BareDriver&) = delete;
    BareDriver& operator=(const BareDriver&) = delete;

    void check(cu::Result result, const char* call) const { cu::check(table, result, call); }

    // Makes the context current on this thread.
    class Current {
      public:
        explicit Current(const BareDriver& bare) : bare_(bare) {
            bare_.check(bare_.table.context_push(bare_.context_), "context_push");
        }
        ~Current() {
            cu::Context popped = nullptr;
            bare_.table.context_pop(&popped);
        }

      private:
        const BareDriver& bare_;
    };

    // Fills memory of the device with 0xFF, NaN in every type, by `stream`.
    cu::Result poison(cu::DevicePtr to, size_t num_bytes, cu::Stream stream) const {
        cu::Result result = cu::kSuccess;
        for (size_t done = 0; done < num_bytes && result == cu::kSuccess; done += kPoisonBytes)
            result = table.copy_to_device(to + done, poison_.data(), std::min(kPoisonBytes, num_bytes - done), stream);
        return result;
    }

    void synchronize(cu::Stream stream) const {
        cu::Event event = nullptr;
        check(table.event_create(&event, cu::kEventBlockingSync), "event_create");
        check(table.event_record(event, stream), "event_record");
        check(table.event_synchronize(event), "event_synchronize");
        check(table.event_destroy(event), "event_destroy");
    }

    const cu::DriverTable& table;
    const MemoryOperation stream_wait_value; // null where the driver has none
    const MemoryOperation stream_write_value;

  private:
    static constexpr size_t kPoisonBytes = 65536;
    cu::Context context_ = nullptr;
    distzo2::Arena poison_{kPoisonBytes};
};

class TestDriver {
  public:
    int max_delay_us = 0;
    size_t max_registration_bytes = SIZE_MAX;
    std::function<void(void* address, size_t num_bytes)> before_pinning; // called with what is to be registered
    bool lists_no_devices = false;
    std::string failing_call;     // this call (a name of the driver's table) fails ...
    int calls_before_failure = 0; // ... after so many that succeed
    cu::Result failure = cu::kOutOfMemory;

    explicit TestDriver(int num_devices = 1) {
        const char* const name = std::getenv("DISTZO2_TEST_DRIVER");
        if (name != nullptr && std::strcmp(name, "real") == 0) {
            bare_ = libcuda();
        } else if (name == nullptr || std::strcmp(name, "simulated") == 0) {
            simulated_ = std::make_unique<simulated::Driver>(simulated::Options{.num_devices = num_devices});
            bare_ = std::make_shared<BareDriver>(simulated::Driver::table(), simulated::Driver::stream_wait_value,
                                                 simulated::Driver::stream_write_value);
        } else {
            distzo2::fail("DISTZO2_TEST_DRIVER is '", name, "', expected real or simulated");
        }
        int num_listed = 0;
        bare_->check(bare_->table.device_get_count(&num_listed), "device_get_count");
        if (num_listed < num_devices)
            throw testing::Skipped{distzo2::join_text(num_devices, " devices are needed, libcuda lists ", num_listed)};
        current() = this;
        static const cu::DriverTable table = make_table();
        cu::set_driver(&table);
    }
    ~TestDriver() {
        cu::set_driver(nullptr);
        current() = nullptr;
    }
    TestDriver(const TestDriver&) = delete;
    TestDriver& operator=(const TestDriver&) = delete;

    int num_events_created() const { return count(Call::event_create); }
    int num_streams_created() const { return count(Call::stream_create); }
    int num_registrations() const { return count(Call::host_register); }
    // What the simulated driver refused; empty when nothing was, and of libcuda, which does not tell.
    std::string misuse() { return simulated_ ? simulated_->misuse() : ""; }
    // What was made and not destroyed.
    std::string leaks() const {
        return distzo2::join_text(count(Call::stream_create) - count(Call::stream_destroy), " streams, ",
                                  count(Call::event_create) - count(Call::event_destroy), " events, ",
                                  count(Call::host_register) - count(Call::host_unregister), " registrations, ",
                                  count(Call::memory_allocate) - count(Call::memory_free), " allocations, ",
                                  count(Call::primary_context_retain) - count(Call::primary_context_release),
                                  " contexts");
    }
    static constexpr const char* kNoLeaks = "0 streams, 0 events, 0 registrations, 0 allocations, 0 contexts";

    const BareDriver& bare() const { return *bare_; }

  private:
#define TEST_DRIVER_NAME(member, symbol, parameters) member,
    enum class Call { DZO_DRIVER_FUNCTIONS(TEST_DRIVER_NAME) kNumCalls };
#undef TEST_DRIVER_NAME

    static TestDriver*& current() {
        static TestDriver* driver = nullptr;
        return driver;
    }
    // Loaded once, with a context that stays to the end: making one takes tenths of a second on a GPU.
    static std::shared_ptr<BareDriver> libcuda() {
        static std::shared_ptr<BareDriver> bare;
        if (!bare) {
            setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); // else a stream that is held may hold others
            const auto [usable, reason] = cu::available();
            if (!usable)
                throw testing::Skipped{reason};
            void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
            const auto operation = [library](const char* symbol) {
                return reinterpret_cast<BareDriver::MemoryOperation>(dlsym(library, symbol));
            };
            bare = std::shared_ptr<BareDriver>(
                new BareDriver(cu::driver(), operation("cuStreamWaitValue32_v2"), operation("cuStreamWriteValue32_v2")),
                [](BareDriver*) {}); // the process's end comes after the driver's
        }
        return bare;
    }
    int count(Call call) const { return counts_[static_cast<size_t>(call)].load(); }
    bool fails(const char* name) {
        const std::lock_guard lock(mutex_);
        return failing_call == name && calls_before_failure-- <= 0;
    }

    template <Call kCall, auto kMember>
    struct Counted;
    template <Call kCall, typename... Args, cu::Result (*cu::DriverTable::*kMember)(Args...)>
    struct Counted<kCall, kMember> {
        static inline const char* name = nullptr;
        static cu::Result call(Args... args) {
            TestDriver& driver = *current();
            if (driver.fails(name))
                return driver.failure;
            cu::Result first = cu::kSuccess;
            if constexpr (kCall == Call::copy_to_device)
                first = driver.before_upload(args...);
            else if constexpr (kCall == Call::copy_to_host)
                first = driver.before_download(args...);
            else if constexpr (kCall == Call::launch_host_function)
                first = driver.before_host_function(args...);
            else if constexpr (kCall == Call::host_register)
                first = driver.before_registration(args...);
            if (first != cu::kSuccess)
                return first;
            const cu::Result result = (driver.bare_->table.*kMember)(args...);
            if (result == cu::kSuccess)
                ++driver.counts_[static_cast<size_t>(kCall)];
            if constexpr (kCall == Call::device_get_count)
                if (driver.lists_no_devices)
                    ((*args = 0), ...);
            return result;
        }
    };

    // What a stream does before a copy or a host function of its own: it lingers, and poisons what is to be filled.
    struct Disturbance {
        int max_delay_us;
        void* poisoned; // or null
        size_t num_bytes;
        static void run(void* argument) {
            const std::unique_ptr<Disturbance> one(static_cast<Disturbance*>(argument));
            random_delay(one->max_delay_us);
            if (one->poisoned == nullptr)
                return;
            std::memset(one->poisoned, 0xFF, one->num_bytes);
            random_delay(one->max_delay_us);
        }
    };
    cu::Result disturb(cu::Stream stream, void* poisoned = nullptr, size_t num_bytes = 0) {
        if (max_delay_us == 0 && poisoned == nullptr)
            return cu::kSuccess;
        std::unique_ptr<Disturbance> one(new Disturbance{max_delay_us, poisoned, num_bytes});
        const cu::Result result = bare_->table.launch_host_function(stream, Disturbance::run, one.get());
        if (result == cu::kSuccess)
            (void)one.release(); // the stream has it
        return result;
    }
    cu::Result before_upload(cu::DevicePtr to, const void*, size_t num_bytes, cu::Stream stream) {
        if (const cu::Result result = disturb(stream); result != cu::kSuccess)
            return result;
        if (const cu::Result result = bare_->poison(to, num_bytes, stream); result != cu::kSuccess)
            return result;
        return disturb(stream);
    }
    cu::Result before_download(void* to, cu::DevicePtr, size_t num_bytes, cu::Stream stream) {
        return disturb(stream, to, num_bytes);
    }
    cu::Result before_host_function(cu::Stream stream, cu::HostFunction, void*) { return disturb(stream); }
    cu::Result before_registration(void* address, size_t num_bytes, unsigned) const {
        if (before_pinning)
            before_pinning(address, num_bytes);
        return num_bytes > max_registration_bytes ? cu::kOutOfMemory : cu::kSuccess;
    }

    static cu::DriverTable make_table() {
        cu::DriverTable table;
#define TEST_DRIVER_MEMBER(member, symbol, parameters)                                                                 \
    Counted<Call::member, &cu::DriverTable::member>::name = #member;                                                   \
    table.member = Counted<Call::member, &cu::DriverTable::member>::call;
        DZO_DRIVER_FUNCTIONS(TEST_DRIVER_MEMBER)
#undef TEST_DRIVER_MEMBER
        return table;
    }

    std::unique_ptr<simulated::Driver> simulated_;
    std::shared_ptr<BareDriver> bare_;
    std::mutex mutex_;
    std::array<std::atomic<int>, static_cast<size_t>(Call::kNumCalls)> counts_{};
};
