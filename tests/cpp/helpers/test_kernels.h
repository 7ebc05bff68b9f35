// What tests put on streams themselves, over either driver: work on the device's memory, and a hold.
#pragma once

#include <utility>

#include "runtime/device/device.h"
#include "test_driver.h"

// Kernels of tests are host functions, which cannot look into a device's memory: each stream has a mirror, pinned host
// memory into which it copies a slot, and from which it stores it again. Neither copy is counted, delayed or poisoned.
class Mirror {
  public:
    Mirror(const TestDriver& driver, size_t num_bytes) : bare_(driver.bare()), memory_(num_bytes) {
        const BareDriver::Current current(bare_);
        bare_.check(bare_.table.host_register(memory_.data(), memory_.num_bytes(), cu::kRegisterPortable),
                    "host_register");
    }
    ~Mirror() { // its streams are idle
        const BareDriver::Current current(bare_);
        bare_.table.host_unregister(memory_.data());
    }
    std::byte* data() const { return memory_.data(); }
    // With the device current.
    void load(distzo2::Stream stream, const std::byte* slot, size_t num_bytes) {
        bare_.check(bare_.table.copy_to_host(memory_.data(), reinterpret_cast<cu::DevicePtr>(slot), num_bytes, stream),
                    "copy_to_host");
    }
    void store(distzo2::Stream stream, std::byte* slot, size_t num_bytes) {
        bare_.check(
            bare_.table.copy_to_device(reinterpret_cast<cu::DevicePtr>(slot), memory_.data(), num_bytes, stream),
            "copy_to_device");
    }

  private:
    const BareDriver& bare_;
    distzo2::Arena memory_;
};

// Holds what comes after it on a stream until open(). Not a host function that waits: a driver may run those of all
// streams one after another.
class Gate {
  public:
    Gate(const TestDriver& driver, distzo2::Stream held) : bare_(driver.bare()), held_(held) {
        if (bare_.stream_wait_value == nullptr || bare_.stream_write_value == nullptr)
            throw testing::Skipped{"libcuda.so.1 has no cuStreamWaitValue32_v2"};
        const BareDriver::Current current(bare_);
        bare_.check(bare_.table.memory_allocate(&cell_, sizeof(uint32_t)), "memory_allocate");
        bare_.check(bare_.table.stream_create(&opener_, cu::kStreamNonBlocking, 0), "stream_create");
        bare_.check(bare_.stream_write_value(opener_, cell_, 0, 0), "stream_write_value");
        bare_.synchronize(opener_);
        bare_.check(bare_.stream_wait_value(held_, cell_, 1, kAtLeast), "stream_wait_value");
    }
    ~Gate() {
        const BareDriver::Current current(bare_);
        bare_.stream_write_value(opener_, cell_, 1, 0);
        bare_.synchronize(held_);
        bare_.table.stream_destroy(opener_);
        bare_.table.memory_free(cell_);
    }
    void open() {
        const BareDriver::Current current(bare_);
        bare_.check(bare_.stream_write_value(opener_, cell_, 1, 0), "stream_write_value");
    }

  private:
    static constexpr unsigned kAtLeast = 0; // CU_STREAM_WAIT_VALUE_GEQ
    const BareDriver& bare_;
    const distzo2::Stream held_;
    cu::DevicePtr cell_ = 0;
    distzo2::Stream opener_ = nullptr;
};
