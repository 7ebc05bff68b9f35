// What one thread of the CUDA kernels does in a visit: octets of elements through all updates and emits. Host and
// device, so that tests on a machine without a GPU run it too. No torch.
#pragma once

#include <type_traits>

#include "kernels/cuda/octet.h"
#include "kernels/cuda/visit_tables.h"

namespace distzo2 {

// Reads rows of the tables from kernel parameters or from a device workspace.
struct TableReader {
    const uint8_t* bytes;
    template <class Row>
    DZO_HD const Row& row(uint32_t at, uint32_t index) const {
        return reinterpret_cast<const Row*>(bytes + at)[index];
    }
};

DZO_HD Draw draw_of(uint32_t tag, uint32_t param, uint32_t step) { return Draw{param, step, tag}; }

// One update of an octet's elements w; true unless it is the identity. z is scratch, and `held` the number of the noise
// in it.
template <DType D, bool kAnchored, class Matrix, class Place>
DZO_HD bool update_octet(const VisitHeader& header, const TableReader& tables, uint32_t u, uint32_t param,
                         uint32_t group, const Matrix& matrix, int64_t octet, const Place& place,
                         const OctetScale<D>& scale, float w[kOctet], float z[kOctet], uint32_t& held) {
    const DeviceUpdate update = tables.row<DeviceUpdate>(header.updates_at, u);
    const UpdateGroup scalars = tables.row<UpdateGroup>(header.groups_at, u * header.num_groups + group);
    if (scalars.lr == 0.0f)
        return false;
    const bool decays = scalars.weight_decay != 0.0f;
    float a[kOctet];
    DZO_UNROLL
    for (int i = 0; i < kOctet; ++i)
        a[i] = decays ? mul_rn(scalars.weight_decay, scale.value(w[i])) : 0.0f;
    bool any = decays;
    if constexpr (kAnchored && !is_code(D)) {
        if (scalars.anchor != 0.0f) {
            any = true;
            float start[kOctet];
            place.load_start(header.weights, start);
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                a[i] = fma_rn(scalars.anchor, fma_rn(-1.0f, start[i], w[i]), a[i]);
        }
    }
    for (uint32_t j = 0; j < update.num_terms; ++j) {
        const DeviceTerm term = tables.row<DeviceTerm>(header.terms_at, update.first_term + j);
        const float k = mul_rn(term.coef, scalars.update_scale);
        if (k == 0.0f)
            continue;
        any = true;
        if (term.noise != held) {
            matrix.octet(draw_of(term.tag, param, term.step), header.keys, octet, z);
            held = term.noise;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            a[i] = fma_rn(k, z[i], a[i]);
    }
    if (!any)
        return false;
    scale.update(w, a, scalars.lr, make_draw(Purpose::kRounding, param, update.step, 0), header.keys, octet);
    return true;
}

// Any program.
template <class Matrix, bool kAnchored = false>
struct Program {
    static constexpr bool kMixed = false, kCoded = false, kLowRank = std::is_same_v<Matrix, DeviceMatrix>;
    static constexpr int kMinBlocks = kLowRank ? 1 : 2; // a multiprocessor: leaves it registers for all of its state
    template <DType D>
    struct Run {
        const VisitHeader& header;
        const TableReader& tables;
        const DeviceSegment& segment;
        Matrix matrix = {};

        template <class Place>
        DZO_HD void octet(int64_t octet, const Place& place) const {
            float w[kOctet], z[kOctet], a[kOctet];
            uint32_t held = 0xFFFFFFFFu;
            const OctetScale<D> units = place.scale(header.weights, octet);
            place.load(header.weights, w);
            bool changed = false;
            for (uint32_t u = 0; u < header.num_updates; ++u)
                changed |= update_octet<D, kAnchored>(header, tables, u, segment.param, segment.group, matrix, octet,
                                                      place, units, w, z, held);
            if (changed && header.write_back) {
                DZO_UNROLL
                for (int i = 0; i < kOctet; ++i)
                    a[i] = w[i];
                place.template store<true>(header.weights, a);
            }
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                w[i] = units.value(w[i]);
            for (uint32_t e = 0; e < header.num_emits; ++e) {
                const DeviceEmit emit = tables.row<DeviceEmit>(header.emits_at, e);
                const float scale = tables.row<float>(header.scales_at, e * header.num_groups + segment.group);
                DZO_UNROLL
                for (int i = 0; i < kOctet; ++i)
                    a[i] = w[i];
                for (uint32_t j = 0; j < emit.num_terms; ++j) {
                    const DeviceTerm term = tables.row<DeviceTerm>(header.terms_at, emit.first_term + j);
                    const float k = mul_rn(term.coef, scale);
                    if (k == 0.0f)
                        continue;
                    if (term.noise != held) {
                        matrix.octet(draw_of(term.tag, segment.param, term.step), header.keys, octet, z);
                        held = term.noise;
                    }
                    DZO_UNROLL
                    for (int i = 0; i < kOctet; ++i)
                        a[i] = fma_rn(k, z[i], a[i]);
                }
                place.emit(tables.row<uint8_t*>(header.outs_at, e), a);
            }
        }
    };
};

struct AnyProgram : Program<NoMatrix> {};
struct LowRankProgram : Program<DeviceMatrix> {};
struct AnchoredProgram : Program<DeviceMatrix, true> {}; // only as Coded

// The common programs, with their scalars in registers: kUpdates (0 or 1) updates of one term, then kEmits (0, 1 or 2)
// emits of one term, both of the same z. All noise is of one family: the choice at run time costs a third of the warps
// that a multiprocessor holds.
template <int kUpdates, int kEmits, Purpose kFamily>
struct SimpleProgram {
    static constexpr bool kMixed = false, kCoded = false, kLowRank = false;
    static constexpr int kMinBlocks =
        kUpdates > 0 && kEmits > 0 ? 3 : 0; // 0: the compiler's choice, which spills there
    template <DType D>
    struct Run {
        const VisitHeader& header;
        const DeviceSegment& segment;
        Draw update_noise{}, rounding{}, emit_noise{};
        float lr = 1, weight_decay = 0, update_coef = 1;
        float emit_coef[2] = {1, 1};
        uint8_t* outs[2] = {};

        DZO_HD Run(const VisitHeader& visit, const TableReader& tables, const DeviceSegment& where)
            : header(visit), segment(where) {
            if (kUpdates > 0) {
                const DeviceUpdate update = tables.row<DeviceUpdate>(visit.updates_at, 0);
                const UpdateGroup scalars = tables.row<UpdateGroup>(visit.groups_at, where.group);
                const DeviceTerm term = tables.row<DeviceTerm>(visit.terms_at, update.first_term);
                update_noise = draw_of(term.tag, where.param, term.step);
                rounding = make_draw(Purpose::kRounding, where.param, update.step, 0);
                lr = scalars.lr;
                weight_decay = scalars.weight_decay;
                update_coef = mul_rn(term.coef, scalars.update_scale);
            }
            DZO_UNROLL
            for (int e = 0; e < kEmits; ++e) {
                const DeviceEmit emit = tables.row<DeviceEmit>(visit.emits_at, static_cast<uint32_t>(e));
                const DeviceTerm term = tables.row<DeviceTerm>(visit.terms_at, emit.first_term);
                const uint32_t row = static_cast<uint32_t>(e) * visit.num_groups + where.group;
                emit_noise = draw_of(term.tag, where.param, term.step);
                emit_coef[e] = mul_rn(term.coef, tables.row<float>(visit.scales_at, row));
                outs[e] = tables.row<uint8_t*>(visit.outs_at, static_cast<uint32_t>(e));
            }
        }

        template <class Place>
        DZO_HD void octet(int64_t octet, const Place& place) const {
            float w[kOctet], z[kOctet];
            const OctetScale<D> units = place.scale(header.weights, octet);
            place.load(header.weights, w);
            if (kUpdates > 0 && lr != 0.0f && (update_coef != 0.0f || weight_decay != 0.0f)) {
                update(octet, units, w, z);
                if (header.write_back) {
                    DZO_UNROLL
                    for (int i = 0; i < kOctet; ++i)
                        z[i] = w[i];
                    place.template store<true>(header.weights, z);
                }
            }
            if (kEmits > 0 && (emit_coef[0] != 0.0f || emit_coef[kEmits - 1] != 0.0f))
                family_octet<kFamily>(emit_noise, header.keys, octet, z);
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                w[i] = units.value(w[i]);
            DZO_UNROLL
            for (int e = 0; e < kEmits; ++e) {
                float x[kOctet];
                DZO_UNROLL
                for (int i = 0; i < kOctet; ++i)
                    x[i] = emit_coef[e] != 0.0f ? fma_rn(emit_coef[e], z[i], w[i]) : w[i];
                place.emit(outs[e], x);
            }
        }

        DZO_HD void update(int64_t octet, const OctetScale<D>& units, float w[kOctet], float z[kOctet]) const {
            float a[kOctet];
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                a[i] = weight_decay != 0.0f ? mul_rn(weight_decay, units.value(w[i])) : 0.0f;
            if (update_coef != 0.0f) {
                family_octet<kFamily>(update_noise, header.keys, octet, z);
                DZO_UNROLL
                for (int i = 0; i < kOctet; ++i)
                    a[i] = fma_rn(update_coef, z[i], a[i]);
            }
            units.update(w, a, lr, rounding, header.keys, octet);
        }
    };
};

// A program whose emits are of other dtypes than the weights, or at other places. A kernel of its own, so that the
// common ones keep their registers.
template <class Program>
struct Mixed : Program {
    static constexpr bool kMixed = true;
    static constexpr int kMinBlocks = Program::kMinBlocks > 0 ? Program::kMinBlocks : 4; // else one spills on sm_100
};

// A visit with segments of stored formats: another kernel, for the same reason.
template <class Program>
struct Coded : Mixed<Program> {
    static constexpr bool kCoded = true;
};

// The octets of thread `thread` in a tile: neighbours work on neighbouring octets. Counted from the segment's first
// octet, in 32 bits: see kMaxPartOctets.
template <DType D, class Place = OctetPlace<D>, class Run>
DZO_HD void run_octets(const DeviceSegment& segment, bool aligned, const Run& run, uint32_t tile,
                       uint32_t octets_per_thread, uint32_t thread, const DeviceOut& out = {},
                       bool out_aligned = false) {
    constexpr int kBytes = OctetStorage<D>::kBytes;
    constexpr bool kMixed = !std::is_same_v<Place, OctetPlace<D>>;
    const int64_t first = segment.begin / kOctet;
    const uint32_t num = static_cast<uint32_t>((segment.end + kOctet - 1) / kOctet - first);
    const int head = static_cast<int>(segment.begin % kOctet), tail = static_cast<int>((segment.end - 1) % kOctet) + 1;
    uint32_t index = tile * kThreads * octets_per_thread + thread;
    Place place;
    place.at = segment.byte_offset + (static_cast<int64_t>(index) * kOctet - head) * kBytes;
    if constexpr (kMixed) {
        place.out_dtype = static_cast<DType>(out.dtype);
        place.out_at = out.offset + (static_cast<int64_t>(index) * kOctet - head) * dtype_bytes(place.out_dtype);
        place.scales_at = out.scales_at;
        place.scale_shift = static_cast<int>(out.scale_shift);
    }
    for (uint32_t i = 0; i < octets_per_thread && index < num; ++i) {
        place.first = index == 0 ? head : 0;
        place.last = index == num - 1 ? tail : kOctet;
        place.whole = aligned && place.first == 0 && place.last == kOctet;
        if constexpr (kMixed)
            place.out_whole = out_aligned && place.first == 0 && place.last == kOctet;
        run.octet(first + index, place);
        index += kThreads;
        place.advance(kThreads);
    }
}

// Whether the segment's octets, of elements of so many bytes, begin at multiples of 16 bytes of a buffer.
DZO_HD bool is_aligned(const uint8_t* buffer, const DeviceSegment& segment, int64_t offset, int64_t bytes) {
    const int64_t head = segment.begin % kOctet * bytes;
    return (reinterpret_cast<uintptr_t>(buffer) + static_cast<uintptr_t>(offset - head)) % 16 == 0;
}

template <class Program, DType D>
DZO_HD void run_segment(const VisitHeader& header, const TableReader& tables, uint32_t index,
                        const DeviceSegment& segment, uint32_t tile, uint32_t thread) {
    const auto run = [&] {
        using Run = typename Program::template Run<D>;
        if constexpr (Program::kLowRank)
            return Run{header, tables, segment, tables.row<DeviceMatrix>(header.matrices_at, index)};
        else
            return Run{header, tables, segment};
    }();
    const bool alike = header.aligned != 0;
    const bool aligned = is_aligned(header.weights, segment, segment.byte_offset, OctetStorage<D>::kBytes);
    tile -= segment.first_tile;
    if constexpr (Program::kMixed) {
        const DeviceOut out = tables.row<DeviceOut>(header.places_at, index);
        const int64_t bytes = dtype_bytes(static_cast<DType>(out.dtype));
        const bool out_aligned = alike && header.num_emits > 0 &&
                                 is_aligned(tables.row<uint8_t*>(header.outs_at, 0), segment, out.offset, bytes);
        run_octets<D, MixedPlace<D>>(segment, aligned, run, tile, header.octets_per_thread, thread, out, out_aligned);
    } else {
        run_octets<D>(segment, alike && aligned, run, tile, header.octets_per_thread, thread);
    }
}

// All that one thread does.
template <class Program>
DZO_HD void run_thread(const VisitHeader& header, const TableReader& tables, uint32_t tile, uint32_t thread) {
    uint32_t low = 0, high = header.num_segments; // the last segment that begins at or before the tile
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (tables.row<DeviceSegment>(header.segments_at, middle).first_tile <= tile)
            low = middle;
        else
            high = middle;
    }
    const DeviceSegment segment = tables.row<DeviceSegment>(header.segments_at, low);
    if constexpr (Program::kCoded) {
        if (segment.dtype == static_cast<uint32_t>(DType::kCode16))
            return run_segment<Program, DType::kCode16>(header, tables, low, segment, tile, thread);
        if (segment.dtype == static_cast<uint32_t>(DType::kCode8))
            return run_segment<Program, DType::kCode8>(header, tables, low, segment, tile, thread);
        if (segment.dtype == static_cast<uint32_t>(DType::kNonNegative))
            return run_segment<Program, DType::kNonNegative>(header, tables, low, segment, tile, thread);
    }
    if (segment.dtype == static_cast<uint32_t>(DType::kBf16))
        run_segment<Program, DType::kBf16>(header, tables, low, segment, tile, thread);
    else if (segment.dtype == static_cast<uint32_t>(DType::kFp32))
        run_segment<Program, DType::kFp32>(header, tables, low, segment, tile, thread);
    else
        run_segment<Program, DType::kFp16>(header, tables, low, segment, tile, thread);
}

// Generated noise: rne(z) of elements [offset, offset + numel), as a visit that only writes.
template <DType D, class Matrix>
struct GenerateRun {
    const InPlace& request;
    const PhiloxKeys& keys;
    const Matrix& matrix;

    DZO_HD void octet(int64_t octet, const OctetPlace<D>& place) const {
        float z[kOctet];
        matrix.octet(make_draw(static_cast<Purpose>(request.family), static_cast<uint32_t>(request.param),
                               static_cast<uint32_t>(request.step), static_cast<uint32_t>(request.probe)),
                     keys, octet, z);
        place.template store<false>(static_cast<uint8_t*>(request.data), z);
    }
};

template <DType D, class Matrix = NoMatrix>
DZO_HD void generate_thread(const InPlace& request, const PhiloxKeys& keys, uint32_t octets_per_thread, uint32_t tile,
                            uint32_t thread, const Matrix& matrix = {}) {
    const DeviceSegment whole{0, request.offset, request.offset + request.numel, 0, 0, 0, 0};
    const bool aligned = is_aligned(static_cast<const uint8_t*>(request.data), whole, 0, OctetStorage<D>::kBytes);
    run_octets<D>(whole, aligned, GenerateRun<D, Matrix>{request, keys, matrix}, tile, octets_per_thread, thread);
}

} // namespace distzo2
