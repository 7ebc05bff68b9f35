// CRC-32C: the known answers of RFC 3720, and both ways equal to the definition, bit by bit, at every length and
// alignment and over any cut.
#include "testing.h"

#include <random>

#include "runtime/disk/crc32c.h"

using namespace distzo2;

namespace {

using Checksum = uint32_t (*)(const void*, size_t, uint32_t);

std::vector<Checksum> ways() {
    std::vector<Checksum> all = {crc32c, crc32c_by_tables};
    if (has_crc32c_instruction())
        all.push_back(crc32c_by_instruction);
    else
        std::cout << "  (no instruction here)\n";
    return all;
}

uint32_t by_definition(const unsigned char* bytes, size_t num_bytes) {
    uint32_t state = 0xFFFFFFFF;
    for (size_t i = 0; i < num_bytes; ++i)
        for (int bit = 0; bit < 8; ++bit) {
            const uint32_t low = (state ^ static_cast<uint32_t>(bytes[i] >> bit)) & 1;
            state = state >> 1 ^ (low != 0 ? 0x82F63B78 : 0);
        }
    return ~state;
}

} // namespace

TEST(known_answers) {
    for (const Checksum checksum : ways()) {
        CHECK_EQ(checksum("123456789", 9, 0), 0xE3069283u);
        CHECK_EQ(checksum("", 0, 0), 0u);
        unsigned char bytes[32] = {};
        CHECK_EQ(checksum(bytes, 32, 0), 0x8A9136AAu); // RFC 3720, B.4
        std::memset(bytes, 0xFF, 32);
        CHECK_EQ(checksum(bytes, 32, 0), 0x62A8AB43u);
        for (unsigned char i = 0; i < 32; ++i)
            bytes[i] = i;
        CHECK_EQ(checksum(bytes, 32, 0), 0x46DD794Eu);
        for (unsigned char i = 0; i < 32; ++i)
            bytes[i] = static_cast<unsigned char>(31 - i);
        CHECK_EQ(checksum(bytes, 32, 0), 0x113FDB5Cu);
    }
}

TEST(every_length_and_alignment_and_cut) {
    std::mt19937 random(5);
    std::vector<unsigned char> bytes(64 * 1024 + 64);
    for (unsigned char& byte : bytes)
        byte = static_cast<unsigned char>(random());
    std::vector<size_t> lengths;
    for (size_t length = 0; length < 80; ++length)
        lengths.push_back(length);
    for (const size_t around : {3 * 4096, 6 * 4096, 15 * 4096}) // the stripes' ends
        for (size_t length = around - 9; length <= around + 9; ++length)
            lengths.push_back(length);
    for (const Checksum checksum : ways())
        for (const size_t length : lengths) {
            const unsigned char* const start = bytes.data() + random() % 16;
            const uint32_t expected = by_definition(start, length);
            CHECK_EQ(checksum(start, length, 0), expected);
            const size_t cut = length == 0 ? 0 : random() % length;
            CHECK_EQ(checksum(start + cut, length - cut, checksum(start, cut, 0)), expected);
        }
}
