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

// Whether floats between subnormals are finer than 2^-16 of their spacing.
bool has_fine_subnormals(const Format& format) { return format.smallest_normal > 0x1p-126; }

const uint32_t kRandom[] = {0, 1, 7, 8, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFF8, 0xFFFE, 0xFFFF};

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

// Roundings of x, which is `fraction` of the way from the magnitude h to the next one, h + 1 (after the largest,
// infinity): to nearest even, by the last R that leaves it at h and the first that does not, and by one more R.
int num_wrong_between(const Format& format, uint16_t h, float x, double fraction, uint32_t random16) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const uint16_t below = sign | h, above = sign | static_cast<uint16_t>(h + 1);
    const uint32_t k = static_cast<uint32_t>(fraction * 65536);
    const bool nearer_above = fraction > 0.5 || (fraction == 0.5 && h % 2 == 1);
    return (format.nearest(x) != (nearer_above ? above : below)) + (format.stochastic(x, 65535 - k) != below) +
           (k > 0 && format.stochastic(x, 65536 - k) != above) +
           (format.stochastic(x, random16) != (k + random16 >= 65536 ? above : below));
}

// Every float between two neighbours, for an even and an odd magnitude of each exponent, and for every subnormal of
// fp16 some of its floats, which are finer than 2^-16 of the spacing.
TEST(every_float_between_two_neighbours) {
    uint32_t random = 1;
    for (const Format& format : kFormats) {
        const uint32_t num_values = 1u << format.fraction_bits; // of one exponent
        const int free_bits = 23 - format.fraction_bits;
        int num_wrong = 0;
        const auto check_point = [&](uint32_t h, float x, double fraction) {
            random = random * 1664525 + 1013904223;
            num_wrong +=
                num_wrong_between(format, static_cast<uint16_t>(h), random & 0x8000 ? -x : x, fraction, random >> 16);
        };
        for (uint32_t first = has_fine_subnormals(format) ? num_values : 0; first < format.infinity;
             first += num_values)
            for (uint32_t h : {first, first + num_values - 1})
                for (uint32_t low = 0; low < 1u << free_bits; ++low)
                    check_point(h, bits_float(float_bits(format.decode(static_cast<uint16_t>(h))) + low),
                                low * std::ldexp(1.0, -free_bits));
        for (uint32_t h = 0; has_fine_subnormals(format) && h < num_values; ++h)
            for (uint32_t point = 0; point < 1000; ++point) {
                const float x = static_cast<float>((h + point / 1000.0) * 0x1p-24);
                check_point(h, x, static_cast<double>(x) * 0x1p24 - h);
            }
        CHECK(num_wrong == 0, format.name, ": ", num_wrong, " wrong");
    }
}

// How often each R in turn gives the magnitude above, for one value of each exponent and sign: exactly as often as the
// fraction says, in bf16 and in normal fp16; in subnormal fp16, where floats are finer, less than 2^-16 below.
TEST(probability_over_every_random_value) {
    uint32_t random = 7;
    for (const Format& format : kFormats)
        for (uint32_t first = 0; first < format.infinity; first += 1u << format.fraction_bits)
            for (uint32_t half : {0u, 1u}) {
                random = random * 1664525 + 1013904223;
                const uint16_t h = static_cast<uint16_t>(first + (random >> 8) % (1u << format.fraction_bits));
                const double value = decode_exactly(format, h), spacing = spacing_at(format, value);
                const float magnitude = static_cast<float>(value + (random >> 16) * 0x1p-16 * spacing);
                const float x = half ? -magnitude : magnitude;
                const double y = magnitude / spacing, fraction = y - std::floor(y);
                const uint16_t below = format.stochastic(x, 0);
                int num_up = 0, num_other = 0;
                for (uint32_t r = 0; r < 0x10000; ++r) {
                    const uint16_t rounded = format.stochastic(x, r);
                    num_up += rounded == below + 1;
                    num_other += rounded != below && rounded != below + 1;
                }
                const double shortfall = fraction * 65536 - num_up;
                const bool exact = !has_fine_subnormals(format) || first > 0;
                CHECK(num_other == 0, format.name, ' ', x);
                CHECK(exact ? shortfall == 0 : shortfall >= 0 && shortfall < 1, format.name, ' ', x, ' ', shortfall);
            }
}

// Beyond the largest value's neighbour there is nothing but infinity.
TEST(large_values) {
    for (uint32_t exponent = 0x477; exponent < 0x7F8;
         ++exponent) // 61440 and up, in steps of an eighth of a power of two
        for (uint32_t low : {0u, 1u, 0x7FFFFu, 0x80000u, 0xFFFFFu}) {
            const float x = bits_float(exponent << 20 | low);
            for (uint32_t r : kRandom) {
                CHECK_EQ(float_to_fp16_stochastic(x, r), expected_stochastic(kFormats[1], x, r));
                CHECK_EQ(float_to_fp16_stochastic(-x, r), expected_stochastic(kFormats[1], -x, r));
            }
            CHECK_EQ(float_to_fp16(x), expected_nearest(kFormats[1], x));
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
