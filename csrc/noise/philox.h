// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11) and the counter
// layout of this project. Noise is a function: the words depend on (seed, purpose, parameter, step, probe, group) and
// on nothing else. Host and device, no torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DZO_HD __host__ __device__ __forceinline__
#else
#define DZO_HD inline __attribute__((always_inline))
#endif

namespace distzo2 {

// One byte of the counter. kRows and kCols are the factors of low-rank noise; 6-15 are kept for masks and layer choice.
enum class Purpose : uint32_t { kNormal = 0, kRademacher = 1, kRounding = 2, kDataOrder = 3, kRows = 4, kCols = 5 };

// A family of noise is the purpose of its kind, kNormal or kRademacher, and 16 times its rank, which is 0 (dense), 1 or
// 4. Low-rank noise of a matrix is z = A B^T / sqrt(rank): the element of A is i * rank + s, of B j * rank + s, from
// purposes kRows and kCols, in groups as those of the kind. Matrices that a parameter holds one after another, as those
// of experts, have factors of their own: i counts the rows of all, j the columns. z = a_0 * b_0, then fma(a_s, b_s, z)
// in ascending s, then z / sqrt(rank); kernels divide A instead, which is the same: a power of two, far from underflow.
// A parameter without columns has dense noise of the kind.
DZO_HD constexpr Purpose kind_of(int64_t family) { return static_cast<Purpose>(family & 15); }
DZO_HD constexpr int rank_of(int64_t family) { return static_cast<int>(family >> 4); }

// Elements that one Philox call serves.
constexpr int kNormalsPerGroup = 4;
constexpr int kSignsPerGroup = 128;
constexpr int kRoundingsPerGroup = 8;

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

constexpr uint32_t kMaxProbe = (1u << 20) - 1;

struct PhiloxWords {
    uint32_t w[4];
};

// Counter words 1 to 3 but for the high bits of the group: fixed for one (purpose, parameter, step, probe).
struct Draw {
    uint32_t param;
    uint32_t step;
    uint32_t tag; // purpose << 24 | probe << 4
};

DZO_HD Draw make_draw(Purpose purpose, uint32_t param, uint32_t step, uint32_t probe) {
    return Draw{param, step, static_cast<uint32_t>(purpose) << 24 | probe << 4};
}

// The key of each round: seed words + round * W.
struct PhiloxKeys {
    uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

DZO_HD PhiloxKeys philox_keys(uint64_t seed) {
    PhiloxKeys keys;
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
        keys.k0[round] = static_cast<uint32_t>(seed) + round * kPhiloxW0;
        keys.k1[round] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1;
    }
    return keys;
}

// Round: (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)).
DZO_HD PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKeys& keys) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.k0[round];
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.k1[round];
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
    }
    return PhiloxWords{{c0, c1, c2, c3}};
}

// c0 = q mod 2^32, c1 = parameter, c2 = step, c3 = purpose << 24 | probe << 4 | q >> 32, for group q < 2^36.
DZO_HD PhiloxWords philox_group(const Draw& draw, const PhiloxKeys& keys, uint64_t group) {
    return philox4x32_10(static_cast<uint32_t>(group), draw.param, draw.step,
                         draw.tag | static_cast<uint32_t>(group >> 32), keys);
}

DZO_HD PhiloxWords philox_group(const Draw& draw, uint64_t seed, uint64_t group) {
    return philox_group(draw, philox_keys(seed), group);
}

} // namespace distzo2
