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

void check_place(const char* what, int64_t row, int64_t numel, int64_t dtype, int64_t at, int64_t num_bytes,
                 DType last = DType::kFp16) {
    DZO_CHECK(dtype >= 0 && dtype <= static_cast<int64_t>(last), what, ' ', row, ": dtype code ", dtype);
    const int64_t bytes = dtype_bytes(static_cast<DType>(dtype));
    DZO_CHECK(numel == 0 || (at >= 0 && at <= num_bytes - numel * bytes), what, ' ', row, ": ", numel, " elements of ",
              bytes, " bytes at byte ", at, " of ", num_bytes);
}

// The first byte after the last value of a field, or of the codes, whose places have been found to be in range.
__extension__ using Wide = __int128;

Wide end_of(const PackedMatrix& matrix, const PackedField& field, bool codes) {
    const auto times = [](int64_t count, int64_t stride) { return static_cast<Wide>(count) * stride; };
    const Wide last = field.offset + times((matrix.rows - 1) / field.rows, field.row_stride) +
                      times(matrix.cols / matrix.block - 1, field.block_stride);
    if (codes)
        return last + code_bytes(field.type(), matrix.block);
    return last + times((matrix.block - 1) / field.cols, field.stride) + value_bytes(field.type());
}

void check_field(int64_t m, const PackedMatrix& matrix, const PackedField& field, bool codes, int64_t num_bytes) {
    if (!codes && !field.exists())
        return;
    const bool of_codes = field.kind >= 0 && field.kind <= static_cast<int64_t>(PackedKind::kFloat8E5M2);
    const bool of_values = field.kind >= static_cast<int64_t>(PackedKind::kFloat32) &&
                           field.kind <= static_cast<int64_t>(PackedKind::kMinK);
    DZO_CHECK(codes ? of_codes : of_codes || of_values, "matrix ", m, ": kind ", field.kind);
    DZO_CHECK(field.offset >= 0 && field.row_stride >= 0 && field.block_stride >= 0 && field.stride >= 0, "matrix ", m,
              ": offset ", field.offset, ", strides ", field.row_stride, ' ', field.block_stride, ' ', field.stride);
    DZO_CHECK(field.rows >= 1 && field.rows <= kMaxPackedSide && field.cols >= 1 && field.cols <= kMaxPackedSide,
              "matrix ", m, ": a value for ", field.rows, " x ", field.cols);
    DZO_CHECK(!codes || (field.rows == 1 && field.cols == 1), "matrix ", m, ": codes are not shared");
    DZO_CHECK(end_of(matrix, field, codes) <= num_bytes, "matrix ", m, ": a field of kind ", field.kind, " at byte ",
              field.offset, " of ", num_bytes);
}

} // namespace

void check(const Decode& request) {
    for (int64_t m = 0; m < request.num_matrices; ++m) {
        const PackedMatrix& matrix = request.matrices[m];
        const int64_t rows = matrix.rows, cols = matrix.cols, block = matrix.block;
        DZO_CHECK(rows >= 0 && rows <= kMaxPackedSide && cols >= 0 && cols <= kMaxPackedSide, "matrix ", m, ": ", rows,
                  " x ", cols);
        if (rows == 0 || cols == 0)
            continue;
        DZO_CHECK(rows <= kMaxElements / cols, "matrix ", m, ": ", rows, " x ", cols);
        check_place("matrix", m, rows * cols, matrix.out_dtype, matrix.out_offset, request.out_bytes);
        const int64_t head = matrix.head_dim;
        DZO_CHECK(head >= 0 && head % 2 == 0 && (head == 0 || rows % head == 0), "matrix ", m, ": head_dim ", head);
        const PackedKind kind = matrix.codes.type();
        const bool pairs = kind == PackedKind::kNibblesLow || kind == PackedKind::kNibblesHigh;
        const int64_t multiple = kind == PackedKind::kNibbles32   ? 32
                                 : kind == PackedKind::kNibbles64 ? 64
                                 : pairs                          ? 2
                                                                  : 1;
        DZO_CHECK(block > 0 && cols % block == 0 && block % multiple == 0, "matrix ", m, ": block ", block, " of ",
                  cols);
        DZO_CHECK((kind != PackedKind::kQ5K && kind != PackedKind::kQ6K) || block == kKBlock, "matrix ", m, ": block ",
                  block);
        DZO_CHECK(matrix.has_levels == 0 || is_nibbles(kind), "matrix ", m, ": levels for kind ", matrix.codes.kind);
        check_field(m, matrix, matrix.codes, true, request.num_bytes);
        DZO_CHECK(matrix.scale.exists(), "matrix ", m, ": no scale");
        for (const PackedField* field : {&matrix.scale, &matrix.outer, &matrix.zero, &matrix.min, &matrix.outer_min}) {
            check_field(m, matrix, *field, false, request.num_bytes);
            const bool k = field->type() == PackedKind::kScaleK || field->type() == PackedKind::kMinK;
            DZO_CHECK(!k || (field->stride == 0 && block == 8 * field->cols), "matrix ", m, ": six-bit values");
        }
        check_field(m, matrix, matrix.gain, false, request.gain_bytes);
        DZO_CHECK(!matrix.gain.exists() || matrix.gain.type() == PackedKind::kFloat32, "matrix ", m, ": gains of kind ",
                  matrix.gain.kind);
    }
}

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
        check_place("segment", s, segment.numel, segment.dtype, segment.byte_offset, visit.num_bytes,
                    DType::kNonNegative);
        if (is_code(static_cast<DType>(segment.dtype))) {
            const int64_t each = segment.scale_group, at = segment.scale_offset;
            DZO_CHECK(each >= kMinScaleGroup && each <= kMaxScaleGroup && (each & (each - 1)) == 0 &&
                          segment.element_offset % each == 0,
                      "segment ", s, ": a scale for ", each, " elements from element ", segment.element_offset);
            check_place("scales of segment", s, (segment.numel + each - 1) / each, 0, at, visit.num_bytes);
            DZO_CHECK(at % 4 == 0, "segment ", s, ": scales at byte ", at);
        } else {
            check_place("start of segment", s, segment.numel, segment.dtype, segment.scale_offset, visit.num_bytes,
                        DType::kNonNegative);
        }
        DZO_CHECK(segment.cols >= 0 && (segment.cols == 0 || segment.rows > 0 || segment.numel == 0), "segment ", s,
                  ": a matrix of ", segment.rows, " x ", segment.cols);
        if (visit.num_emits > 0)
            check_place("out of segment", s, segment.numel, segment.out_dtype, segment.out_offset, visit.out_bytes);
        DZO_CHECK(segment.group >= kNoGroup && segment.group < visit.num_groups, "segment ", s, ": group ",
                  segment.group, " of ", visit.num_groups);
    }
}

} // namespace distzo2
