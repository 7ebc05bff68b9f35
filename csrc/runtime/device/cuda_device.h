// A CUDA device over the driver's table, in its primary context (the one that torch uses). Every call needs a
// DeviceGuard on its thread. Streams are non-blocking: they order themselves against others by events alone.
#pragma once

#include "runtime/device/device.h"
#include "runtime/device/driver.h"

namespace distzo2 {

// Of the PCI device "0000:3B:00.0" as the kernel tells it, or -1. `root` stands before /sys in tests.
int numa_node_of(std::string bus_id, const std::string& root = "");

class CudaDevice final : public Device {
  public:
    CudaDevice(const cu::DriverTable& driver, int ordinal);
    ~CudaDevice() override;

    const std::string& name() const override { return name_; }
    bool is_cpu() const override { return false; }
    int numa_node() const override { return numa_node_; }
    size_t copy_chunk_bytes() const override;
    Stream create_stream(bool urgent) override;
    void destroy_stream(Stream stream) noexcept override;
    Event create_event(bool timed) override;
    void destroy_event(Event event) noexcept override;
    void record(Event event, Stream stream) override;
    void wait(Stream stream, Event event) override;
    bool query(Event event) override;
    void synchronize(Event event) override;
    double elapsed_ns(Event start, Event end) override;
    int64_t record_and_date(Event event, Stream stream) override;
    void copy(Stream stream, void* to, const void* from, size_t num_bytes, Direction direction) override;
    void call(Stream stream, void (*function)(void*), void* argument) override;
    void register_host(void* address, size_t num_bytes) override;
    void unregister_host(void* address) noexcept override;
    void enter() override;
    void leave() noexcept override;

  private:
    const cu::DriverTable& driver_;
    std::string name_;
    cu::DeviceId device_ = 0;
    cu::Context context_ = nullptr;
    int least_priority_ = 0;
    int greatest_priority_ = 0;
    int numa_node_ = -1;
};

} // namespace distzo2
