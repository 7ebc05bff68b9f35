// Ends the process with a message when a test of the file that includes this takes longer than it may: a hang in the
// runtime is a failure, not a wait.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>

#include "testing.h"

class Watchdog {
  public:
    explicit Watchdog(const char* name) : thread_([this, name] { run(name); }) {}
    ~Watchdog() {
        {
            const std::lock_guard lock(mutex_);
            done_ = true;
        }
        ended_.notify_all();
        thread_.join();
        allow(kSeconds);
    }
    // The running test may take so long.
    static void allow(int seconds) { allowed_ = seconds; }

  private:
    static constexpr int kSeconds = 60;
    static inline std::atomic<int> allowed_{kSeconds};

    void run(const char* name) {
        // On the system clock: GCC 12's thread sanitizer does not know waits on the steady one.
        const auto start = std::chrono::system_clock::now();
        const auto end = [&] { return start + std::chrono::seconds(allowed_.load()); };
        std::unique_lock lock(mutex_);
        while (!ended_.wait_until(lock, end(), [this] { return done_; }))
            if (std::chrono::system_clock::now() >= end()) {
                std::fprintf(stderr, "watchdog: %s hangs: not done after %d s\n", name, allowed_.load());
                std::abort();
            }
    }
    std::mutex mutex_;
    std::condition_variable ended_;
    bool done_ = false;
    std::thread thread_;
};

[[maybe_unused]] static const bool watched = [] {
    testing::beside_each_test() = [](const char* name) -> std::shared_ptr<void> {
        return std::make_shared<Watchdog>(name);
    };
    return true;
}();
