// Conversions to bf16 and fp16 against definitions in float64: every 16-bit value's neighbourhood, nearest and
// stochastic.
#include "testing.h"

#include <cmath>
#include <limits>

#include "noise/rounding.h"

using namespace distzo2;

namespace {

struct Format {
    const char* name;
    int fraction_bits;
    double smallest_normal;
    double largest;
    uint16_t infinity;
    uint16_t nan;
    float (*decode)(uint16_t);
    uint16_t (*nearest)(float);
    uint16_t (*stochastic)(float, uint32_t);
};

const Format kFormats[] = {
    {"bf16", 7, 0x1p-126, 0x1.FEp127, 0x7F80, kNanBf16, bf16_to_float, float_to_bf16, float_to_bf16_stochastic},
    {"fp16", 10, 0x1p-14, 65504, 0x7C00, kNanFp16, fp16_to_float, float_to_fp16, float_to_fp16_stochastic},
};

double decode_exactly(const Format& format, uint16_t h) {
    const int exponent = (h & 0x7FFF) >> format.fraction_bits, fraction = h & ((1 << format.fraction_bits) - 1);
    const double scale = format.smallest_normal * std::ldexp(1.0, -format.fraction_bits);
    const double magnitude =
        exponent == 0 ? fraction * scale : std::ldexp((1 << format.fraction_bits) + fraction, exponent - 1) * scale;
    return (h & 0x8000) ? -magnitude : magnitude;
}

double spacing_at(const Format& format, double magnitude) {
    if (magnitude < format.smallest_normal)
        return format.smallest_normal * std::ldexp(1.0, -format.fraction_bits);
    return std::ldexp(1.0, std::ilogb(magnitude) - format.fraction_bits);
}

// Bits of a multiple of the spacing; infinity beyond the largest.
uint16_t encode(const Format& format, double magnitude, bool negative) {
    const uint16_t sign = negative ? 0x8000 : 0;
    if (magnitude > format.largest)
        return sign | format.infinity;
    if (magnitude < format.smallest_normal)
        return sign | static_cast<uint16_t>(magnitude / spacing_at(format, 0));
    const int exponent = std::ilogb(magnitude) - std::ilogb(format.smallest_normal);
    const double fraction = magnitude / spacing_at(format, magnitude); // in [2^bits, 2^(bits + 1))
    return sign | static_cast<uint16_t>((exponent << format.fraction_bits) + static_cast<int>(fraction));
}

uint16_t expected_nearest(const Format& format, float x) {
    const double magnitude = std::fabs(static_cast<double>(x)), spacing = spacing_at(format, magnitude);
    return encode(format, std::nearbyint(magnitude / spacing) * spacing, std::signbit(x));
}

uint16_t expected_stochastic(const Format& format, float x, uint32_t r) {
    const double magnitude = std::fabs(static_cast<double>(x)), spacing = spacing_at(format, magnitude);
    const double y = magnitude / spacing, below = std::floor(y);
    const bool up = std::floor((y - below) * 65536) + r >= 65536;
    return encode(format, (below + (up ? 1 : 0)) * spacing, std::signbit(x));
}

const uint32_t kRandom[] = {0, 1, 7, 8, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFF8, 0xFFFE, 0xFFFF};

void check_value(const Format& format, float x, int& num_wrong) {
    if (format.nearest(x) != expected_nearest(format, x))
        ++num_wrong;
    for (uint32_t r : kRandom)
        if (format.stochastic(x, r) != expected_stochastic(format, x, r))
            ++num_wrong;
}

} // namespace

TEST(decode_every_value) {
    for (const Format& format : kFormats)
        for (uint32_t h = 0; h < 0x10000; ++h) {
            const uint16_t bits = static_cast<uint16_t>(h), magnitude = bits & 0x7FFF;
            const float value = format.decode(bits);
            if (magnitude > format.infinity) {
                CHECK(std::isnan(value), format.name, ' ', h);
            } else if (magnitude == format.infinity) {
                CHECK(std::isinf(value) && std::signbit(value) == (h >= 0x8000), format.name, ' ', h);
            } else {
                CHECK(value == decode_exactly(format, bits) && std::signbit(value) == (h >= 0x8000), format.name, ' ',
                      h);
                CHECK(format.nearest(value) == bits, format.name, ' ', h);
                for (uint32_t r : kRandom)
                    CHECK(format.stochastic(value, r) == bits, format.name, ' ', h, ' ', r);
            }
        }
}

// Around every finite value and every midpoint between neighbours: the float itself and those next to it.
TEST(neighbourhood_of_every_value) {
    for (const Format& format : kFormats) {
        int num_wrong = 0;
        for (uint32_t h = 0; h < 0x10000; ++h) {
            const uint16_t bits = static_cast<uint16_t>(h);
            if ((bits & 0x7FFF) >= format.infinity)
                continue;
            const double value = decode_exactly(format, bits), spacing = spacing_at(format, std::fabs(value));
            for (double share : {0.0, 0x1p-16, 0.25, 0.5, 0.75, 1 - 0x1p-16, 1.0}) {
                const float centre = static_cast<float>(value + (std::signbit(value) ? -share : share) * spacing);
                for (int64_t step = -1; step <= 1; ++step) {
                    const uint32_t moved = float_bits(centre) + static_cast<uint32_t>(step);
                    const float x = bits_float(moved);
                    if (std::isfinite(x) && std::signbit(x) == std::signbit(centre))
                        check_value(format, x, num_wrong);
                }
            }
        }
        CHECK(num_wrong == 0, format.name, ": ", num_wrong, " wrong");
    }
}

TEST(every_random_value) {
    for (const Format& format : kFormats)
        for (float x : {0.02f, -0.0200123f, 1.0000001f, 3.1e-5f, 6.1e-5f, -2.2e-7f, 1.3e-41f, 65519.0f, 3.4e38f}) {
            int num_wrong = 0, num_up = 0;
            const uint16_t below = format.stochastic(x, 0);
            for (uint32_t r = 0; r < 0x10000; ++r) {
                const uint16_t h = format.stochastic(x, r);
                num_wrong += h != expected_stochastic(format, x, r);
                num_up += h != below;
            }
            CHECK(num_wrong == 0, format.name, ' ', x);
            // Up with the probability of the fraction, to 2^-16.
            const double y = std::fabs(static_cast<double>(x)) / spacing_at(format, std::fabs(static_cast<double>(x)));
            if (std::fabs(x) <= format.largest)
                CHECK(num_up == static_cast<int>((y - std::floor(y)) * 65536), format.name, ' ', x, ' ', num_up);
        }
}

TEST(special_values) {
    const float infinity = std::numeric_limits<float>::infinity();
    for (const Format& format : kFormats)
        for (uint32_t r : kRandom) {
            for (uint32_t nan : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0xFFFFFFFFu}) {
                CHECK_EQ(format.nearest(bits_float(nan)), format.nan);
                CHECK_EQ(format.stochastic(bits_float(nan), r), format.nan);
            }
            CHECK_EQ(format.nearest(infinity), format.infinity);
            CHECK_EQ(format.stochastic(infinity, r), format.infinity);
            CHECK_EQ(format.stochastic(-infinity, r), format.infinity | 0x8000);
            CHECK_EQ(format.stochastic(-0.0f, r), 0x8000);
            CHECK_EQ(format.stochastic(0.0f, r), 0);
        }
    // A carry past the largest finite value is infinity.
    CHECK_EQ(float_to_bf16_stochastic(0x1.FFp127f, 0x8000), 0x7F80);
    CHECK_EQ(float_to_bf16_stochastic(0x1.FFp127f, 0x7FFF), 0x7F7F);
    CHECK_EQ(float_to_fp16_stochastic(65520.0f, 0x8000), 0x7C00);
    CHECK_EQ(float_to_fp16_stochastic(65520.0f, 0x7FFF), 0x7BFF);
    CHECK_EQ(float_to_fp16_stochastic(65536.0f, 0), 0x7C00);
    CHECK_EQ(float_bits(canonical_fp32(bits_float(0xFFC00001u))), kNanFp32);
}

TEST(bits_of_elements) {
    const PhiloxWords words{{0x22221111, 0x44443333, 0x66665555, 0x88887777}};
    for (uint32_t lane = 0; lane < 8; ++lane)
        CHECK_EQ(rounding_bits(words, lane), 0x1111u * (lane + 1));
}
