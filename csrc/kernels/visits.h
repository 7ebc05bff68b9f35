// perturb and update in place, said as visits of one segment: what the CPU and the CUDA entries share. Not copyable,
// since the visit points into the object.
#pragma once

#include "kernels/kernels.h"

namespace distzo2 {

struct OneSegmentVisit {
    explicit OneSegmentVisit(const InPlace& place, float coef)
        : segment{0,          place.numel, static_cast<int64_t>(place.dtype), place.param, place.offset, 0,
                  place.rows, place.cols},
          term{place.family, place.step, place.probe, 0}, coef(coef) {
        visit.weights = static_cast<uint8_t*>(place.data);
        visit.num_bytes = visit.out_bytes = place.numel * dtype_bytes(place.dtype);
        visit.segments = &segment;
        visit.num_segments = 1;
        visit.seed = place.seed;
        visit.terms = &term;
        visit.coefs = &this->coef;
        visit.num_terms = 1;
        visit.num_groups = 1;
    }
    OneSegmentVisit(const OneSegmentVisit&) = delete;
    OneSegmentVisit& operator=(const OneSegmentVisit&) = delete;

    Segment segment;
    Term term;
    float coef;
    Materialize visit;
};

// One emit into the weights themselves.
struct PerturbVisit : OneSegmentVisit {
    PerturbVisit(const InPlace& place, float scale) : OneSegmentVisit(place, scale) {
        visit.emits = &emit;
        visit.emit_scales = &unit;
        visit.num_emits = 1;
        visit.outs = &visit.weights;
    }
    Emit emit{0, 1};
    float unit = 1.0f;
};

struct UpdateVisit : OneSegmentVisit {
    UpdateVisit(const InPlace& place, float lr, float coef, float weight_decay)
        : OneSegmentVisit(place, coef), update{place.step, 0, 1}, group{lr, weight_decay, 0.0f, 1.0f} {
        visit.updates = &update;
        visit.update_groups = &group;
        visit.num_updates = 1;
        visit.write_back = true;
    }
    Update update;
    UpdateGroup group;
};

} // namespace distzo2
