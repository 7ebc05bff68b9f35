// What a visit's tables must keep to, so that nothing outside its buffers is read or written. Values, families of noise
// and overlaps are the business of distzo2_core/ops.py, which every caller passes.
#include "common/check.h"
#include "kernels/kernels.h"

namespace distzo2 {
namespace {

void check_span(const char* what, int64_t row, int64_t first, int64_t num, int64_t num_terms) {
    DZO_CHECK(first >= 0 && num >= 0 && num <= num_terms && first <= num_terms - num, what, ' ', row, ": terms ", first,
              " to ", first, " + ", num, " of ", num_terms);
}

void check_place(const char* what, int64_t row, int64_t numel, int64_t dtype, int64_t at, int64_t num_bytes) {
    DZO_CHECK(dtype >= 0 && dtype <= static_cast<int64_t>(DType::kFp16), what, ' ', row, ": dtype code ", dtype);
    const int64_t bytes = dtype_bytes(static_cast<DType>(dtype));
    DZO_CHECK(numel == 0 || (at >= 0 && at <= num_bytes - numel * bytes), what, ' ', row, ": ", numel, " elements of ",
              bytes, " bytes at byte ", at, " of ", num_bytes);
}

} // namespace

void check(const Materialize& visit) {
    for (int64_t u = 0; u < visit.num_updates; ++u)
        check_span("update", u, visit.updates[u].first_term, visit.updates[u].num_terms, visit.num_terms);
    for (int64_t e = 0; e < visit.num_emits; ++e)
        check_span("emit", e, visit.emits[e].first_term, visit.emits[e].num_terms, visit.num_terms);
    if (visit.num_updates == 0 && visit.num_emits == 0)
        return; // the segments are not looked at
    for (int64_t s = 0; s < visit.num_segments; ++s) {
        const Segment& segment = visit.segments[s];
        DZO_CHECK(segment.numel >= 0 && segment.numel <= kMaxElements, "segment ", s, ": numel ", segment.numel);
        check_place("segment", s, segment.numel, segment.dtype, segment.byte_offset, visit.num_bytes);
        if (visit.num_emits > 0)
            check_place("out of segment", s, segment.numel, segment.out_dtype, segment.out_offset, visit.out_bytes);
        DZO_CHECK(segment.group >= kNoGroup && segment.group < visit.num_groups, "segment ", s, ": group ",
                  segment.group, " of ", visit.num_groups);
    }
}

} // namespace distzo2
