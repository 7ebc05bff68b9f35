// Philox against the Random123 known-answer vectors, the counter's layout, and Rademacher signs.
#include "testing.h"

#include "noise/rademacher.h"

using namespace distzo2;

namespace {

bool equal(const PhiloxWords& words, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return words.w[0] == a && words.w[1] == b && words.w[2] == c && words.w[3] == d;
}

} // namespace

// kat_vectors of Random123: philox 4x32, 10 rounds.
TEST(known_answers) {
    CHECK(equal(philox4x32_10(0, 0, 0, 0, philox_keys(0)), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
    const uint32_t ones = 0xffffffff;
    CHECK(equal(philox4x32_10(ones, ones, ones, ones, philox_keys(~uint64_t{0})), 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
                0x6d5451fd));
    CHECK(equal(philox4x32_10(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, philox_keys(0x299f31d0a4093822)),
                0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST(counter_layout) {
    const uint64_t seed = 0x299f31d0a4093822, group = 0x5243f6a88;
    const Draw draw = make_draw(Purpose::kRounding, 0x85a308d3, 0x13198a2e, 0xABCDE);
    const PhiloxWords words = philox_group(draw, seed, group);
    const PhiloxWords expected = philox4x32_10(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x02ABCDE5, philox_keys(seed));
    CHECK(equal(words, expected.w[0], expected.w[1], expected.w[2], expected.w[3]));
}

TEST(rademacher_bits) {
    const PhiloxWords words{{0x00000001, 0x80000000, 0xFFFFFFFF, 0x00000000}};
    CHECK_EQ(rademacher_value(words, 0), 1.0f);
    CHECK_EQ(rademacher_value(words, 1), -1.0f);
    CHECK_EQ(rademacher_value(words, 62), -1.0f);
    CHECK_EQ(rademacher_value(words, 63), 1.0f);
    for (uint32_t lane = 64; lane < 96; ++lane)
        CHECK_EQ(rademacher_value(words, lane), 1.0f);
    for (uint32_t lane = 96; lane < 128; ++lane)
        CHECK_EQ(rademacher_value(words, lane), -1.0f);
    for (uint32_t lane = 0; lane < 128; ++lane)
        CHECK_EQ(rademacher_value(words, lane), rademacher_from_lsb(words.w[lane / 32] >> (lane % 32)));
}
