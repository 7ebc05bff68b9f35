// The normals: accuracy against float64 for every pair of words, exact points, and chosen words by every instruction
// set. Moments and independence are tools/noise_stats.py's subject.
#include "testing.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernels.h"
#include "noise/normal.h"

using namespace distzo2;

namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kTolerance = 2e-6; // the contract: absolute, against float64

double exact_radius(uint32_t w) {
    const float u = fma_rn(static_cast<float>(w), 0x1p-32f, 0x1p-33f);
    return std::sqrt(-2.0 * std::log(static_cast<double>(u)));
}

// Words that cover both ends densely and the middle with a stride.
template <class Body>
void sweep(uint64_t stride, Body body) {
    const uint64_t all = uint64_t{1} << 32, ends = 1 << 16;
    for (uint64_t w = 0; w < all; w += (w < ends || w >= all - ends) ? 1 : std::min(stride, all - ends - w))
        body(static_cast<uint32_t>(w));
}

struct TrigError {
    double sine = 0, cosine = 0;
};

// Errors of sin and cos alone: a pair of radius one.
void angle(uint32_t w, double& sine, double& cosine) {
    const NormalPair pair = normal_pair(0, w);
    const double r = normal_radius(0);
    cosine = pair.a / r;
    sine = pair.b / r;
}

double distance(const NormalPair& pair, uint32_t w0, uint32_t w1) {
    const double r = exact_radius(w0), phi = 2 * kPi * w1 / 0x1p32;
    return std::max(std::fabs(pair.a - r * std::cos(phi)), std::fabs(pair.b - r * std::sin(phi)));
}

constexpr uint32_t inverse(uint32_t odd) { // modulo 2^32, by Newton's iteration
    uint32_t x = odd;
    for (int i = 0; i < 5; ++i)
        x *= 2 - odd * x;
    return x;
}

// The counter whose words these are. Philox is a bijection of counters, so that a test may choose the words.
PhiloxWords counter_of(const PhiloxWords& words, const PhiloxKeys& keys) {
    uint32_t c0 = words.w[0], c1 = words.w[1], c2 = words.w[2], c3 = words.w[3];
    for (int round = kPhiloxRounds - 1; round >= 0; --round) {
        const uint32_t before0 = c3 * inverse(kPhiloxM0), before2 = c1 * inverse(kPhiloxM1);
        c1 = c0 ^ static_cast<uint32_t>(uint64_t{kPhiloxM1} * before2 >> 32) ^ keys.k0[round];
        c3 = c2 ^ static_cast<uint32_t>(uint64_t{kPhiloxM0} * before0 >> 32) ^ keys.k1[round];
        c0 = before0;
        c2 = before2;
    }
    return PhiloxWords{{c0, c1, c2, c3}};
}

// Words where a conversion, a carry or a reduction might go wrong: the ends, all powers of two and their neighbours,
// and for each exponent ties of the conversion to float32 and their neighbours, with the halves of a word at their
// ends.
std::vector<uint32_t> edge_words() {
    std::vector<uint32_t> words;
    for (uint32_t w = 0; w < 300; ++w)
        words.insert(words.end(), {w, ~w});
    uint32_t state = 5;
    for (int bits = 1; bits < 32; ++bits) {
        const uint32_t power = 1u << bits;
        words.insert(words.end(), {power - 1, power, power + 1, 0u - power, ~power});
        for (int i = 0; i < 40; ++i) {
            state = state * 1664525 + 1013904223;
            const uint32_t word = power | state % power;
            const uint32_t unit = bits > 23 ? 1u << (bits - 23) : 1; // of the last place
            const uint32_t tie = word / unit * unit + unit / 2;
            words.insert(words.end(),
                         {tie - 1, tie, tie + 1, word | 0xFFFF, word & 0xFFFF0000u, (word & 0xFFFF0000u) | 0x8000});
        }
    }
    return words;
}

} // namespace

// |r' c' (1 + d) - r c| <= |r' - r| |c| + r |c' - c| + rounding of the product: the bound holds for every pair of
// words.
TEST(accuracy_bound) {
    double radius_error = 0, relative_near_one = 0, largest = 0;
    sweep(509, [&](uint32_t w) {
        const double exact = exact_radius(w), r = normal_radius(w);
        radius_error = std::max(radius_error, std::fabs(r - exact));
        largest = std::max(largest, r);
        if (exact > 0 && exact < 0x1p-8)
            relative_near_one = std::max(relative_near_one, std::fabs(r / exact - 1));
    });
    TrigError trig;
    sweep(509, [&](uint32_t w) {
        double sine, cosine;
        angle(w, sine, cosine);
        const double phi = 2 * kPi * w / 0x1p32;
        trig.sine = std::max(trig.sine, std::fabs(sine - std::sin(phi)));
        trig.cosine = std::max(trig.cosine, std::fabs(cosine - std::cos(phi)));
    });
    const double bound = radius_error + largest * std::max(trig.sine, trig.cosine);
    std::printf("  radius %.2e, sin %.2e, cos %.2e (rounding of the product included): any normal within %.2e\n",
                radius_error, trig.sine, trig.cosine, bound);
    CHECK(bound <= kTolerance, bound);
    CHECK(relative_near_one <= 1e-6, relative_near_one);
}

// Every instruction set converts, reduces and takes roots in its own way: each is shown words that random noise hardly
// ever meets, at places of the noise that were found by inverting Philox.
TEST(chosen_words_by_every_instruction_set) {
    const uint64_t seed = 0x5DEECE66D1234567;
    const PhiloxKeys keys = philox_keys(seed);
    const std::vector<uint32_t> edges = edge_words();
    const SimdLevel before = simd_level();
    uint32_t state = 9;
    int num_wrong = 0;
    double worst = 0;
    for (size_t i = 0; i < edges.size(); ++i) {
        PhiloxWords words{{edges[i], edges[i * 7919 % edges.size()], edges[(i * 104729 + 1) % edges.size()], 0}},
            counter;
        do { // the last word is free, and one in 256 leads to the purpose of normals
            words.w[3] = state = state * 1664525 + 1013904223;
            counter = counter_of(words, keys);
        } while (counter.w[3] >> 24 != static_cast<uint32_t>(Purpose::kNormal));
        const int64_t group = static_cast<int64_t>(counter.w[3] & 0xF) << 32 | counter.w[0];
        const Normals4 expected = normal_group(words);
        worst = std::max({worst, distance({expected.z[0], expected.z[1]}, words.w[0], words.w[1]),
                          distance({expected.z[2], expected.z[3]}, words.w[2], words.w[3])});
        for (SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
            if (!simd_available(level))
                continue;
            set_simd_level(level);
            float z[4];
            generate_cpu({z, DType::kFp32, 4, seed, 0, counter.w[2], counter.w[1], counter.w[3] >> 4, 4 * group});
            num_wrong += std::memcmp(z, expected.z, sizeof z) != 0;
        }
    }
    set_simd_level(before);
    CHECK_EQ(num_wrong, 0);
    CHECK(worst <= kTolerance, worst);
}

TEST(exact_points) {
    CHECK_EQ(float_bits(normal_radius(0xFFFFFFFF)), 0u); // u = 1 gives +0
    CHECK_EQ(float_bits(normal_radius(0xFFFFFF80)), 0u); // the conversion rounds up to 2^32
    CHECK(normal_radius(0xFFFFFF7F) > 0);
    CHECK_EQ(normal_radius(0), 0x1.b0e08ep+2f); // sqrt(66 ln 2)
    CHECK_EQ(normal_pair(0, 0).a, normal_radius(0));
    CHECK_EQ(normal_pair(0, 0).b, 0.0f);
    CHECK_EQ(normal_pair(0, 0x80000000).a, -normal_radius(0));
}

// FNV-1a over the bits: changed noise is a new version of the format, never an accident.
TEST(golden_hash) {
    uint64_t hash = 0xcbf29ce484222325;
    for (uint64_t group = 0; group < 1 << 16; ++group) {
        const Draw draw = make_draw(Purpose::kNormal, static_cast<uint32_t>(group % 7), 11, 3);
        const Normals4 normals = normal_group(philox_group(draw, 0x123456789ABCDEF0, group));
        for (float z : normals.z)
            for (int byte = 0; byte < 4; ++byte)
                hash = (hash ^ (float_bits(z) >> (8 * byte) & 0xFF)) * 0x100000001b3;
    }
    CHECK_EQ(hash, uint64_t{0xb54428b1406dacaa});
}
