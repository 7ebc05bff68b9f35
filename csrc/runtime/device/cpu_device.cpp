#include "runtime/device/cpu_device.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/check.h"
#include "runtime/common.h"

namespace distzo2 {

// One lock serves all queues and events: items are copies of megabytes, so that it is idle. A queue's thread sleeps on
// a condition of its own, and who waits for an event on `changed`: a wake-up costs tens of
// microseconds, so only those are woken whom an item may concern.
struct CpuDevice::State {
    CopyHook hook;
    std::mutex mutex;
    std::condition_variable changed;
    std::string error; // of the first copy that failed; kept
};

struct CpuDevice::Mark { // an Event
    uint64_t num_recorded = 0;
    uint64_t num_completed = 0;
    int64_t time_ns = 0;
};

struct CpuDevice::Item {
    enum class Kind { kCopy, kRecord, kWait, kCall } kind;
    void* to = nullptr;
    const void* from = nullptr;
    size_t num_bytes = 0;
    Direction direction = Direction::kUpload;
    Mark* mark = nullptr;
    uint64_t sequence = 0; // of the mark's record
    void (*function)(void*) = nullptr;
    void* argument = nullptr;
};

struct CpuDevice::Queue {                            // a Stream
    std::vector<Item> items = std::vector<Item>(64); // a ring; grows while warming up only
    size_t head = 0;
    size_t count = 0;
    bool closing = false;
    std::condition_variable ready;
    std::thread thread;
};

namespace {
constexpr size_t kCopyChunkBytes = 2 * kMiB; // so that the streams share a block of 4 MiB too
}

CpuDevice::CpuDevice(CopyHook hook) : state_(std::make_unique<State>()) { state_->hook = std::move(hook); }

CpuDevice::~CpuDevice() = default;

const std::string& CpuDevice::name() const {
    static const std::string text = "cpu";
    return text;
}

size_t CpuDevice::copy_chunk_bytes() const { return kCopyChunkBytes; }

void CpuDevice::throw_if_failed() const {
    if (!state_->error.empty()) [[unlikely]]
        throw std::runtime_error(state_->error);
}

void CpuDevice::run(State& state, Queue& queue) {
    std::unique_lock lock(state.mutex);
    while (true) {
        queue.ready.wait(lock, [&] { return queue.count > 0 || queue.closing; });
        if (queue.count == 0)
            return;
        const Item item = queue.items[queue.head];
        queue.head = (queue.head + 1) % queue.items.size();
        --queue.count;
        switch (item.kind) {
        case Item::Kind::kWait:
            state.changed.wait(lock, [&] { return item.mark->num_completed >= item.sequence; });
            break;
        case Item::Kind::kRecord:
            item.mark->num_completed = std::max(item.mark->num_completed, item.sequence);
            item.mark->time_ns = now_ns();
            break;
        case Item::Kind::kCall:
            lock.unlock();
            item.function(item.argument);
            lock.lock();
            break;
        case Item::Kind::kCopy:
            // After a failure the copies are dropped but the marks still complete, so that no waiter is left behind.
            if (!state.error.empty())
                break;
            lock.unlock();
            std::string failure;
            try {
                if (state.hook)
                    state.hook(item.direction, item.to, item.from, item.num_bytes);
                std::memcpy(item.to, item.from, item.num_bytes);
            } catch (const std::exception& error) {
                failure = error.what();
            }
            lock.lock();
            if (!failure.empty() && state.error.empty())
                state.error = failure;
            break;
        }
        if (item.kind == Item::Kind::kRecord)
            state.changed.notify_all();
    }
}

void CpuDevice::push(Queue& queue, const Item& item) {
    if (queue.count == queue.items.size()) {
        std::vector<Item> larger(queue.items.size() * 2);
        for (size_t i = 0; i < queue.count; ++i)
            larger[i] = queue.items[(queue.head + i) % queue.items.size()];
        queue.items = std::move(larger);
        queue.head = 0;
    }
    queue.items[(queue.head + queue.count) % queue.items.size()] = item;
    ++queue.count;
    queue.ready.notify_one();
}

Stream CpuDevice::create_stream(bool /*urgent*/) {
    auto queue = std::make_unique<Queue>();
    Queue& reference = *queue;
    State& state = *state_;
    try {
        queue->thread = std::thread([&state, &reference] { run(state, reference); });
    } catch (const std::system_error& error) {
        fail("device 'cpu': cannot start a thread for a stream: ", error.what());
    }
    return queue.release();
}

void CpuDevice::destroy_stream(Stream stream) noexcept {
    auto* queue = static_cast<Queue*>(stream);
    {
        const std::lock_guard lock(state_->mutex);
        queue->closing = true;
        queue->ready.notify_one();
    }
    queue->thread.join();
    delete queue;
}

Event CpuDevice::create_event(bool /*timed*/) { return new Mark; }

void CpuDevice::destroy_event(Event event) noexcept { delete static_cast<Mark*>(event); }

void CpuDevice::record(Event event, Stream stream) {
    auto* mark = static_cast<Mark*>(event);
    const std::lock_guard lock(state_->mutex);
    ++mark->num_recorded;
    if (stream == nullptr) {
        mark->num_completed = mark->num_recorded;
        mark->time_ns = now_ns();
        state_->changed.notify_all();
        return;
    }
    push(*static_cast<Queue*>(stream), {.kind = Item::Kind::kRecord, .mark = mark, .sequence = mark->num_recorded});
}

void CpuDevice::wait(Stream stream, Event event) {
    if (stream == nullptr)
        return synchronize(event);
    auto* mark = static_cast<Mark*>(event);
    const std::lock_guard lock(state_->mutex);
    if (mark->num_completed < mark->num_recorded)
        push(*static_cast<Queue*>(stream), {.kind = Item::Kind::kWait, .mark = mark, .sequence = mark->num_recorded});
}

bool CpuDevice::query(Event event) {
    const auto* mark = static_cast<Mark*>(event);
    const std::lock_guard lock(state_->mutex);
    throw_if_failed();
    return mark->num_completed == mark->num_recorded;
}

void CpuDevice::synchronize(Event event) {
    const auto* mark = static_cast<Mark*>(event);
    std::unique_lock lock(state_->mutex);
    const uint64_t sequence = mark->num_recorded;
    state_->changed.wait(lock, [&] { return mark->num_completed >= sequence; });
    throw_if_failed();
}

double CpuDevice::elapsed_ns(Event start, Event end) {
    const std::lock_guard lock(state_->mutex);
    return static_cast<double>(static_cast<Mark*>(end)->time_ns - static_cast<Mark*>(start)->time_ns);
}

int64_t CpuDevice::record_and_date(Event event, Stream stream) {
    record(event, stream);
    synchronize(event);
    const std::lock_guard lock(state_->mutex);
    return static_cast<Mark*>(event)->time_ns;
}

void CpuDevice::copy(Stream stream, void* to, const void* from, size_t num_bytes, Direction direction) {
    DZO_CHECK(stream != nullptr, "copies need a stream of the device's own");
    const std::lock_guard lock(state_->mutex);
    throw_if_failed();
    push(*static_cast<Queue*>(stream),
         {.kind = Item::Kind::kCopy, .to = to, .from = from, .num_bytes = num_bytes, .direction = direction});
}

void CpuDevice::call(Stream stream, void (*function)(void*), void* argument) {
    if (stream == nullptr)
        return function(argument);
    const std::lock_guard lock(state_->mutex);
    push(*static_cast<Queue*>(stream), {.kind = Item::Kind::kCall, .function = function, .argument = argument});
}

void CpuDevice::register_host(void* /*address*/, size_t /*num_bytes*/) {
    fail("host memory cannot be pinned for the device 'cpu': only a CUDA driver does that");
}

void CpuDevice::unregister_host(void* /*address*/) noexcept {}

} // namespace distzo2
