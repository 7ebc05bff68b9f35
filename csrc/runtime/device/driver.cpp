#include "runtime/device/driver.h"

#include <dlfcn.h>

#include <mutex>
#include <optional>
#include <stdexcept>

#include "runtime/common.h"

namespace distzo2::cu {
namespace {

struct Loader {
    std::mutex mutex;
    const DriverTable* injected = nullptr;
    std::optional<DriverTable> loaded;
    std::string failure;
};

// Never destroyed: streams and registrations may be released while the process ends.
Loader& loader() {
    static Loader* instance = new Loader;
    return *instance;
}

std::string error_text(const DriverTable& table, Result result) {
    const char* name = nullptr;
    const char* text = nullptr;
    if (table.get_error_name(result, &name) != kSuccess || name == nullptr)
        name = "unknown CUDA error";
    if (table.get_error_string(result, &text) != kSuccess || text == nullptr)
        text = "no description";
    return join_text(name, " = ", result, " (", text, ")");
}

DriverTable load_table() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
        fail("no CUDA driver: libcuda.so.1 cannot be loaded (", dlerror(), ")");
    DriverTable table;
#define DZO_DRIVER_LOAD(member, symbol, parameters)                                                                    \
    table.member = reinterpret_cast<decltype(table.member)>(dlsym(library, symbol));                                   \
    if (table.member == nullptr)                                                                                       \
        fail("the CUDA driver is too old: libcuda.so.1 has no ", symbol);
    DZO_DRIVER_FUNCTIONS(DZO_DRIVER_LOAD)
#undef DZO_DRIVER_LOAD
    const Result result = table.init(0);
    if (result != kSuccess)
        fail(result == kNoDevice ? "no CUDA device: " : "the CUDA driver cannot start: ", "cuInit says ",
             error_text(table, result));
    return table;
}

} // namespace

const DriverTable& driver() {
    Loader& state = loader();
    const std::lock_guard lock(state.mutex);
    if (state.injected != nullptr)
        return *state.injected;
    if (!state.loaded && state.failure.empty()) {
        try {
            state.loaded = load_table();
        } catch (const std::runtime_error& error) {
            state.failure = error.what();
        }
    }
    if (!state.loaded)
        throw std::runtime_error(state.failure);
    return *state.loaded;
}

void set_driver(const DriverTable* table) {
    Loader& state = loader();
    const std::lock_guard lock(state.mutex);
    state.injected = table;
}

std::pair<bool, std::string> available() {
    try {
        const DriverTable& table = driver();
        int num_devices = 0;
        check(table, table.device_get_count(&num_devices), "cuDeviceGetCount");
        if (num_devices == 0)
            return {false, "no CUDA device: the driver lists none"};
        return {true, ""};
    } catch (const std::runtime_error& error) {
        return {false, error.what()};
    }
}

void check(const DriverTable& table, Result result, const char* call) {
    if (result != kSuccess) [[unlikely]]
        fail(call, ": ", error_text(table, result));
}

} // namespace distzo2::cu
