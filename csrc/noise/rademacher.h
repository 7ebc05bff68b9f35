// Rademacher signs from Philox words: element e of a parameter is bit e mod 128 of group e div 128, word 0's least
// significant bit first; a set bit is +1, a clear one -1. Host and device, no torch.
#pragma once

#include "normal.h"

namespace distzo2 {

// lane = element mod 128.
DZO_HD float rademacher_value(const PhiloxWords& words, uint32_t lane) {
    const uint32_t bit = (words.w[lane >> 5] >> (lane & 31)) & 1u;
    return bits_float(0xBF800000u ^ (bit << 31));
}

// The same from one word whose least significant bit is the element's.
DZO_HD float rademacher_from_lsb(uint32_t word) { return bits_float(0xBF800000u ^ (word << 31)); }

} // namespace distzo2
