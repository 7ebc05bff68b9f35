// What one thread of the CUDA kernels does in a perturbed embedding lookup: octets of one row. Host and device, so that
// tests on a machine without a GPU run it too. No torch.
#pragma once

#include <type_traits>

#include "kernels/cuda/octet.h"

namespace distzo2 {

// Octets that a row may touch: it begins anywhere in its first one.
DZO_HD int64_t max_octets_of_row(int64_t cols) { return (cols + 2 * (kOctet - 1)) / kOctet; }

// Octets thread, thread + num_threads, ... of output row `row`. An id that is out of range gives a row of NaN: a device
// cannot raise, and a loss of NaN is noticed. kMixed: the result is not of the table's dtype.
template <DType D, bool kMixed = false, class Matrix = NoMatrix>
DZO_HD void lookup_thread(const Lookup& request, const PhiloxKeys& keys, int64_t row, int64_t thread,
                          int64_t num_threads, const Matrix& matrix = {}) {
    constexpr int64_t kBytes = OctetStorage<D>::kBytes;
    const int64_t id = request.ids[row];
    const bool known = id >= 0 && id < request.num_rows;
    const int64_t begin = request.offset + (known ? id * request.cols : 0), end = begin + request.cols;
    const uint8_t* source = static_cast<const uint8_t*>(request.table) + (begin - request.offset) * kBytes;
    const int64_t out_bytes = kMixed ? dtype_bytes(request.out_dtype) : kBytes;
    uint8_t* target = static_cast<uint8_t*>(request.out) + row * request.cols * out_bytes;
    const Draw draw = make_draw(static_cast<Purpose>(request.family), static_cast<uint32_t>(request.param),
                                static_cast<uint32_t>(request.step), static_cast<uint32_t>(request.probe));
    for (int64_t octet = begin / kOctet + thread; octet * kOctet < end; octet += num_threads) {
        std::conditional_t<kMixed, MixedPlace<D>, OctetPlace<D>> place;
        place.at = (octet * kOctet - begin) * kBytes;
        place.first = octet * kOctet < begin ? static_cast<int>(begin % kOctet) : 0;
        place.last = end - octet * kOctet < kOctet ? static_cast<int>(end - octet * kOctet) : kOctet;
        place.whole = place.first == 0 && place.last == kOctet &&
                      (reinterpret_cast<uintptr_t>(source) + static_cast<uintptr_t>(place.at)) % 16 == 0;
        if constexpr (kMixed) {
            place.out_dtype = request.out_dtype;
            place.out_at = (octet * kOctet - begin) * out_bytes;
            place.out_whole = place.first == 0 && place.last == kOctet &&
                              (reinterpret_cast<uintptr_t>(target) + static_cast<uintptr_t>(place.out_at)) % 16 == 0;
        } else {
            place.whole =
                place.whole && (reinterpret_cast<uintptr_t>(target) + static_cast<uintptr_t>(place.at)) % 16 == 0;
        }
        float w[kOctet], z[kOctet];
        if (known)
            place.load(source, w);
        if (known && request.scale != 0.0f) {
            matrix.octet(draw, keys, octet, z);
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                w[i] = fma_rn(request.scale, z[i], w[i]);
        }
        if (!known) {
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                w[i] = bits_float(kNanFp32);
        }
        place.emit(target, w);
    }
}

} // namespace distzo2
