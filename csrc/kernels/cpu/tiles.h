// A visit on the CPU, tile by tile: decode, apply the missed updates, write back, write the perturbed copies. Included
// by one translation unit for each instruction set, with V the lanes of its simd_*.h; internal linkage throughout. The
// arithmetic is that of types.h; padding lanes of partial tiles compute on copies and are thrown away.
#pragma once

#include "kernels/cpu/low_rank.h"

namespace distzo2 {
namespace {

DZO_HD Draw term_draw(const Term& term, const Segment& segment) {
    return make_draw(kind_of(term.family), static_cast<uint32_t>(segment.param), static_cast<uint32_t>(term.step),
                     static_cast<uint32_t>(term.probe));
}

DZO_HD bool same_noise(const Term& a, const Term& b) {
    return a.family == b.family && a.step == b.step && a.probe == b.probe;
}

// The visit of one tile: elements lo .. hi - 1 of a parameter, which lie within one multiple of kTile. The work is done
// on the range widened to multiples of 128 (kAlign); where that is wider than the tile, memory is read and written
// through staged copies.
template <class V, DType D>
class Tile {
  public:
    using F = typename V::F;
    using Store = Storage<V, D>;
    using Raw = typename Store::Raw;

    Tile(const Materialize& visit, typename V::Philox& philox, const Segment& segment)
        : visit_(visit), philox_(philox), segment_(segment),
          low_rank_(philox, segment.param, segment.rows, segment.cols, visit.terms, visit.num_terms) {}

    const LowRank<V>& low_rank() const { return low_rank_; }

    void run(int64_t lo, int64_t hi) {
        constexpr int64_t kAlign = kSignsPerGroup;
        first_ = lo / kAlign * kAlign;
        count_ = static_cast<int>((hi - first_ + kAlign - 1) / kAlign * kAlign);
        skip_ = static_cast<int>(lo - first_);
        num_ = static_cast<int>(hi - lo);
        low_rank_.set_tile(lo, hi, first_, count_);
        const int64_t skipped = lo - segment_.element_offset;
        weights_ = reinterpret_cast<Raw*>(visit_.weights + segment_.byte_offset) + skipped;
        out_place_ = segment_.out_offset + skipped * dtype_bytes(static_cast<DType>(segment_.out_dtype));
        decoded_ = written_ = false;
        bool changed = false;
        if constexpr (kCodes)
            find_scales();
        for (int64_t u = 0; u < visit_.num_updates && segment_.group != kNoGroup; ++u) {
            if (!update(visit_.updates[u], visit_.update_groups[u * visit_.num_groups + segment_.group]))
                continue;
            changed = true;
            if (nonnegative())
                for (int i = 0; i < count_; i += V::kWidth)
                    V::store(values_ + i, V::not_below_zero(V::load(values_ + i)));
        }
        if (changed && visit_.write_back && !written_) {
            Raw* target = staged() ? staging<Raw>()[0] : weights_;
            for (int i = 0; i < count_; i += V::kWidth)
                Store::store_exact(target + i, V::load(values_ + i));
            unstage(weights_, target);
        }
        for (int64_t e = 0; e < visit_.num_emits;) {
            if (e + 1 < visit_.num_emits && shares_noise(e)) {
                emit<2>(e);
                e += 2;
            } else {
                emit<1>(e);
                e += 1;
            }
        }
    }

  private:
    static constexpr bool kCodes = is_code(D);

    bool staged() const { return num_ != count_; }
    bool nonnegative() const {
        return D == DType::kFp32 && segment_.dtype == static_cast<int64_t>(DType::kNonNegative);
    }

    template <class Element>
    Element (*staging()) [kTile] { return reinterpret_cast<Element(*)[kTile]>(staging_); }

    // The segment's scales; what lies beside it has a scale of 0.
    void find_scales() {
        const float* scales = reinterpret_cast<const float*>(visit_.weights + segment_.scale_offset);
        const int shift = __builtin_ctzll(static_cast<uint64_t>(segment_.scale_group));
        for (int block = 0; block < count_ / kSignsPerWord; ++block) {
            const int64_t at = first_ + block * kSignsPerWord - segment_.element_offset;
            scales_[block] = at >= 0 && at < segment_.numel ? scales[at >> shift] : 0.0f;
        }
    }

    // Of a stored element i of the tile: of a code the product with its scale.
    DZO_HD F value(int i, F w) const {
        if constexpr (kCodes)
            return V::mul(w, V::set(scales_[i / kSignsPerWord]));
        else
            return w;
    }

    // A stored element i after an update of its value by step * a.
    DZO_HD F updated(int i, F w, F step, F a) const {
        if constexpr (kCodes)
            return V::step_code(w, V::mul(step, a), V::set(code_divisor(scales_[i / kSignsPerWord])),
                                V::load_u16(rounding_ + i), Store::kLimit);
        else
            return Store::round_update(V::fma(step, a, w), rounding_ + i);
    }

    template <class Element>
    void unstage(Element* target, const Element* from) const {
        if (staged())
            __builtin_memcpy(target, from + skip_, static_cast<size_t>(num_) * sizeof(Element));
    }

    // The tile's elements of what is stored as the weights are, in the range widened to multiples of kAlign.
    const Raw* widened(const Raw* stored) {
        if (!staged())
            return stored;
        Raw* whole = staging<Raw>()[0];
        __builtin_memset(whole, 0, static_cast<size_t>(count_) * sizeof(Raw));
        __builtin_memcpy(whole + skip_, stored, static_cast<size_t>(num_) * sizeof(Raw));
        return whole;
    }

    void decode() {
        if (decoded_)
            return;
        decoded_ = true;
        const Raw* weights = widened(weights_);
        for (int i = 0; i < count_; i += V::kWidth)
            V::store(values_ + i, Store::load(weights + i));
    }

    // sums_[0] += anchor * (w - w0).
    void pull_to_start(float anchor) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(weights_) - segment_.byte_offset + segment_.scale_offset;
        const Raw* start = widened(reinterpret_cast<const Raw*>(bytes));
        for (int i = 0; i < count_; i += V::kWidth) {
            const F moved = V::fma(V::set(-1.0f), Store::load(start + i), V::load(values_ + i));
            V::store(sums_[0] + i, V::fma(V::set(anchor), moved, V::load(sums_[0] + i)));
        }
    }

    template <class Consume>
    DZO_HD void noise(const Term& term, Consume consume) {
        if (low_rank_.makes(term)) {
            low_rank_.fill(term, noise_);
            for (int i = 0; i < count_; i += V::kWidth)
                consume(i, V::load(noise_ + i));
        } else if (kind_of(term.family) == Purpose::kNormal)
            for_normals<V>(philox_, term_draw(term, segment_), first_, count_, consume);
        else
            for_signs<V>(sign_words(term), count_, consume);
    }

    DZO_HD const uint32_t* sign_words(const Term& term) {
        return signs_[(&term - visit_.terms) % kSignTerms].at(philox_, term_draw(term, segment_), first_);
    }

    __attribute__((noinline)) void fill_noise(const Term& term) {
        if (low_rank_.makes(term))
            return low_rank_.fill(term, noise_);
        noise(term, [this](int i, F z) __attribute__((always_inline)) { V::store(noise_ + i, z); });
    }

    // One update of values_; false if it is the identity.
    bool update(const Update& update, const UpdateGroup& group) {
        const float* coefs = visit_.coefs + update.first_term;
        const Term* terms = visit_.terms + update.first_term;
        int64_t num_left = 0, only = 0;
        for (int64_t j = 0; j < update.num_terms && num_left < 2; ++j)
            if (coefs[j] * group.update_scale != 0.0f) {
                only = j;
                ++num_left;
            }
        const bool decays = group.weight_decay != 0.0f, anchored = !kCodes && group.anchor != 0.0f;
        if (group.lr == 0.0f || (!decays && !anchored && num_left == 0))
            return false;
        if (D != DType::kFp32)
            rounding_tile<V>(philox_,
                             make_draw(Purpose::kRounding, static_cast<uint32_t>(segment_.param),
                                       static_cast<uint32_t>(update.step), 0),
                             first_, count_, rounding_);
        const F step = V::set(-group.lr), decay = V::set(group.weight_decay);
        if (num_left == 1 && !anchored) {
            const F k = V::set(coefs[only] * group.update_scale);
            const auto next = [&](int i, F w, F z) __attribute__((always_inline)) {
                return updated(i, w, step, V::fma(k, z, decays ? V::mul(decay, value(i, w)) : V::set(0.0f)));
            };
            // One pass: read, update, write back.
            if (visit_.num_updates == 1 && visit_.write_back && !staged() && !nonnegative()) {
                noise(terms[only], [&](int i, F z) __attribute__((always_inline)) {
                    const F w = next(i, Store::load(weights_ + i), z);
                    Store::store_exact(weights_ + i, w);
                    V::store(values_ + i, w);
                });
                decoded_ = written_ = true;
                return true;
            }
            decode();
            noise(terms[only], [&](int i, F z) __attribute__((always_inline)) {
                V::store(values_ + i, next(i, V::load(values_ + i), z));
            });
            return true;
        }
        decode();
        for (int i = 0; i < count_; i += V::kWidth)
            V::store(sums_[0] + i, decays ? V::mul(decay, value(i, V::load(values_ + i))) : V::set(0.0f));
        if (anchored)
            pull_to_start(group.anchor);
        for (int64_t j = 0; j < update.num_terms; ++j) {
            const F k = V::set(coefs[j] * group.update_scale);
            if (coefs[j] * group.update_scale == 0.0f)
                continue;
            if (low_rank_.makes(terms[j])) {
                low_rank_.add(terms[j], coefs[j] * group.update_scale, noise_, sums_[0]);
                continue;
            }
            fill_noise(terms[j]);
            for (int i = 0; i < count_; i += V::kWidth)
                V::store(sums_[0] + i, V::fma(k, V::load(noise_ + i), V::load(sums_[0] + i)));
        }
        for (int i = 0; i < count_; i += V::kWidth)
            V::store(values_ + i, updated(i, V::load(values_ + i), step, V::load(sums_[0] + i)));
        return true;
    }

    float emit_coef(int64_t emit, int64_t term) const {
        if (segment_.group == kNoGroup)
            return 0.0f;
        return visit_.coefs[visit_.emits[emit].first_term + term] *
               visit_.emit_scales[emit * visit_.num_groups + segment_.group];
    }

    // Whether emits e and e + 1 are made of the same noise tensors in the same order, as the two signs of a probe are.
    bool shares_noise(int64_t e) const {
        const Emit &a = visit_.emits[e], &b = visit_.emits[e + 1];
        if (a.num_terms != b.num_terms)
            return false;
        for (int64_t j = 0; j < a.num_terms; ++j)
            if (!same_noise(visit_.terms[a.first_term + j], visit_.terms[b.first_term + j]) ||
                (emit_coef(e, j) == 0.0f) != (emit_coef(e + 1, j) == 0.0f))
                return false;
        return true;
    }

    // N emits that share their noise.
    template <int N>
    void emit(int64_t e) {
        const auto out_dtype = static_cast<DType>(segment_.out_dtype);
        constexpr DType kUsual = kCodes ? DType::kBf16 : D;
        if (out_dtype == kUsual)
            emit_as<kUsual, N>(e, staging<typename Storage<V, kUsual>::Raw>());
        else if (out_dtype == DType::kFp32)
            emit_as<DType::kFp32, N>(e, sums_);
        else if (out_dtype == DType::kBf16)
            emit_rounded<DType::kBf16, N>(e);
        else
            emit_rounded<DType::kFp16, N>(e);
    }

    template <DType O, int N>
    void emit_as(int64_t e, typename Storage<V, O>::Raw (*staging)[kTile]) {
        typename Storage<V, O>::Raw *outs[N], *targets[N];
        for (int n = 0; n < N; ++n) {
            targets[n] = reinterpret_cast<typename Storage<V, O>::Raw*>(visit_.outs[e + n] + out_place_);
            outs[n] = staged() ? staging[n] : targets[n];
        }
        emit_to<O, N>(e, outs);
        for (int n = 0; n < N; ++n)
            unstage(targets[n], staging[n]);
    }

    // By way of float32, in which the values are exact: the loops that make noise need not be compiled for every pair
    // of dtypes.
    template <DType O, int N>
    void emit_rounded(int64_t e) {
        float* sums[] = {sums_[0], sums_[1]};
        emit_to<DType::kFp32, N>(e, sums);
        for (int n = 0; n < N; ++n) {
            auto* target = reinterpret_cast<uint16_t*>(visit_.outs[e + n] + out_place_);
            uint16_t* out = staged() ? rounding_ : target; // of no use any more
            for (int i = 0; i < count_; i += V::kWidth)
                Storage<V, O>::store_nearest(out + i, V::load(sums_[n] + i));
            unstage(target, rounding_);
        }
    }

    // outs may be sums_.
    template <DType O, int N>
    void emit_to(int64_t e, typename Storage<V, O>::Raw* const* outs) {
        using OutStore = Storage<V, O>;
        const Emit& emit = visit_.emits[e];
        const Term* terms = visit_.terms + emit.first_term;
        int64_t num_left = 0, only = 0;
        for (int64_t j = 0; j < emit.num_terms && num_left < 2; ++j)
            if (emit_coef(e, j) != 0.0f) {
                only = j;
                ++num_left;
            }
        if (num_left == 1) {
            F k[N];
            typename OutStore::Raw* out[N];
            for (int n = 0; n < N; ++n) {
                k[n] = V::set(emit_coef(e + n, only));
                out[n] = outs[n];
            }
            const auto store = [&](int i, F w, F z) __attribute__((always_inline)) {
                for (int n = 0; n < N; ++n)
                    OutStore::store_nearest(out[n] + i, V::fma(k[n], z, w));
            };
            // One pass: read once, write every copy.
            if (!decoded_ && !staged() && visit_.num_emits == N && low_rank_.takes_whole_rows()) {
                if (!low_rank_.makes(terms[only]) && kind_of(terms[only].family) == Purpose::kRademacher) {
                    perturb_by_signs<V, D, O, N>(sign_words(terms[only]), count_, weights_, scales_, k, out);
                    return;
                }
                noise(terms[only], [&](int i, F z) __attribute__((always_inline)) {
                    __builtin_prefetch(weights_ + i + kTile, 1); // the next tile's: making its noise hides the memory
                    store(i, value(i, Store::load(weights_ + i)), z);
                });
                return;
            }
            decode();
            noise(terms[only],
                  [&](int i, F z) __attribute__((always_inline)) { store(i, value(i, V::load(values_ + i)), z); });
            return;
        }
        decode();
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < count_; i += V::kWidth)
                V::store(sums_[n] + i, value(i, V::load(values_ + i)));
        for (int64_t j = 0; j < emit.num_terms; ++j) {
            if (emit_coef(e, j) == 0.0f)
                continue;
            fill_noise(terms[j]);
            for (int n = 0; n < N; ++n) {
                const F k = V::set(emit_coef(e + n, j));
                for (int i = 0; i < count_; i += V::kWidth)
                    V::store(sums_[n] + i, V::fma(k, V::load(noise_ + i), V::load(sums_[n] + i)));
            }
        }
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < count_; i += V::kWidth)
                OutStore::store_nearest(outs[n] + i, V::load(sums_[n] + i));
    }

    const Materialize& visit_;
    static constexpr int kSignTerms = 16; // terms whose signs are kept from tile to tile
    SignWords<V> signs_[kSignTerms];
    typename V::Philox& philox_;
    const Segment& segment_;
    LowRank<V> low_rank_;
    Raw* weights_ = nullptr;                     // element lo
    bool decoded_ = false;                       // values_ holds the weights
    bool written_ = false;                       // the updated weights are stored
    int64_t first_ = 0;                          // first element of the widened range
    int64_t out_place_ = 0;                      // byte of element lo in every out
    int count_ = 0;                              // elements of the widened range
    int skip_ = 0;                               // lo - first_
    int num_ = 0;                                // hi - lo
    alignas(64) float values_[kTile];            // the weights, or their codes, as they are now
    alignas(64) float noise_[kTile + V::kWidth]; // z of one term
    alignas(64) float sums_[2][kTile];           // accumulators
    alignas(64) uint16_t rounding_[kTile];
    alignas(64) uint8_t staging_[2 * kTile * (sizeof(Raw) > 2 ? sizeof(Raw) : 2)]; // two tiles as stored or emitted
    float scales_[kCodes ? kTile / kSignsPerWord : 1];
};

template <class V, DType D>
void run_segment(const Materialize& visit, typename V::Philox& philox, const Segment& segment, int64_t begin,
                 int64_t end) {
    Tile<V, D> tile(visit, philox, segment);
    for_block_tiles(begin, end, segment.cols, tile.low_rank().width(),
                    [&](int64_t lo, int64_t hi) { tile.run(lo, hi); });
}

template <class V>
void run_visit(const Materialize& visit, int64_t begin, int64_t end) {
    typename V::Philox philox(visit.seed);
    int64_t start = 0; // of the segment, in the visit's count of elements
    for (int64_t s = 0; s < visit.num_segments && start < end; ++s) {
        const Segment& segment = visit.segments[s];
        const int64_t lo = begin > start ? begin - start : 0;
        const int64_t hi = end - start < segment.numel ? end - start : segment.numel;
        start += segment.numel;
        if (lo >= hi)
            continue;
        const int64_t first = segment.element_offset + lo, last = segment.element_offset + hi;
        switch (static_cast<DType>(segment.dtype)) {
        case DType::kBf16:
            run_segment<V, DType::kBf16>(visit, philox, segment, first, last);
            break;
        case DType::kFp16:
            run_segment<V, DType::kFp16>(visit, philox, segment, first, last);
            break;
        case DType::kCode8:
            run_segment<V, DType::kCode8>(visit, philox, segment, first, last);
            break;
        case DType::kCode16:
            run_segment<V, DType::kCode16>(visit, philox, segment, first, last);
            break;
        default:
            run_segment<V, DType::kFp32>(visit, philox, segment, first, last);
        }
    }
}

template <class V, DType D>
void run_noise(const InPlace& request, int64_t begin, int64_t end) {
    using Raw = typename Storage<V, D>::Raw;
    typename V::Philox philox(request.seed);
    const Draw draw = make_draw(kind_of(request.family), static_cast<uint32_t>(request.param),
                                static_cast<uint32_t>(request.step), static_cast<uint32_t>(request.probe));
    Raw* out = static_cast<Raw*>(request.data);
    SignWords<V> signs;
    alignas(64) Raw staging[kTile];
    alignas(64) float noise[kTile + V::kWidth];
    const Term term{request.family, request.step, request.probe, 0};
    LowRank<V> low_rank(philox, request.param, request.rows, request.cols, &term, 1);
    const int64_t begin_at = request.offset + begin, end_at = request.offset + end;
    for_block_tiles(begin_at, end_at, request.cols, low_rank.width(), [&](int64_t lo, int64_t hi) {
        const int64_t first = lo / kSignsPerGroup * kSignsPerGroup;
        const int count = static_cast<int>((hi - first + kSignsPerGroup - 1) / kSignsPerGroup * kSignsPerGroup);
        const bool staged = hi - lo != count;
        Raw* target = staged ? staging : out + (lo - request.offset);
        auto consume = [&](int i, typename V::F z)
                           __attribute__((always_inline)) { Storage<V, D>::store_nearest(target + i, z); };
        low_rank.set_tile(lo, hi, first, count);
        if (low_rank.makes(term)) {
            low_rank.fill(term, noise);
            for (int i = 0; i < count; i += V::kWidth)
                consume(i, V::load(noise + i));
        } else if (kind_of(request.family) == Purpose::kNormal)
            for_normals<V>(philox, draw, first, count, consume);
        else
            for_signs<V>(signs.at(philox, draw, first), count, consume);
        if (staged)
            __builtin_memcpy(out + (lo - request.offset), staging + (lo - first),
                             static_cast<size_t>(hi - lo) * sizeof(Raw));
    });
}

template <class V>
void run_request(const InPlace& request, int64_t begin, int64_t end) {
    if (request.dtype == DType::kFp32)
        run_noise<V, DType::kFp32>(request, begin, end);
    else if (request.dtype == DType::kBf16)
        run_noise<V, DType::kBf16>(request, begin, end);
    else
        run_noise<V, DType::kFp16>(request, begin, end);
}

} // namespace
} // namespace distzo2
