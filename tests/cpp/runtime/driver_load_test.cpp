// How the driver is found: by its library's name, at the first use, and what is missing is named. Each case is a child
// process, since a process loads at most one; libraries of ours stand for the real one.
#include "testing.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "runtime/device/driver.h"

using namespace distzo2;

namespace {

// What `call` gives in a child in which `library`, if any, is loaded: the loader then takes it for the one it asks for,
// by the name that it bears inside.
std::string in_child(const char* library, const std::function<std::string()>& call) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60); // no watchdog's thread here: the thread sanitizer bears no threads in a child of one that has some
        std::string text;
        if (library != nullptr && dlopen(library, RTLD_NOW | RTLD_LOCAL) == nullptr)
            text = dlerror();
        else if (const std::string thrown = testing::thrown_text([&] { text = call(); }); !thrown.empty())
            text = thrown;
        _exit(write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()) ? 0 : 1);
    }
    close(ends[1]);
    std::string text(4096, '\0');
    const ssize_t num_bytes = read(ends[0], text.data(), text.size());
    close(ends[0]);
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child && status == 0, "status ", status);
    text.resize(num_bytes > 0 ? static_cast<size_t>(num_bytes) : 0);
    return text;
}

std::string available_text() {
    const auto [usable, reason] = cu::available();
    return usable ? "usable" : reason;
}

} // namespace

TEST(a_driver_is_loaded_and_called) {
    const auto call = [] {
        int num_devices = 0;
        cu::check(cu::driver(), cu::driver().device_get_count(&num_devices), "count");
        return available_text() + ", " + std::to_string(num_devices);
    };
    CHECK_EQ(in_child(FAKE_LIBCUDA, call), "usable, 1");
    CHECK_EQ(in_child(FAKE_LIBCUDA,
                      [&] {
                          setenv("FAKE_LIBCUDA_DEVICES", "3", 1);
                          return call();
                      }),
             "usable, 3");
}

TEST(a_driver_without_a_device_says_so) {
    CHECK_EQ(in_child(FAKE_LIBCUDA,
                      [] {
                          setenv("FAKE_LIBCUDA_DEVICES", "0", 1);
                          return available_text();
                      }),
             "no CUDA device: the driver lists none");
    const std::string text = in_child(FAKE_LIBCUDA, [] {
        setenv("FAKE_LIBCUDA_INIT", "100", 1);
        return available_text();
    });
    CHECK(text.starts_with("no CUDA device: cuInit says CUDA_ERROR_NO_DEVICE = 100"), text);
}

TEST(a_driver_that_cannot_start_is_asked_once) {
    const std::string text = in_child(FAKE_LIBCUDA, [] {
        setenv("FAKE_LIBCUDA_INIT", "3", 1);
        const std::string first = available_text();
        unsetenv("FAKE_LIBCUDA_INIT");
        return first + " | " + available_text();
    });
    CHECK(text.starts_with("the CUDA driver cannot start: cuInit says "), text);
    CHECK_EQ(text.substr(text.find(" | ") + 3), text.substr(0, text.find(" | "))); // the failure is remembered
}

TEST(an_old_driver_is_refused_by_the_function_it_lacks) {
    CHECK_EQ(in_child(OLD_LIBCUDA, available_text), "the CUDA driver is too old: libcuda.so.1 has no cuLaunchHostFunc");
}

TEST(no_driver_is_named) {
    if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) != nullptr)
        throw testing::Skipped{"libcuda.so.1 is here"};
    const std::string text = in_child(nullptr, available_text);
    CHECK(text.starts_with("no CUDA driver: libcuda.so.1 cannot be loaded (libcuda.so.1: cannot open"), text);
}
