#include "runtime/disk/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace distzo2 {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78; // bit-reversed: bit 31 is x^0
using Table = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the checksum of byte b followed by k zero bytes, without the inversions.
constexpr Table make_tables() {
    Table tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit)
            value = value >> 1 ^ ((value & 1) != 0 ? kPolynomial : 0);
        tables[0][byte] = value;
    }
    for (size_t zeros = 1; zeros < 8; ++zeros)
        for (size_t byte = 0; byte < 256; ++byte)
            tables[zeros][byte] = tables[zeros - 1][byte] >> 8 ^ tables[0][tables[zeros - 1][byte] & 0xff];
    return tables;
}
constexpr Table kTables = make_tables();

uint64_t load64(const unsigned char* data) {
    uint64_t word = 0;
    std::memcpy(&word, data, sizeof word);
    return word;
}

} // namespace

uint32_t crc32c_by_tables(const void* data, size_t num_bytes, uint32_t before) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    uint32_t state = ~before;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; num_bytes >= 8; num_bytes -= 8, bytes += 8) {
        const uint64_t word = load64(bytes) ^ state;
        state = 0;
        for (int i = 0; i < 8; ++i)
            state ^= kTables[7 - i][word >> (8 * i) & 0xff];
    }
#endif
    for (; num_bytes > 0; --num_bytes, ++bytes)
        state = state >> 8 ^ kTables[0][(state ^ *bytes) & 0xff];
    return ~state;
}

#if defined(__x86_64__)

namespace {

// The product of two polynomials modulo the checksum's.
constexpr uint32_t multiply(uint32_t left, uint32_t right) {
    uint32_t product = 0;
    for (int bit = 31; bit >= 0; --bit) { // x^0 first
        if ((right >> bit & 1) != 0)
            product ^= left;
        left = left >> 1 ^ ((left & 1) != 0 ? kPolynomial : 0);
    }
    return product;
}

// The instruction takes three cycles and can begin one each: three runs of a stripe are worked on at once, and the
// first two are moved past what follows them, which is a product with x^(8 * bytes).
constexpr size_t kStripe = 4096;

constexpr std::array<std::array<uint32_t, 256>, 4> make_stripe_shift() {
    uint32_t power = 0x40000000; // x^1
    for (size_t bits = 1; bits < 8 * kStripe; bits *= 2)
        power = multiply(power, power);
    std::array<std::array<uint32_t, 256>, 4> shift{};
    for (size_t byte = 0; byte < 4; ++byte)
        for (uint32_t bit = 0; bit < 8; ++bit) {
            const uint32_t moved = multiply(power, uint32_t{1} << (8 * byte + bit));
            for (size_t value = 0; value < 256; ++value)
                if ((value >> bit & 1) != 0)
                    shift[byte][value] ^= moved;
        }
    return shift;
}
constexpr auto kStripeShift = make_stripe_shift();

uint32_t past_stripe(uint32_t state) {
    return kStripeShift[0][state & 0xff] ^ kStripeShift[1][state >> 8 & 0xff] ^ kStripeShift[2][state >> 16 & 0xff] ^
           kStripeShift[3][state >> 24];
}

} // namespace

bool has_crc32c_instruction() {
    static const bool has = __builtin_cpu_supports("sse4.2") != 0;
    return has;
}

__attribute__((target("sse4.2"))) uint32_t crc32c_by_instruction(const void* data, size_t num_bytes, uint32_t before) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    uint64_t first = ~before;
    for (; num_bytes >= 3 * kStripe; num_bytes -= 3 * kStripe, bytes += 3 * kStripe) {
        uint64_t second = 0;
        uint64_t third = 0;
        for (size_t i = 0; i < kStripe; i += 8) {
            first = _mm_crc32_u64(first, load64(bytes + i));
            second = _mm_crc32_u64(second, load64(bytes + kStripe + i));
            third = _mm_crc32_u64(third, load64(bytes + 2 * kStripe + i));
        }
        first = past_stripe(past_stripe(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second)) ^ third;
    }
    for (; num_bytes >= 8; num_bytes -= 8, bytes += 8)
        first = _mm_crc32_u64(first, load64(bytes));
    auto state = static_cast<uint32_t>(first);
    for (; num_bytes > 0; --num_bytes, ++bytes)
        state = _mm_crc32_u8(state, *bytes);
    return ~state;
}

#else

bool has_crc32c_instruction() { return false; }

uint32_t crc32c_by_instruction(const void* data, size_t num_bytes, uint32_t before) {
    return crc32c_by_tables(data, num_bytes, before);
}

#endif

uint32_t crc32c(const void* data, size_t num_bytes, uint32_t before) {
    return has_crc32c_instruction() ? crc32c_by_instruction(data, num_bytes, before)
                                    : crc32c_by_tables(data, num_bytes, before);
}

} // namespace distzo2
