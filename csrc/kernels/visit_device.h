// What one thread of the CUDA kernels does: an octet of elements through all updates and emits of a visit. Written as host and device
// functions over the per-element headers of csrc/noise, so that tests on a machine without a GPU run it too. No torch.
#pragma once

#include "kernels/visit_tables.h"
#include "noise/rademacher.h"
#include "noise/rounding.h"

namespace distzo2 {

// Reads rows of the tables from kernel parameters or from a device workspace.
struct TableReader {
    const uint8_t* bytes;
    template <class Row>
    DZO_HD const Row& row(uint32_t at, uint32_t index) const {
        return reinterpret_cast<const Row*>(bytes + at)[index];
    }
};

DZO_HD Stream stream_of(uint32_t tag, uint32_t param, uint32_t step) { return Stream{param, step, tag}; }

DZO_HD uint64_t seed_of(const VisitHeader& header) {
    return static_cast<uint64_t>(header.seed_high) << 32 | header.seed_low;
}

// The z of elements 8 * octet to 8 * octet + 7.
DZO_HD void normals_octet(const Stream& stream, uint64_t seed, int64_t octet, float z[kOctet]) {
    const uint64_t group = static_cast<uint64_t>(octet) * 2;
    const Normals4 low = normal_group(philox_group(stream, seed, group));
    const Normals4 high = normal_group(philox_group(stream, seed, group + 1));
    for (int i = 0; i < 4; ++i) {
        z[i] = low.z[i];
        z[4 + i] = high.z[i];
    }
}

DZO_HD void signs_octet(const Stream& stream, uint64_t seed, int64_t octet, float z[kOctet]) {
    const uint64_t element = static_cast<uint64_t>(octet) * kOctet;
    const PhiloxWords words = philox_group(stream, seed, element / kSignsPerGroup);
    const uint32_t word = static_cast<uint32_t>(element % kSignsPerGroup) / 32;
    const uint32_t low = word & 1 ? words.w[1] : words.w[0], high = word & 1 ? words.w[3] : words.w[2];
    const uint32_t bits = (word & 2 ? high : low) >> (element % 32);
    for (int i = 0; i < kOctet; ++i)
        z[i] = rademacher_from_lsb(bits >> i);
}

DZO_HD void noise_octet(const Stream& stream, uint64_t seed, int64_t octet, float z[kOctet]) {
    if (stream.tag >> 24 == static_cast<uint32_t>(Purpose::kNormal))
        normals_octet(stream, seed, octet, z);
    else
        signs_octet(stream, seed, octet, z);
}

struct alignas(16) Sixteen {
    uint32_t word[4];
};

// Whether any of the eight values is NaN. Values are compared in pairs: one instruction asks for both.
DZO_HD bool any_nan(const float x[kOctet]) {
#if defined(__CUDA_ARCH__)
    uint32_t found;
    asm("{\n\t.reg .pred p;\n\t"
        "setp.nan.f32 p, %1, %2;\n\t"
        "setp.nan.or.f32 p, %3, %4, p;\n\t"
        "setp.nan.or.f32 p, %5, %6, p;\n\t"
        "setp.nan.or.f32 p, %7, %8, p;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(found)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
    return found != 0;
#else
    bool found = false;
    for (int i = 0; i < kOctet; ++i)
        found = found || x[i] != x[i];
    return found;
#endif
}

// Octets as they are stored: decode, encode to nearest, and round an update, which leaves the value and its encoding.
template <DType D>
struct OctetStorage;

template <>
struct OctetStorage<DType::kFp32> {
    static constexpr int kBytes = 4;
    struct Raw {
        Sixteen part[2];
    };
    DZO_HD static float decode_one(const uint8_t* p) { return *reinterpret_cast<const float*>(p); }
    DZO_HD static void encode_one(uint8_t* p, float x) { *reinterpret_cast<float*>(p) = x; }
    DZO_HD static float nearest_one(float x) { return canonical_fp32(x); }
    DZO_HD static float update_one(float x, uint32_t) { return canonical_fp32(x); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        for (int i = 0; i < kOctet; ++i)
            w[i] = bits_float(raw.part[i / 4].word[i % 4]);
    }
    DZO_HD static Raw exact(const float w[kOctet]) {
        Raw raw;
        for (int i = 0; i < kOctet; ++i)
            raw.part[i / 4].word[i % 4] = float_bits(w[i]);
        return raw;
    }
    DZO_HD static Raw nearest(float x[kOctet]) {
        if (any_nan(x))
            for (int i = 0; i < kOctet; ++i)
                x[i] = canonical_fp32(x[i]);
        return exact(x);
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords&) {
        if (any_nan(x))
            for (int i = 0; i < kOctet; ++i)
                x[i] = canonical_fp32(x[i]);
    }
};

template <>
struct OctetStorage<DType::kBf16> {
    static constexpr int kBytes = 2;
    using Raw = Sixteen;
    DZO_HD static float decode_one(const uint8_t* p) { return bf16_to_float(*reinterpret_cast<const uint16_t*>(p)); }
    DZO_HD static void encode_one(uint8_t* p, float x) {
        *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(float_bits(x) >> 16);
    }
    DZO_HD static float nearest_one(float x) { return bf16_to_float(float_to_bf16(x)); }
    DZO_HD static float update_one(float x, uint32_t r) { return bf16_to_float(float_to_bf16_stochastic(x, r)); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = bits_float(raw.word[i] << 16);
            w[2 * i + 1] = bits_float(raw.word[i] & 0xFFFF0000u);
        }
    }
    DZO_HD static Raw exact(const float w[kOctet]) {
        Raw raw;
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_bits(w[2 * i]) >> 16 | (float_bits(w[2 * i + 1]) & 0xFFFF0000u);
        return raw;
    }
    DZO_HD static Raw nearest(float x[kOctet]) {
        Raw raw;
#if defined(__CUDA_ARCH__)
        if (!any_nan(x)) {
            for (int i = 0; i < 4; ++i)
                asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
            return raw;
        }
#endif
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_to_bf16(x[2 * i]) | static_cast<uint32_t>(float_to_bf16(x[2 * i + 1])) << 16;
        return raw;
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords& words) {
        if (any_nan(x)) {
            for (int i = 0; i < kOctet; ++i)
                x[i] = update_one(x[i], rounding_bits(words, static_cast<uint32_t>(i)));
            return;
        }
        for (int i = 0; i < kOctet; ++i)
            x[i] = bits_float((float_bits(x[i]) + rounding_bits(words, static_cast<uint32_t>(i))) & 0xFFFF0000u);
    }
};

template <>
struct OctetStorage<DType::kFp16> {
    static constexpr int kBytes = 2;
    using Raw = Sixteen;
    DZO_HD static float half_to_float(uint32_t h) {
#if defined(__CUDA_ARCH__)
        float x;
        asm("{\n\t.reg .b16 h;\n\tcvt.u16.u32 h, %1;\n\tcvt.f32.f16 %0, h;\n\t}" : "=f"(x) : "r"(h));
        return x;
#else
        return fp16_to_float(static_cast<uint16_t>(h));
#endif
    }
    DZO_HD static float decode_one(const uint8_t* p) { return fp16_to_float(*reinterpret_cast<const uint16_t*>(p)); }
    DZO_HD static void encode_one(uint8_t* p, float x) { *reinterpret_cast<uint16_t*>(p) = float_to_fp16(x); }
    DZO_HD static float nearest_one(float x) { return fp16_to_float(float_to_fp16(x)); }
    DZO_HD static float update_one(float x, uint32_t r) { return fp16_to_float(float_to_fp16_stochastic(x, r)); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = half_to_float(raw.word[i] & 0xFFFFu);
            w[2 * i + 1] = half_to_float(raw.word[i] >> 16);
        }
    }
    DZO_HD static Raw exact(float w[kOctet]) { return nearest(w); }
    DZO_HD static Raw nearest(float x[kOctet]) {
        Raw raw;
#if defined(__CUDA_ARCH__)
        if (!any_nan(x)) {
            for (int i = 0; i < 4; ++i)
                asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(raw.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
            return raw;
        }
#endif
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_to_fp16(x[2 * i]) | static_cast<uint32_t>(float_to_fp16(x[2 * i + 1])) << 16;
        return raw;
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords& words) {
        for (int i = 0; i < kOctet; ++i)
            x[i] = half_to_float(float_to_fp16_stochastic(x[i], rounding_bits(words, static_cast<uint32_t>(i))));
    }
};

// An octet in memory: elements first to last - 1 of it are the segment's, and it may be moved in pieces of 16 bytes if it is whole and
// aligned. `p` points at its element 0, which need not be the segment's.
template <DType D>
struct OctetPlace {
    using Store = OctetStorage<D>;
    using Raw = typename Store::Raw;
    int first, last;

    DZO_HD bool whole(const uint8_t* p) const {
        return first == 0 && last == kOctet && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    }
    DZO_HD void load(const uint8_t* p, float w[kOctet]) const {
        if (whole(p)) {
            Store::decode(*reinterpret_cast<const Raw*>(p), w);
            return;
        }
        for (int i = 0; i < kOctet; ++i)
            w[i] = i >= first && i < last ? Store::decode_one(p + i * Store::kBytes) : 0.0f;
    }
    // Stores rne(x), or x itself where it is known to be a value of the type.
    template <bool kExact>
    DZO_HD void store(uint8_t* p, float x[kOctet]) const {
        if (whole(p)) {
            *reinterpret_cast<Raw*>(p) = kExact ? Store::exact(x) : Store::nearest(x);
            return;
        }
        for (int i = 0; i < kOctet; ++i)
            if (i >= first && i < last)
                Store::encode_one(p + i * Store::kBytes, kExact ? x[i] : Store::nearest_one(x[i]));
    }
};

// One update of an octet's values w; true unless it is the identity. z is scratch, and `held` the number of the noise in it.
template <DType D>
DZO_HD bool update_octet(const VisitHeader& header, const TableReader& tables, uint32_t u, uint32_t param,
                         uint32_t group, int64_t octet, float w[kOctet], float z[kOctet], uint32_t& held) {
    const DeviceUpdate update = tables.row<DeviceUpdate>(header.updates_at, u);
    const UpdateGroup scalars = tables.row<UpdateGroup>(header.groups_at, u * header.num_groups + group);
    if (scalars.lr == 0.0f)
        return false;
    const bool decays = scalars.weight_decay != 0.0f;
    float a[kOctet];
    for (int i = 0; i < kOctet; ++i)
        a[i] = decays ? mul_rn(scalars.weight_decay, w[i]) : 0.0f;
    bool any = decays;
    for (uint32_t j = 0; j < update.num_terms; ++j) {
        const DeviceTerm term = tables.row<DeviceTerm>(header.terms_at, update.first_term + j);
        const float k = mul_rn(term.coef, scalars.update_scale);
        if (k == 0.0f)
            continue;
        any = true;
        if (term.noise != held) {
            noise_octet(stream_of(term.tag, param, term.step), seed_of(header), octet, z);
            held = term.noise;
        }
        for (int i = 0; i < kOctet; ++i)
            a[i] = fma_rn(k, z[i], a[i]);
    }
    if (!any)
        return false;
    for (int i = 0; i < kOctet; ++i)
        w[i] = fma_rn(-scalars.lr, a[i], w[i]);
    PhiloxWords words{};
    if (D != DType::kFp32)
        words = philox_group(make_stream(Purpose::kRounding, param, update.step, 0), seed_of(header),
                             static_cast<uint64_t>(octet));
    OctetStorage<D>::update(w, words);
    return true;
}

// Where an octet lies: in the segment's buffers, and in its elements.
template <DType D>
DZO_HD OctetPlace<D> place_of(const DeviceSegment& segment, int64_t octet, int64_t& at) {
    const int64_t element = octet * kOctet;
    at = segment.byte_offset + (element - segment.begin) * OctetStorage<D>::kBytes;
    return OctetPlace<D>{static_cast<int>(segment.begin > element ? segment.begin - element : 0),
                         static_cast<int>(segment.end - element < kOctet ? segment.end - element : kOctet)};
}

// Any program.
struct AnyProgram {
    template <DType D>
    struct Run {
        const VisitHeader& header;
        const TableReader& tables;
        const DeviceSegment& segment;

        DZO_HD bool applies() const { return true; }

        DZO_HD void octet(int64_t octet) const {
            int64_t at;
            const OctetPlace<D> place = place_of<D>(segment, octet, at);
            float w[kOctet], z[kOctet], a[kOctet];
            uint32_t held = 0xFFFFFFFFu;
            place.load(header.weights + at, w);
            bool changed = false;
            for (uint32_t u = 0; u < header.num_updates; ++u)
                changed |= update_octet<D>(header, tables, u, segment.param, segment.group, octet, w, z, held);
            if (changed && header.write_back) {
                for (int i = 0; i < kOctet; ++i)
                    a[i] = w[i];
                place.template store<true>(header.weights + at, a);
            }
            for (uint32_t e = 0; e < header.num_emits; ++e) {
                const DeviceEmit emit = tables.row<DeviceEmit>(header.emits_at, e);
                const float scale = tables.row<float>(header.scales_at, e * header.num_groups + segment.group);
                for (int i = 0; i < kOctet; ++i)
                    a[i] = w[i];
                for (uint32_t j = 0; j < emit.num_terms; ++j) {
                    const DeviceTerm term = tables.row<DeviceTerm>(header.terms_at, emit.first_term + j);
                    const float k = mul_rn(term.coef, scale);
                    if (k == 0.0f)
                        continue;
                    if (term.noise != held) {
                        noise_octet(stream_of(term.tag, segment.param, term.step), seed_of(header), octet, z);
                        held = term.noise;
                    }
                    for (int i = 0; i < kOctet; ++i)
                        a[i] = fma_rn(k, z[i], a[i]);
                }
                place.template store<false>(tables.row<uint8_t*>(header.outs_at, e) + at, a);
            }
        }
    };
};

// The common programs, with their scalars in registers: kUpdates (0 or 1) updates of one term of normals, then kEmits (0, 1 or 2) emits
// of one term of normals, both of the same z. It applies to segments for which no coefficient or learning rate is 0.
template <int kUpdates, int kEmits>
struct SimpleProgram {
    template <DType D>
    struct Run {
        const VisitHeader& header;
        const DeviceSegment& segment;
        Stream update_noise{}, rounding{}, emit_noise{};
        float lr = 1, weight_decay = 0, update_coef = 1;
        float emit_coef[2] = {1, 1};
        uint8_t* outs[2] = {};

        DZO_HD Run(const VisitHeader& visit, const TableReader& tables, const DeviceSegment& where)
            : header(visit), segment(where) {
            if (kUpdates > 0) {
                const DeviceUpdate update = tables.row<DeviceUpdate>(visit.updates_at, 0);
                const UpdateGroup scalars = tables.row<UpdateGroup>(visit.groups_at, where.group);
                const DeviceTerm term = tables.row<DeviceTerm>(visit.terms_at, update.first_term);
                update_noise = stream_of(term.tag, where.param, term.step);
                rounding = make_stream(Purpose::kRounding, where.param, update.step, 0);
                lr = scalars.lr;
                weight_decay = scalars.weight_decay;
                update_coef = mul_rn(term.coef, scalars.update_scale);
            }
            for (int e = 0; e < kEmits; ++e) {
                const DeviceEmit emit = tables.row<DeviceEmit>(visit.emits_at, static_cast<uint32_t>(e));
                const DeviceTerm term = tables.row<DeviceTerm>(visit.terms_at, emit.first_term);
                const uint32_t row = static_cast<uint32_t>(e) * visit.num_groups + where.group;
                emit_noise = stream_of(term.tag, where.param, term.step);
                emit_coef[e] = mul_rn(term.coef, tables.row<float>(visit.scales_at, row));
                outs[e] = tables.row<uint8_t*>(visit.outs_at, static_cast<uint32_t>(e));
            }
        }

        DZO_HD bool applies() const {
            return lr != 0.0f && update_coef != 0.0f && emit_coef[0] != 0.0f && emit_coef[1] != 0.0f;
        }

        DZO_HD void octet(int64_t octet) const {
            int64_t at;
            const OctetPlace<D> place = place_of<D>(segment, octet, at);
            float w[kOctet], z[kOctet];
            place.load(header.weights + at, w);
            if (kUpdates > 0) {
                normals_octet(update_noise, seed_of(header), octet, z);
                const bool decays = weight_decay != 0.0f;
                for (int i = 0; i < kOctet; ++i) {
                    const float a = fma_rn(update_coef, z[i], decays ? mul_rn(weight_decay, w[i]) : 0.0f);
                    w[i] = fma_rn(-lr, a, w[i]);
                }
                PhiloxWords words{};
                if (D != DType::kFp32)
                    words = philox_group(rounding, seed_of(header), static_cast<uint64_t>(octet));
                OctetStorage<D>::update(w, words);
                if (header.write_back) {
                    for (int i = 0; i < kOctet; ++i)
                        z[i] = w[i];
                    place.template store<true>(header.weights + at, z);
                }
            }
            if (kEmits > 0)
                normals_octet(emit_noise, seed_of(header), octet, z);
            for (int e = 0; e < kEmits; ++e) {
                float x[kOctet];
                for (int i = 0; i < kOctet; ++i)
                    x[i] = fma_rn(emit_coef[e], z[i], w[i]);
                place.template store<false>(outs[e] + at, x);
            }
        }
    };
};

// The octets of thread `thread` in a tile: neighbours work on neighbouring octets.
template <class Run>
DZO_HD void run_octets(const VisitHeader& header, const DeviceSegment& segment, const Run& run, uint32_t tile,
                       uint32_t thread) {
    const int64_t first = segment.begin / kOctet, end = (segment.end + kOctet - 1) / kOctet;
    int64_t octet = first + static_cast<int64_t>(tile - segment.first_tile) * kThreads * header.octets_per_thread + thread;
    for (uint32_t i = 0; i < header.octets_per_thread && octet < end; ++i, octet += kThreads)
        run.octet(octet);
}

template <class Program, DType D>
DZO_HD void run_segment(const VisitHeader& header, const TableReader& tables, const DeviceSegment& segment,
                        uint32_t tile, uint32_t thread) {
    const typename Program::template Run<D> run{header, tables, segment};
    if (run.applies())
        run_octets(header, segment, run, tile, thread);
    else
        run_octets(header, segment, typename AnyProgram::template Run<D>{header, tables, segment}, tile, thread);
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
    if (segment.dtype == static_cast<uint32_t>(DType::kBf16))
        run_segment<Program, DType::kBf16>(header, tables, segment, tile, thread);
    else if (segment.dtype == static_cast<uint32_t>(DType::kFp32))
        run_segment<Program, DType::kFp32>(header, tables, segment, tile, thread);
    else
        run_segment<Program, DType::kFp16>(header, tables, segment, tile, thread);
}

// Octets of generated noise: rne(z) of elements [offset, offset + numel).
template <DType D>
DZO_HD void generate_octet(const Generate& request, int64_t octet) {
    const DeviceSegment whole{0, request.offset, request.offset + request.numel, 0, 0, 0, 0};
    int64_t at;
    const OctetPlace<D> place = place_of<D>(whole, octet, at);
    float z[kOctet];
    noise_octet(make_stream(static_cast<Purpose>(request.family), static_cast<uint32_t>(request.param),
                            static_cast<uint32_t>(request.step), static_cast<uint32_t>(request.probe)),
                request.seed, octet, z);
    place.template store<false>(static_cast<uint8_t*>(request.out) + at, z);
}

} // namespace distzo2
