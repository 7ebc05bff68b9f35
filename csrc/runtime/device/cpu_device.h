// The CPU as a device: each stream is a thread that works through a queue, and a copy is a memcpy. So all of the copy
// engine's stream code runs, and is tested, without a GPU.
#pragma once

#include <functional>
#include <memory>

#include "runtime/device/device.h"

namespace distzo2 {

// Called by the stream's thread before each copy; tests delay or fail (throw from) copies with it.
using CopyHook = std::function<void(Direction direction, void* to, const void* from, size_t num_bytes)>;

class CpuDevice final : public Device {
  public:
    explicit CpuDevice(CopyHook hook = nullptr);
    ~CpuDevice() override; // its streams must have been destroyed

    const std::string& name() const override;
    bool is_cpu() const override { return true; }
    int numa_node() const override { return -1; } // its threads run on all of them
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
    void enter() override {}
    void leave() noexcept override {}

  private:
    struct State;
    struct Queue;
    struct Mark;
    struct Item;
    void push(Queue& queue, const Item& item);
    static void run(State& state, Queue& queue);
    void throw_if_failed() const;
    std::unique_ptr<State> state_;
};

} // namespace distzo2
