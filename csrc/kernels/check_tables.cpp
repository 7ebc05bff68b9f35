// Range checks of a visit's tables, for the CPU and the CUDA entries alike.
#include <cmath>

#include "common/check.h"
#include "kernels/kernels.h"
#include "noise/philox.h"

namespace distzo2 {
namespace {

constexpr int64_t kMaxWord = 0xFFFFFFFF;

bool is_family(int64_t family) {
    return family == static_cast<int64_t>(Purpose::kNormal) || family == static_cast<int64_t>(Purpose::kRademacher);
}

bool is_dtype(int64_t dtype) { return dtype >= 0 && dtype <= static_cast<int64_t>(DType::kFp16); }

void check_span(const char* what, int64_t row, int64_t first, int64_t num, int64_t num_terms) {
    DZO_CHECK(first >= 0 && num >= 0 && num <= num_terms && first <= num_terms - num, what, ' ', row, ": terms ", first,
              " to ", first, " + ", num, " of ", num_terms);
}

void check_segment(const Materialize& visit, int64_t s) {
    const Segment& segment = visit.segments[s];
    DZO_CHECK(is_dtype(segment.dtype), "segment ", s, ": dtype code ", segment.dtype);
    const int64_t bytes = dtype_bytes(static_cast<DType>(segment.dtype));
    DZO_CHECK(segment.numel >= 0 && segment.numel <= kMaxElements, "segment ", s, ": numel ", segment.numel);
    DZO_CHECK(segment.byte_offset >= 0 && segment.byte_offset <= visit.num_bytes - segment.numel * bytes, "segment ", s,
              ": ", segment.numel, " elements of ", bytes, " bytes at byte ", segment.byte_offset, " of ",
              visit.num_bytes);
    DZO_CHECK(reinterpret_cast<uintptr_t>(visit.weights + segment.byte_offset) % static_cast<uintptr_t>(bytes) == 0,
              "segment ", s, ": not aligned to its dtype");
    DZO_CHECK(segment.param >= 0 && segment.param <= kMaxWord, "segment ", s, ": param ", segment.param);
    DZO_CHECK(segment.element_offset >= 0 && segment.element_offset <= kMaxElements - segment.numel, "segment ", s,
              ": element_offset ", segment.element_offset);
    DZO_CHECK(segment.group >= 0 && segment.group < visit.num_groups, "segment ", s, ": group ", segment.group, " of ",
              visit.num_groups);
}

void check_overlap(const Materialize& visit) {
    const auto end_of = [](const Segment& segment) {
        return segment.byte_offset + segment.numel * dtype_bytes(static_cast<DType>(segment.dtype));
    };
    bool ascending = true;
    for (int64_t s = 1; s < visit.num_segments && ascending; ++s)
        ascending = visit.segments[s].byte_offset >= end_of(visit.segments[s - 1]);
    if (ascending)
        return;
    for (int64_t s = 0; s < visit.num_segments; ++s)
        for (int64_t other = 0; other < s; ++other) {
            const Segment &a = visit.segments[s], &b = visit.segments[other];
            DZO_CHECK(a.numel == 0 || b.numel == 0 || a.byte_offset >= end_of(b) || b.byte_offset >= end_of(a),
                      "segments ", other, " and ", s, " overlap");
        }
}

} // namespace

void check(const Materialize& visit) {
    const bool has_program = visit.num_updates > 0 || visit.num_emits > 0;
    for (int64_t t = 0; t < visit.num_terms; ++t) {
        const Term& term = visit.terms[t];
        DZO_CHECK(is_family(term.family), "term ", t, ": unknown family of noise ", term.family);
        DZO_CHECK(term.step >= 0 && term.step <= kMaxWord, "term ", t, ": step ", term.step);
        DZO_CHECK(term.probe >= 0 && term.probe <= kMaxProbe, "term ", t, ": probe ", term.probe);
        DZO_CHECK(term.sub == 0, "term ", t, ": sub ", term.sub);
        DZO_CHECK(std::isfinite(visit.coefs[t]), "term ", t, ": coefficient ", visit.coefs[t]);
    }
    for (int64_t u = 0; u < visit.num_updates; ++u) {
        const Update& update = visit.updates[u];
        DZO_CHECK(update.step >= 0 && update.step <= kMaxWord, "update ", u, ": step ", update.step);
        check_span("update", u, update.first_term, update.num_terms, visit.num_terms);
        for (int64_t g = 0; g < visit.num_groups; ++g) {
            const UpdateGroup& group = visit.update_groups[u * visit.num_groups + g];
            DZO_CHECK(std::isfinite(group.lr) && std::isfinite(group.weight_decay) && std::isfinite(group.update_scale),
                      "update ", u, ", group ", g, ": lr ", group.lr, ", weight_decay ", group.weight_decay,
                      ", update_scale ", group.update_scale);
        }
    }
    for (int64_t e = 0; e < visit.num_emits; ++e) {
        check_span("emit", e, visit.emits[e].first_term, visit.emits[e].num_terms, visit.num_terms);
        for (int64_t g = 0; g < visit.num_groups; ++g)
            DZO_CHECK(std::isfinite(visit.emit_scales[e * visit.num_groups + g]), "emit ", e, ", group ", g,
                      ": perturb_scale ", visit.emit_scales[e * visit.num_groups + g]);
        const uint8_t* out = visit.outs[e];
        DZO_CHECK(out == visit.weights || out >= visit.weights + visit.num_bytes ||
                      out + visit.num_bytes <= visit.weights,
                  "out ", e, " overlaps the weights");
        DZO_CHECK(reinterpret_cast<uintptr_t>(out) % 4 == reinterpret_cast<uintptr_t>(visit.weights) % 4, "out ", e,
                  " is not aligned as the weights are");
        for (int64_t other = 0; other < e; ++other)
            DZO_CHECK(out >= visit.outs[other] + visit.num_bytes || out + visit.num_bytes <= visit.outs[other], "outs ",
                      other, " and ", e, " overlap");
    }
    if (has_program) {
        for (int64_t s = 0; s < visit.num_segments; ++s)
            check_segment(visit, s);
        check_overlap(visit);
    }
}

void check(const Generate& request) {
    DZO_CHECK(is_dtype(static_cast<int64_t>(request.dtype)), "dtype code ", static_cast<int64_t>(request.dtype));
    DZO_CHECK(is_family(request.family), "unknown family of noise ", request.family);
    DZO_CHECK(reinterpret_cast<uintptr_t>(request.out) % static_cast<uintptr_t>(dtype_bytes(request.dtype)) == 0,
              "out is not aligned to its dtype");
    DZO_CHECK(request.numel >= 0 && request.numel <= kMaxElements, "numel ", request.numel);
    DZO_CHECK(request.offset >= 0 && request.offset <= kMaxElements - request.numel, "offset ", request.offset);
    DZO_CHECK(request.step >= 0 && request.step <= kMaxWord, "step ", request.step);
    DZO_CHECK(request.param >= 0 && request.param <= kMaxWord, "param ", request.param);
    DZO_CHECK(request.probe >= 0 && request.probe <= kMaxProbe, "probe ", request.probe);
}

void check(const Lookup& request) {
    DZO_CHECK(is_dtype(static_cast<int64_t>(request.dtype)), "dtype code ", static_cast<int64_t>(request.dtype));
    DZO_CHECK(is_family(request.family), "unknown family of noise ", request.family);
    DZO_CHECK(request.num_ids >= 0, "num_ids ", request.num_ids);
    const auto bytes = static_cast<uintptr_t>(dtype_bytes(request.dtype));
    DZO_CHECK(reinterpret_cast<uintptr_t>(request.table) % bytes == 0, "the table is not aligned to its dtype");
    DZO_CHECK(reinterpret_cast<uintptr_t>(request.ids) % sizeof(int64_t) == 0, "ids are not aligned to int64");
    DZO_CHECK(request.num_rows >= 0 && request.cols >= 0 &&
                  (request.cols == 0 || request.num_rows <= kMaxElements / request.cols),
              "a table of ", request.num_rows, " x ", request.cols);
    DZO_CHECK(request.offset >= 0 && request.offset <= kMaxElements - request.num_rows * request.cols, "offset ",
              request.offset);
    DZO_CHECK(request.step >= 0 && request.step <= kMaxWord, "step ", request.step);
    DZO_CHECK(request.param >= 0 && request.param <= kMaxWord, "param ", request.param);
    DZO_CHECK(request.probe >= 0 && request.probe <= kMaxProbe, "probe ", request.probe);
}

} // namespace distzo2
