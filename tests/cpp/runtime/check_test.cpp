// The text of a failed check: file, line, condition, and the values that came.
#include "common/check.h"
#include "testing.h"

namespace {

int calls = 0;

bool count_call(bool result) {
    ++calls;
    return result;
}

TEST(a_check_that_holds_does_nothing) {
    calls = 0;
    DZO_CHECK(count_call(true), "unused");
    CHECK_EQ(calls, 1);
}

TEST(a_failed_check_names_place_condition_and_values) {
    const int num_blocks = 3;
    const int line = __LINE__ + 1;
    const std::string text = testing::thrown_text([&] { DZO_CHECK(num_blocks < 2, "num_blocks is ", num_blocks); });
    CHECK_EQ(text, std::string("tests/cpp/runtime/check_test.cpp:") + std::to_string(line) +
                       ": expected num_blocks < 2: num_blocks is 3");
    calls = 0;
    CHECK_THROWS([] { DZO_CHECK(count_call(false)); }(), "expected count_call(false)");
    CHECK_EQ(calls, 1);
}

TEST(a_check_is_one_statement) {
    bool reached = false;
    if (calls < 0)
        DZO_CHECK(false);
    else
        reached = true;
    CHECK(reached);
}

} // namespace
