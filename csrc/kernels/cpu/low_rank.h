// Low-rank noise of a tile on the CPU (philox.h), from parts of its factors that are kept from tile to tile: of A, for
// some rows, and of B, for a block of columns. Included by one translation unit for each instruction set; internal
// linkage throughout.
#pragma once

#include <algorithm>

#include "kernels/cpu/level.h"
#include "kernels/cpu/signs.h"

namespace distzo2 {
namespace {

// Rows are taken whole, in the order of memory, where B of all terms takes kWholeBytes or less; else a block of columns
// after another. A visit of more terms than kMaxSlots, as of a copy that misses thousands of updates, makes the factors
// of some of them anew for each tile.
constexpr int64_t kWholeBytes = 512 << 10, kBlockColumns = 512, kMaxSlots = 2048;

// The tiles of elements [begin, end) of a parameter, block of `width` columns after block, all rows of each.
template <class Body>
void for_block_tiles(int64_t begin, int64_t end, int64_t cols, int64_t width, Body body) {
    if (cols <= width)
        return for_tiles(begin, end, body);
    for (int64_t col = 0; col < cols; col += width)
        for (int64_t row = begin / cols; row * cols < end; ++row) {
            const int64_t from = row * cols + col, to = col + width < cols ? from + width : (row + 1) * cols;
            if (from < end && begin < to)
                for_tiles(begin > from ? begin : from, end < to ? end : to, body);
        }
}

template <class V>
class LowRank {
  public:
    using F = typename V::F;

    // Of a parameter of matrices of rows x cols, for any of the terms. Without columns, or terms of low rank, there is
    // nothing that it makes. whole: rows are taken whole in any case.
    LowRank(typename V::Philox& philox, int64_t param, int64_t rows, int64_t cols, const Term* terms, int64_t num_terms,
            bool whole = false)
        : philox_(philox), param_(static_cast<uint32_t>(param)), rows_(rows), cols_(cols), terms_(terms) {
        int64_t ranks = 0, largest = 0;
        for (int64_t t = 0; t < num_terms && cols > 0; ++t) {
            ranks += rank_of(terms[t].family);
            largest = std::max<int64_t>(largest, rank_of(terms[t].family));
        }
        if (ranks == 0)
            return;
        width_ = whole || ranks * cols * 4 <= kWholeBytes ? cols : kBlockColumns;
        stride_ = (width_ + 2 * kPad + 15) / 16 * 16;
        num_slots_ = std::min(num_terms, kMaxSlots);
        slot_bytes_ = static_cast<int64_t>(sizeof(Slot)) + largest * stride_ * 4;
        slots_ = static_cast<char*>(factor_memory(num_slots_ * slot_bytes_));
        for (int64_t i = 0; i < num_slots_; ++i)
            reinterpret_cast<Slot*>(slots_ + i * slot_bytes_)->term = nullptr;
    }

    // For for_block_tiles.
    int64_t width() const { return slots_ != nullptr ? width_ : cols_; }
    bool takes_whole_rows() const { return width() == cols_; }
    bool makes(const Term& term) const { return slots_ != nullptr && rank_of(term.family) > 0; }

    // What follows is of elements lo .. hi - 1 of a tile, in one block of columns; the first of them that `count`
    // values are made for is `first`, at most kPad before.
    void set_tile(int64_t lo, int64_t hi, int64_t first, int count) {
        if (slots_ == nullptr)
            return;
        lo_ = lo, hi_ = hi, first_ = first, count_ = count;
        row_ = lo / cols_;
        is_one_row_ = hi <= (row_ + 1) * cols_;
    }

    // z of the tile; may write a vector beyond.
    __attribute__((noinline)) void fill(const Term& term, float* z) {
        if (is_one_row_)
            return make(term, row_, first_, count_,
                        [z](int i, F value) __attribute__((always_inline)) { V::store(z + i, value); });
        int64_t from = lo_;
        for (int64_t row = row_; from < hi_; ++row) {
            const int64_t next = (row + 1) * cols_, to = next < hi_ ? next : hi_;
            float* const out = z + (from - first_);
            make(term, row, from, static_cast<int>(to - from),
                 [out](int i, F value) __attribute__((always_inline)) { V::store(out + i, value); });
            from = to;
        }
    }

    // sums = fma(k, z, sums); z is scratch.
    __attribute__((noinline)) void add(const Term& term, float k, float* z, float* sums) {
        const F factor = V::set(k);
        const auto add = [factor, sums](int i, F value) __attribute__((always_inline)) {
            V::store(sums + i, V::fma(factor, value, V::load(sums + i)));
        };
        if (is_one_row_)
            return make(term, row_, first_, count_, add);
        fill(term, z);
        for (int i = 0; i < count_; i += V::kWidth)
            add(i, V::load(z + i));
    }

  private:
    static constexpr int kChunk = 256;
    static constexpr int64_t kPad = kSignsPerGroup; // columns beside a block that are read and thrown away

    // Of one term; B, [rank][stride_] from kPad columns before the block's first on, lies behind it.
    struct Slot {
        const Term* term;     // nullptr: none
        int64_t block, chunk; // that are here; -1: none
        alignas(64) float a[kChunk];
        float* b() { return reinterpret_cast<float*>(this + 1) + kPad; }
    };

    Slot& slot(const Term& term) const {
        Slot& at = *reinterpret_cast<Slot*>(slots_ + (&term - terms_) % num_slots_ * slot_bytes_);
        if (at.term != &term) {
            at.term = &term;
            at.block = at.chunk = -1;
        }
        return at;
    }

    template <class Consume>
    DZO_HD void make(const Term& term, int64_t row, int64_t from, int num, Consume consume) {
        const int rank = rank_of(term.family);
        Slot& at = slot(term);
        const float* const a = rows_of(at, term, row);
        const int64_t block = (lo_ - row_ * cols_) / width_;
        const float* const b = cols_of(at, term, row / rows_, block) + (from - row * cols_ - block * width_);
        if (rank == 1)
            multiply<1>(a, b, num, consume);
        else
            multiply<4>(a, b, num, consume);
    }

    template <int kRank, class Consume>
    DZO_HD void multiply(const float* a, const float* b, int num, Consume consume) const {
        F factors[kRank];
        for (int s = 0; s < kRank; ++s)
            factors[s] = V::set(a[s]);
        for (int i = 0; i < num; i += V::kWidth) {
            F z = V::mul(factors[0], V::load(b + i));
            for (int s = 1; s < kRank; ++s)
                z = V::fma(factors[s], V::load(b + s * stride_ + i), z);
            consume(i, z);
        }
    }

    // The row's elements of A, divided by sqrt(rank).
    DZO_HD const float* rows_of(Slot& at, const Term& term, int64_t row) {
        const int64_t rank = rank_of(term.family), chunk = row * rank / kChunk;
        if (chunk != at.chunk) {
            const float scale = rank == 4 ? 0.5f : 1.0f;
            float* const a = at.a;
            make_factor(Purpose::kRows, term, chunk * kChunk, (chunk + 1) * kChunk,
                        [=](int64_t i, float value) { a[i] = value * scale; });
            at.chunk = chunk;
        }
        return at.a + row * rank % kChunk;
    }

    // The first column of a block of a matrix's B.
    DZO_HD const float* cols_of(Slot& at, const Term& term, int64_t matrix, int64_t block) {
        const int64_t rank = rank_of(term.family);
        const int64_t key = matrix * (cols_ / width_ + 1) + block;
        if (key != at.block) {
            const int64_t col = block * width_, end = col + width_ < cols_ ? col + width_ : cols_;
            float* const b = at.b();
            make_factor(Purpose::kCols, term, (matrix * cols_ + col) * rank, (matrix * cols_ + end) * rank,
                        [=, this](int64_t i, float value) { b[i % rank * stride_ + i / rank] = value; });
            at.block = key;
        }
        return at.b();
    }

    // put(i, value) for elements begin + i of a factor.
    template <class Put>
    __attribute__((noinline)) void make_factor(Purpose purpose, const Term& term, int64_t begin, int64_t end, Put put) {
        const Draw draw =
            make_draw(purpose, param_, static_cast<uint32_t>(term.step), static_cast<uint32_t>(term.probe));
        float* const values = values_;
        const auto store = [values](int i, F z) __attribute__((always_inline)) { V::store(values + i, z); };
        for_tiles(begin, end, [&](int64_t lo, int64_t hi) {
            const int64_t first = lo / kSignsPerGroup * kSignsPerGroup;
            const int count = static_cast<int>((hi - first + kSignsPerGroup - 1) / kSignsPerGroup * kSignsPerGroup);
            if (kind_of(term.family) == Purpose::kNormal)
                for_normals<V>(philox_, draw, first, count, store);
            else
                for_signs<V>(signs_.at(philox_, draw, first), count, store);
            for (int64_t i = lo; i < hi; ++i)
                put(i - begin, values[i - first]);
        });
    }

    typename V::Philox& philox_;
    const uint32_t param_;
    const int64_t rows_, cols_;
    int64_t width_ = 0, stride_ = 0; // columns of a block, and from one element of a column to the next
    const Term* const terms_;
    char* slots_ = nullptr; // a Slot with its B for each term, or for as many as there is room for
    int64_t slot_bytes_ = 0, num_slots_ = 0;
    int64_t lo_ = 0, hi_ = 0, first_ = 0, row_ = 0; // row_: of lo_
    int count_ = 0;
    bool is_one_row_ = false;
    SignWords<V, 1> signs_;
    alignas(64) float values_[kTile];
};

} // namespace
} // namespace distzo2
