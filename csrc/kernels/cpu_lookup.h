// The perturbed embedding lookup on the CPU: parts of rows, tile by tile. Included by one translation unit for each
// instruction set, with V the lanes of its simd_*.h; internal linkage throughout.
#pragma once

#include "kernels/cpu_tiles.h"

namespace distzo2 {
namespace {

template <class V, DType D>
void run_rows(const Lookup& request, int64_t begin, int64_t end) {
    using Raw = typename Storage<V, D>::Raw;
    typename V::Philox philox(request.seed);
    const Stream stream = make_stream(static_cast<Purpose>(request.family), static_cast<uint32_t>(request.param),
                                      static_cast<uint32_t>(request.step), static_cast<uint32_t>(request.probe));
    const auto scale = V::set(request.scale);
    SignWords<V> signs;
    alignas(64) Raw staging[kTile];
    while (begin < end) {
        const int64_t col = begin % request.cols, left = request.cols - col;
        const int64_t numel = left < end - begin ? left : end - begin;
        const int64_t place = request.ids[begin / request.cols] * request.cols + col; // in the table
        const Raw* source = static_cast<const Raw*>(request.table) + place;
        Raw* out = static_cast<Raw*>(request.out) + begin;
        const int64_t element = request.offset + place;
        for_tiles(element, element + numel, [&](int64_t lo, int64_t hi) {
            const int64_t first = lo / kSignsPerGroup * kSignsPerGroup;
            const int count = static_cast<int>((hi - first + kSignsPerGroup - 1) / kSignsPerGroup * kSignsPerGroup);
            const size_t num_bytes = static_cast<size_t>(hi - lo) * sizeof(Raw);
            const bool staged = hi - lo != count;
            const Raw* from = source + (lo - element);
            Raw* to = out + (lo - element);
            if (staged) {
                __builtin_memset(staging, 0, static_cast<size_t>(count) * sizeof(Raw));
                __builtin_memcpy(staging + (lo - first), from, num_bytes);
                from = to = staging;
            }
            const auto consume = [&](int i, typename V::F z) __attribute__((always_inline)) {
                Storage<V, D>::store_nearest(to + i, V::fma(scale, z, Storage<V, D>::load(from + i)));
            };
            if (request.scale == 0.0f)
                for (int i = 0; i < count; i += V::kWidth)
                    Storage<V, D>::store_nearest(to + i, Storage<V, D>::load(from + i));
            else if (request.family == static_cast<int64_t>(Purpose::kNormal))
                for_normals<V>(philox, stream, first, count, consume);
            else
                for_signs<V>(signs.at(philox, stream, first), count, consume);
            if (staged)
                __builtin_memcpy(out + (lo - element), staging + (lo - first), num_bytes);
        });
        begin += numel;
    }
}

template <class V>
void run_lookup(const Lookup& request, int64_t begin, int64_t end) {
    if (request.dtype == DType::kFp32)
        run_rows<V, DType::kFp32>(request, begin, end);
    else if (request.dtype == DType::kBf16)
        run_rows<V, DType::kBf16>(request, begin, end);
    else
        run_rows<V, DType::kFp16>(request, begin, end);
}

} // namespace
} // namespace distzo2
