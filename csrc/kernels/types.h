// The tables that describe a visit to packed weights. Plain rows with the layout of the torch op's CPU tensors, so that
// the bindings pass pointers and copy nothing. No torch, no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "noise/philox.h"

namespace distzo2 {

// The first three are dtypes. Of the others, which are stored formats alone, codes are signed integers with a float32
// scale for each group of elements; kNonNegative is float32 that updates keep from falling below 0.
enum class DType : int64_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kCode8 = 3, kCode16 = 4, kNonNegative = 5 };

DZO_HD constexpr int64_t dtype_bytes(DType dtype) { return 0x421224 >> 4 * static_cast<int>(dtype) & 7; }

DZO_HD constexpr bool is_code(DType dtype) { return dtype == DType::kCode8 || dtype == DType::kCode16; }

// Of elements that share a scale: a power of two between these.
constexpr int64_t kMinScaleGroup = 32, kMaxScaleGroup = 256;

// Groups of normals are numbered with 36 bits, so a parameter has at most 2^38 elements.
constexpr int64_t kMaxElements = int64_t{1} << 38;

// Of a segment that is frozen: no update and no perturbation reaches it.
constexpr int64_t kNoGroup = -1;

// numel elements of parameter `param` from its row-major element `element_offset` on, stored at weights + byte_offset,
// and emitted at out + out_offset as elements of out_dtype. rows and cols are of the whole parameter, or of each of the
// matrices that it holds, for low-rank noise; cols is 0 where it has none.
struct Segment {
    int64_t byte_offset;
    int64_t numel;
    int64_t dtype; // a DType
    int64_t param;
    int64_t element_offset;
    int64_t group; // or kNoGroup
    int64_t rows;
    int64_t cols;
    int64_t out_offset = byte_offset;
    int64_t out_dtype = dtype; // none of a stored format
    // Of codes: the scale of the segment's element i is the float32 at weights + scale_offset + 4 * (i / scale_group).
    // element_offset is a multiple of scale_group. Of a dtype: w0 of the segment, the weights that an anchor pulls to,
    // lies at weights + scale_offset as the weights do.
    int64_t scale_offset = 0;
    int64_t scale_group = 0;
};

// One noise tensor; its coefficient is in a table of its own. family: see philox.h; sub must be 0.
struct Term {
    int64_t family;
    int64_t step;
    int64_t probe;
    int64_t sub;
};

// `step` is the update's own and keys its rounding bits.
struct Update {
    int64_t step;
    int64_t first_term;
    int64_t num_terms;
};

struct UpdateGroup {
    float lr;
    float weight_decay;
    float anchor; // 0 where a segment of the group has no w0
    float update_scale;
};

struct Emit {
    int64_t first_term;
    int64_t num_terms;
};

// A visit. With z the noise of a term at an element, and everything in float32 (each constant and product rounded to
// it):
//   for each update in order, g being the segment's group:
//       k_j = coefs[j] * update_scale[g]; terms with k_j == 0 are left out
//       identity, bits untouched, if lr[g] == 0, or weight_decay[g] == 0 and anchor[g] == 0 and no term is left
//       a = weight_decay == 0 ? +0 : weight_decay * w;  if anchor != 0: a = fma(anchor, w - w0, a)
//       a = fma(k_j, z_j, a) for each term in order
//       w = round(fma(-lr, a, w)), stochastic for bf16 and fp16 with the bits of (seed, update's step, param, element),
//       rne for fp32; of kNonNegative then w = +0 where w has a sign (a NaN has none)
//       of codes, w being float(q) * s: q = clamp(q + floor(-lr * a / s + R / 2^16)), each operation rounded, see
//       step_code (noise/rounding.h)
//   for each emit: a = w; a = fma(coefs[j] * emit_scale[g], z_j, a) for each term whose product is not 0; out = rne(a)
//   in the segment's out_dtype
//   if write_back, and an update was not the identity: the weight is stored.
// Every NaN that rounding stores is the canonical one (noise/rounding.h).
struct Materialize {
    uint8_t* weights = nullptr;
    int64_t num_bytes = 0; // of weights
    int64_t out_bytes = 0; // of every out
    const Segment* segments = nullptr;
    int64_t num_segments = 0;
    uint64_t seed = 0;
    const Term* terms = nullptr; // [num_terms]
    const float* coefs = nullptr;
    int64_t num_terms = 0;
    const Update* updates = nullptr;            // [num_updates]
    const UpdateGroup* update_groups = nullptr; // [num_updates][num_groups]
    int64_t num_updates = 0;
    int64_t num_groups = 0;
    const Emit* emits = nullptr;        // [num_emits]
    const float* emit_scales = nullptr; // [num_emits][num_groups]
    int64_t num_emits = 0;
    // [num_emits]; an out may be `weights` itself if every segment is emitted as it is stored, but may not overlap it
    // otherwise.
    uint8_t* const* outs = nullptr;
    bool write_back = false;
};

// Elements [offset, offset + numel) of a parameter, stored at `data`: what generate writes (rne(z)), and what perturb
// and update change in place by one term.
struct InPlace {
    void* data = nullptr;
    DType dtype = DType::kFp32;
    int64_t numel = 0;
    uint64_t seed = 0;
    int64_t family = 0;
    int64_t step = 0;
    int64_t param = 0;
    int64_t probe = 0;
    int64_t offset = 0;
    int64_t rows = 0, cols = 0; // as a Segment's
};

// out[i] = rne(fma(scale, z, row ids[i] of the table)) in out_dtype, the table [num_rows, cols] holding elements
// [offset, offset + num_rows * cols) of a parameter, a matrix of `cols` columns; rne(row) where scale is 0. Equal to
// the rows of a visit's emit of the whole table.
struct Lookup {
    const void* table = nullptr;
    void* out = nullptr; // [num_ids, cols]
    const int64_t* ids = nullptr;
    int64_t num_ids = 0;
    int64_t num_rows = 0;
    int64_t cols = 0;
    DType dtype = DType::kFp32;
    float scale = 0;
    uint64_t seed = 0;
    int64_t family = 0;
    int64_t step = 0;
    int64_t param = 0;
    int64_t probe = 0;
    int64_t offset = 0;
    DType out_dtype = dtype;
};

} // namespace distzo2
