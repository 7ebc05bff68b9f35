// A small test runner: one executable per *_test.cpp file, which includes this header once. TEST(name) { ... }
// registers a test; CHECK records a failure and goes on, REQUIRE ends the test (throws, so not from a thread of the
// test's own); both may be used from several threads at once. An argument on the command line runs only the tests whose
// name has it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <iostream>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace testing {

struct Test {
    const char* name;
    void (*body)();
};

struct Abandoned {}; // thrown by REQUIRE; the failure is already counted

struct Skipped { // thrown by a test that cannot run here
    std::string reason;
};

inline constexpr int kAllSkipped = 77; // exit status; ctest's SKIP_RETURN_CODE

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline std::atomic<int>& failures() {
    static std::atomic<int> count{0};
    return count;
}

// What lives while a test runs: of watchdog.h.
inline std::function<std::shared_ptr<void>(const char* name)>& beside_each_test() {
    static std::function<std::shared_ptr<void>(const char*)> make;
    return make;
}

struct Register {
    Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

template <typename... Parts>
void report(const char* file, int line, const char* expected, const Parts&... parts) {
    static std::mutex mutex;
    std::ostringstream text;
    text << "  " << file << ':' << line << ": expected " << expected;
    if constexpr (sizeof...(parts) > 0) {
        text << ": ";
        (text << ... << parts);
    }
    text << '\n';
    failures().fetch_add(1);
    const std::lock_guard lock(mutex);
    std::cout << text.str() << std::flush;
}

template <typename Left, typename Right>
void check_equal(const char* file, int line, const char* expected, const Left& left, const Right& right) {
    if (!(left == right))
        report(file, line, expected, left, " and ", right);
}

// Text of the exception that `call` throws, or "" if it throws none.
inline std::string thrown_text(const std::function<void()>& call) {
    try {
        call();
    } catch (const std::exception& error) {
        return error.what()[0] != '\0' ? error.what() : "(exception without text)";
    }
    return "";
}

inline void check_text(const char* file, int line, const char* expected, const std::string& text,
                       std::initializer_list<std::string> parts) {
    for (const std::string& part : parts)
        if (text.empty() || text.find(part) == std::string::npos)
            report(file, line, expected, "'", part, "' but got '", text, "'");
}

inline int run(const char* filter) {
    int num_passed = 0;
    int num_failed = 0;
    int num_skipped = 0;
    for (const Test& test : tests()) {
        if (filter != nullptr && std::strstr(test.name, filter) == nullptr)
            continue;
        const int failures_before = failures().load();
        const auto start = std::chrono::steady_clock::now();
        const std::shared_ptr<void> beside = beside_each_test() ? beside_each_test()(test.name) : nullptr;
        try {
            test.body();
        } catch (const Abandoned&) {
        } catch (const Skipped& skipped) {
            std::printf("skip %s: %s\n", test.name, skipped.reason.c_str());
            ++num_skipped;
            continue;
        } catch (const std::exception& error) {
            report(test.name, 0, "no exception", error.what());
        } catch (...) {
            report(test.name, 0, "no exception", "one that is no std::exception");
        }
        const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
        const bool passed = failures().load() == failures_before;
        ++(passed ? num_passed : num_failed);
        std::printf("%s %s (%.0f ms)\n", passed ? "ok  " : "FAIL", test.name, elapsed.count());
        std::fflush(stdout);
    }
    std::printf("%d passed, %d failed, %d skipped\n", num_passed, num_failed, num_skipped);
    if (num_failed > 0 || num_passed + num_skipped == 0)
        return 1;
    return num_passed > 0 ? 0 : kAllSkipped;
}

} // namespace testing

#define TEST(name)                                                                                                     \
    static void test_##name();                                                                                         \
    static const ::testing::Register register_##name(#name, test_##name);                                              \
    static void test_##name()

// Further arguments are streamed into the failure's text: CHECK(a == b, "a ", a, " b ", b).
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            ::testing::report(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__);                              \
    } while (false)

#define REQUIRE(condition, ...)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            ::testing::report(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__);                              \
            throw ::testing::Abandoned{};                                                                              \
        }                                                                                                              \
    } while (false)

#define CHECK_EQ(left, right) ::testing::check_equal(__FILE__, __LINE__, #left " == " #right, left, right)

// The text must have each of the parts.
#define CHECK_TEXT(text, ...) ::testing::check_text(__FILE__, __LINE__, #text " to have", text, {__VA_ARGS__})

// The expression must throw a std::exception whose text has each of the parts.
#define CHECK_THROWS(expression, ...)                                                                                  \
    ::testing::check_text(__FILE__, __LINE__, #expression " to throw",                                                 \
                          ::testing::thrown_text([&] { (void)(expression); }), {__VA_ARGS__})

int main(int argc, char** argv) { return ::testing::run(argc > 1 ? argv[1] : nullptr); }
