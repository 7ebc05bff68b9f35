// The perturbed embedding lookup on the CPU. Included by one translation unit for each instruction set, with V the
// lanes of its simd_*.h; internal linkage throughout.
#pragma once

#include "kernels/cpu/tiles.h"

namespace distzo2 {
namespace {

// Parts of rows, as many as their noise fits one tile's buffers: the passes of NormalTile need hundreds of elements to
// run at speed, and a row may have fewer.
template <class V, DType D>
class Rows {
  public:
    using F = typename V::F;
    using Store = Storage<V, D>;
    using Raw = typename Store::Raw;

    explicit Rows(const Lookup& request)
        : scale_(request.scale), out_dtype_(request.out_dtype), term_{request.family, request.step, request.probe, 0},
          draw_(make_draw(kind_of(request.family), static_cast<uint32_t>(request.param),
                          static_cast<uint32_t>(request.step), static_cast<uint32_t>(request.probe))),
          philox_(request.seed), low_rank_(philox_, request.param, kMaxElements, request.cols, &term_, 1, true),
          is_normal_(!low_rank_.makes(term_) && kind_of(request.family) == Purpose::kNormal) {}

    // numel elements of the table at `from`, the first being `element` of the parameter; within one tile of it.
    void add(const Raw* from, uint8_t* to, int64_t element, int numel) {
        const int64_t first = element / kAlign * kAlign;
        const int skip = static_cast<int>(element - first), count = (skip + numel + kAlign - 1) / kAlign * kAlign;
        if (used_ + count > kTile)
            finish();
        if (scale_ == 0.0f) {
        } else if (is_normal_) {
            philox_.seek(draw_, static_cast<uint64_t>(first) / kNormalsPerGroup);
            normals_.fill_words(philox_, used_, used_ + count);
        } else if (low_rank_.makes(term_)) {
            low_rank_.set_tile(element, element + numel, first, count);
            low_rank_.fill(term_, noise_ + used_);
        } else {
            float* noise = noise_ + used_;
            for_signs<V>(signs_.at(philox_, draw_, first), count,
                         [noise](int i, F z) __attribute__((always_inline)) { V::store(noise + i, z); });
        }
        parts_[num_parts_++] = {from, to, noise_ + used_ + skip, numel};
        used_ += count;
    }

    void finish() {
        if (scale_ != 0.0f && is_normal_ && used_ > 0) {
            normals_.make_radii(used_);
            normals_.turn(used_, [this](int i, F z) __attribute__((always_inline)) { V::store(noise_ + i, z); });
        }
        if (out_dtype_ == DType::kFp32)
            write_parts<DType::kFp32>();
        else if (out_dtype_ == DType::kBf16)
            write_parts<DType::kBf16>();
        else
            write_parts<DType::kFp16>();
        used_ = num_parts_ = 0;
    }

  private:
    // Beginnings and lengths of the noise that is made: a Philox block of normals, a word of signs.
    static constexpr int kAlign = NormalTile<V>::kBlock;
    static_assert(kAlign % kSignsPerWord == 0 && kTile % kAlign == 0);

    struct Part {
        const Raw* from;
        uint8_t* to;
        const float* noise;
        int numel;
    };

    template <DType O>
    void write_parts() const {
        const F scale = V::set(scale_);
        for (int part = 0; part < num_parts_; ++part)
            if (scale_ == 0.0f)
                write<O>(parts_[part], [](F w, const float*) __attribute__((always_inline)) { return w; });
            else
                write<O>(parts_[part], [scale](F w, const float* z)
                                           __attribute__((always_inline)) { return V::fma(scale, V::load(z), w); });
    }

    template <DType O, class Value>
    DZO_HD void write(const Part& part, Value value) const {
        using Out = typename Storage<V, O>::Raw;
        Out* to = reinterpret_cast<Out*>(part.to);
        int i = 0;
        for (; i + V::kWidth <= part.numel; i += V::kWidth)
            Storage<V, O>::store_nearest(to + i, value(Store::load(part.from + i), part.noise + i));
        if (i == part.numel)
            return;
        Raw last[V::kWidth] = {};
        Out rounded[V::kWidth];
        const size_t num = static_cast<size_t>(part.numel - i);
        __builtin_memcpy(last, part.from + i, num * sizeof(Raw));
        Storage<V, O>::store_nearest(rounded, value(Store::load(last), part.noise + i));
        __builtin_memcpy(to + i, rounded, num * sizeof(Out));
    }

    const float scale_;
    const DType out_dtype_;
    const Term term_;
    const Draw draw_;
    typename V::Philox philox_;
    LowRank<V> low_rank_;
    const bool is_normal_;
    NormalTile<V> normals_;
    SignWords<V, 1> signs_;
    Part parts_[kTile / kAlign];
    int num_parts_ = 0;
    int used_ = 0; // elements of noise_
    alignas(64) float noise_[kTile + V::kWidth] = {};
};

template <class V, DType D>
void run_rows(const Lookup& request, int64_t begin, int64_t end) {
    using Raw = typename Storage<V, D>::Raw;
    Rows<V, D> rows(request);
    while (begin < end) {
        const int64_t row = begin / request.cols, col = begin % request.cols, left = request.cols - col;
        const int64_t numel = left < end - begin ? left : end - begin;
        const int64_t out_bytes = dtype_bytes(request.out_dtype);
        uint8_t* out = static_cast<uint8_t*>(request.out) + begin * out_bytes;
        begin += numel;
        // The ids have been checked, but another thread of the caller's may have changed them since: then a row of NaN,
        // as on a device.
        const int64_t id = __atomic_load_n(request.ids + row, __ATOMIC_RELAXED);
        if (id < 0 || id >= request.num_rows) {
            for (int64_t i = 0; i < numel; ++i)
                __builtin_memcpy(out + i * out_bytes, canonical_nan(request.out_dtype), static_cast<size_t>(out_bytes));
            continue;
        }
        const int64_t place = id * request.cols + col, element = request.offset + place;
        const Raw* source = static_cast<const Raw*>(request.table) + place;
        for_tiles(element, element + numel, [&](int64_t lo, int64_t hi) {
            rows.add(source + (lo - element), out + (lo - element) * out_bytes, lo, static_cast<int>(hi - lo));
        });
    }
    rows.finish();
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
