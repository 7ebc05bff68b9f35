// Ends the process with a message when a test takes longer than it may: a hang in the runtime is a failure, not a wait.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

class Watchdog {
  public:
    explicit Watchdog(const char* name, int seconds = 60) : thread_([this, name, seconds] { run(name, seconds); }) {}
    ~Watchdog() {
        {
            const std::lock_guard lock(mutex_);
            done_ = true;
        }
        ended_.notify_all();
        thread_.join();
    }

  private:
    void run(const char* name, int seconds) {
        // On the system clock: GCC 12's thread sanitizer does not know waits on the steady one.
        const auto end = std::chrono::system_clock::now() + std::chrono::seconds(seconds);
        std::unique_lock lock(mutex_);
        if (!ended_.wait_until(lock, end, [this] { return done_; })) {
            std::fprintf(stderr, "watchdog: %s hangs: not done after %d s\n", name, seconds);
            std::abort();
        }
    }
    std::mutex mutex_;
    std::condition_variable ended_;
    bool done_ = false;
    std::thread thread_;
};
