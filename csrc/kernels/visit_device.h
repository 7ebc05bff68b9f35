// What one thread of the CUDA kernels does: an octet of elements through all updates and emits of a visit. Written as
// host and device functions over the per-element headers of csrc/noise, so that tests on a machine without a GPU run it
// too. No torch.
#pragma once

#include "kernels/visit_tables.h"
#include "noise/rademacher.h"
#include "noise/rounding.h"

#if defined(__CUDA_ARCH__)
#define DZO_UNROLL _Pragma("unroll")
#else
#define DZO_UNROLL
#endif

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

// The z of elements 8 * octet to 8 * octet + 7.
DZO_HD void normals_octet(const Stream& stream, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) {
    const uint64_t group = static_cast<uint64_t>(octet) * 2;
    const Normals4 low = normal_group(philox_group(stream, keys, group));
    const Normals4 high = normal_group(philox_group(stream, keys, group + 1));
    DZO_UNROLL
    for (int i = 0; i < 4; ++i) {
        z[i] = low.z[i];
        z[4 + i] = high.z[i];
    }
}

DZO_HD void signs_octet(const Stream& stream, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) {
    const uint64_t element = static_cast<uint64_t>(octet) * kOctet;
    const PhiloxWords words = philox_group(stream, keys, element / kSignsPerGroup);
    const uint32_t word = static_cast<uint32_t>(element % kSignsPerGroup) / 32;
    const uint32_t low = word & 1 ? words.w[1] : words.w[0], high = word & 1 ? words.w[3] : words.w[2];
    const uint32_t bits = (word & 2 ? high : low) >> (element % 32);
    DZO_UNROLL
    for (int i = 0; i < kOctet; ++i)
        z[i] = rademacher_from_lsb(bits >> i);
}

DZO_HD void noise_octet(const Stream& stream, const PhiloxKeys& keys, int64_t octet, float z[kOctet]) {
    if (stream.tag >> 24 == static_cast<uint32_t>(Purpose::kNormal))
        normals_octet(stream, keys, octet, z);
    else
        signs_octet(stream, keys, octet, z);
}

struct alignas(16) Sixteen {
    uint32_t word[4];
};

// In one access: copying the struct would be four.
DZO_HD Sixteen load_sixteen(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    return Sixteen{{v.x, v.y, v.z, v.w}};
#else
    return *reinterpret_cast<const Sixteen*>(p);
#endif
}

DZO_HD void store_sixteen(uint8_t* p, const Sixteen& s) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint4*>(p) = make_uint4(s.word[0], s.word[1], s.word[2], s.word[3]);
#else
    *reinterpret_cast<Sixteen*>(p) = s;
#endif
}

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
    DZO_UNROLL
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
    DZO_HD static Raw load(const uint8_t* p) { return Raw{{load_sixteen(p), load_sixteen(p + 16)}}; }
    DZO_HD static void store(uint8_t* p, const Raw& raw) {
        store_sixteen(p, raw.part[0]);
        store_sixteen(p + 16, raw.part[1]);
    }
    DZO_HD static float decode_one(const uint8_t* p) { return *reinterpret_cast<const float*>(p); }
    DZO_HD static void encode_one(uint8_t* p, float x) { *reinterpret_cast<float*>(p) = x; }
    DZO_HD static float nearest_one(float x) { return canonical_fp32(x); }
    DZO_HD static float update_one(float x, uint32_t) { return canonical_fp32(x); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            w[i] = bits_float(raw.part[i / 4].word[i % 4]);
    }
    DZO_HD static Raw exact(const float w[kOctet]) {
        Raw raw;
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            raw.part[i / 4].word[i % 4] = float_bits(w[i]);
        return raw;
    }
    DZO_HD static Raw nearest(float x[kOctet]) {
        if (any_nan(x))
            DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            x[i] = canonical_fp32(x[i]);
        return exact(x);
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords&) {
        if (any_nan(x))
            DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            x[i] = canonical_fp32(x[i]);
    }
};

template <>
struct OctetStorage<DType::kBf16> {
    static constexpr int kBytes = 2;
    using Raw = Sixteen;
    DZO_HD static Raw load(const uint8_t* p) { return load_sixteen(p); }
    DZO_HD static void store(uint8_t* p, const Raw& raw) { store_sixteen(p, raw); }
    DZO_HD static float decode_one(const uint8_t* p) { return bf16_to_float(*reinterpret_cast<const uint16_t*>(p)); }
    DZO_HD static void encode_one(uint8_t* p, float x) {
        *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(float_bits(x) >> 16);
    }
    DZO_HD static float nearest_one(float x) { return bf16_to_float(float_to_bf16(x)); }
    DZO_HD static float update_one(float x, uint32_t r) { return bf16_to_float(float_to_bf16_stochastic(x, r)); }
    DZO_HD static void decode(const Raw& raw, float w[kOctet]) {
        DZO_UNROLL
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = bits_float(raw.word[i] << 16);
            w[2 * i + 1] = bits_float(raw.word[i] & 0xFFFF0000u);
        }
    }
    DZO_HD static Raw exact(const float w[kOctet]) {
        Raw raw;
        DZO_UNROLL
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_bits(w[2 * i]) >> 16 | (float_bits(w[2 * i + 1]) & 0xFFFF0000u);
        return raw;
    }
    DZO_HD static Raw nearest(float x[kOctet]) {
        Raw raw;
#if defined(__CUDA_ARCH__)
        if (!any_nan(x)) {
            DZO_UNROLL
            for (int i = 0; i < 4; ++i)
                asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
            return raw;
        }
#endif
        DZO_UNROLL
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_to_bf16(x[2 * i]) | static_cast<uint32_t>(float_to_bf16(x[2 * i + 1])) << 16;
        return raw;
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords& words) {
        if (any_nan(x)) {
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                x[i] = update_one(x[i], rounding_bits(words, static_cast<uint32_t>(i)));
            return;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            x[i] = bits_float((float_bits(x[i]) + rounding_bits(words, static_cast<uint32_t>(i))) & 0xFFFF0000u);
    }
};

template <>
struct OctetStorage<DType::kFp16> {
    static constexpr int kBytes = 2;
    using Raw = Sixteen;
    DZO_HD static Raw load(const uint8_t* p) { return load_sixteen(p); }
    DZO_HD static void store(uint8_t* p, const Raw& raw) { store_sixteen(p, raw); }
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
        DZO_UNROLL
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
            DZO_UNROLL
            for (int i = 0; i < 4; ++i)
                asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(raw.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
            return raw;
        }
#endif
        DZO_UNROLL
        for (int i = 0; i < 4; ++i)
            raw.word[i] = float_to_fp16(x[2 * i]) | static_cast<uint32_t>(float_to_fp16(x[2 * i + 1])) << 16;
        return raw;
    }
    DZO_HD static void update(float x[kOctet], const PhiloxWords& words) {
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            x[i] = half_to_float(float_to_fp16_stochastic(x[i], rounding_bits(words, static_cast<uint32_t>(i))));
    }
};

// Elements first to last - 1 of an octet are the segment's. One that is whole and at a multiple of 16 bytes, which the
// buffers of a visit have in common, is moved in pieces of 16 bytes.
template <DType D>
struct OctetPlace {
    using Store = OctetStorage<D>;
    int64_t at; // of the octet's element 0, in bytes from the start of each buffer; before the segment's start for a
                // partial octet
    int first, last;
    bool whole;

    DZO_HD void load(const uint8_t* buffer, float w[kOctet]) const {
        const uint8_t* p = buffer + at;
        if (whole) {
            Store::decode(Store::load(p), w);
            return;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            w[i] = i >= first && i < last ? Store::decode_one(p + i * Store::kBytes) : 0.0f;
    }
    // Stores rne(x), or x itself where it is known to be a value of the type.
    template <bool kExact>
    DZO_HD void store(uint8_t* buffer, float x[kOctet]) const {
        uint8_t* p = buffer + at;
        if (whole) {
            Store::store(p, kExact ? Store::exact(x) : Store::nearest(x));
            return;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            if (i >= first && i < last)
                Store::encode_one(p + i * Store::kBytes, kExact ? x[i] : Store::nearest_one(x[i]));
    }
};

// One update of an octet's values w; true unless it is the identity. z is scratch, and `held` the number of the noise
// in it.
template <DType D>
DZO_HD bool update_octet(const VisitHeader& header, const TableReader& tables, uint32_t u, uint32_t param,
                         uint32_t group, int64_t octet, float w[kOctet], float z[kOctet], uint32_t& held) {
    const DeviceUpdate update = tables.row<DeviceUpdate>(header.updates_at, u);
    const UpdateGroup scalars = tables.row<UpdateGroup>(header.groups_at, u * header.num_groups + group);
    if (scalars.lr == 0.0f)
        return false;
    const bool decays = scalars.weight_decay != 0.0f;
    float a[kOctet];
    DZO_UNROLL
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
            noise_octet(stream_of(term.tag, param, term.step), header.keys, octet, z);
            held = term.noise;
        }
        DZO_UNROLL
        for (int i = 0; i < kOctet; ++i)
            a[i] = fma_rn(k, z[i], a[i]);
    }
    if (!any)
        return false;
    DZO_UNROLL
    for (int i = 0; i < kOctet; ++i)
        w[i] = fma_rn(-scalars.lr, a[i], w[i]);
    PhiloxWords words{};
    if (D != DType::kFp32)
        words = philox_group(make_stream(Purpose::kRounding, param, update.step, 0), header.keys,
                             static_cast<uint64_t>(octet));
    OctetStorage<D>::update(w, words);
    return true;
}

// Any program.
struct AnyProgram {
    template <DType D>
    struct Run {
        const VisitHeader& header;
        const TableReader& tables;
        const DeviceSegment& segment;

        DZO_HD void octet(int64_t octet, const OctetPlace<D>& place) const {
            float w[kOctet], z[kOctet], a[kOctet];
            uint32_t held = 0xFFFFFFFFu;
            place.load(header.weights, w);
            bool changed = false;
            for (uint32_t u = 0; u < header.num_updates; ++u)
                changed |= update_octet<D>(header, tables, u, segment.param, segment.group, octet, w, z, held);
            if (changed && header.write_back) {
                DZO_UNROLL
                for (int i = 0; i < kOctet; ++i)
                    a[i] = w[i];
                place.template store<true>(header.weights, a);
            }
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
                        noise_octet(stream_of(term.tag, segment.param, term.step), header.keys, octet, z);
                        held = term.noise;
                    }
                    DZO_UNROLL
                    for (int i = 0; i < kOctet; ++i)
                        a[i] = fma_rn(k, z[i], a[i]);
                }
                place.template store<false>(tables.row<uint8_t*>(header.outs_at, e), a);
            }
        }
    };
};

// The common programs, with their scalars in registers: kUpdates (0 or 1) updates of one term of normals, then kEmits
// (0, 1 or 2) emits of one term of normals, both of the same z.
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
            DZO_UNROLL
            for (int e = 0; e < kEmits; ++e) {
                const DeviceEmit emit = tables.row<DeviceEmit>(visit.emits_at, static_cast<uint32_t>(e));
                const DeviceTerm term = tables.row<DeviceTerm>(visit.terms_at, emit.first_term);
                const uint32_t row = static_cast<uint32_t>(e) * visit.num_groups + where.group;
                emit_noise = stream_of(term.tag, where.param, term.step);
                emit_coef[e] = mul_rn(term.coef, tables.row<float>(visit.scales_at, row));
                outs[e] = tables.row<uint8_t*>(visit.outs_at, static_cast<uint32_t>(e));
            }
        }

        DZO_HD void octet(int64_t octet, const OctetPlace<D>& place) const {
            float w[kOctet], z[kOctet];
            place.load(header.weights, w);
            if (kUpdates > 0 && lr != 0.0f && (update_coef != 0.0f || weight_decay != 0.0f)) {
                update(octet, w, z);
                if (header.write_back) {
                    DZO_UNROLL
                    for (int i = 0; i < kOctet; ++i)
                        z[i] = w[i];
                    place.template store<true>(header.weights, z);
                }
            }
            if (kEmits > 0 && (emit_coef[0] != 0.0f || emit_coef[kEmits - 1] != 0.0f))
                normals_octet(emit_noise, header.keys, octet, z);
            DZO_UNROLL
            for (int e = 0; e < kEmits; ++e) {
                float x[kOctet];
                DZO_UNROLL
                for (int i = 0; i < kOctet; ++i)
                    x[i] = emit_coef[e] != 0.0f ? fma_rn(emit_coef[e], z[i], w[i]) : w[i];
                place.template store<false>(outs[e], x);
            }
        }

        DZO_HD void update(int64_t octet, float w[kOctet], float z[kOctet]) const {
            float a[kOctet];
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                a[i] = weight_decay != 0.0f ? mul_rn(weight_decay, w[i]) : 0.0f;
            if (update_coef != 0.0f) {
                normals_octet(update_noise, header.keys, octet, z);
                DZO_UNROLL
                for (int i = 0; i < kOctet; ++i)
                    a[i] = fma_rn(update_coef, z[i], a[i]);
            }
            DZO_UNROLL
            for (int i = 0; i < kOctet; ++i)
                w[i] = fma_rn(-lr, a[i], w[i]);
            PhiloxWords words{};
            if (D != DType::kFp32)
                words = philox_group(rounding, header.keys, static_cast<uint64_t>(octet));
            OctetStorage<D>::update(w, words);
        }
    };
};

// The octets of thread `thread` in a tile: neighbours work on neighbouring octets. Counted from the segment's first
// octet, in 32 bits.
template <DType D, class Run>
DZO_HD void run_octets(const DeviceSegment& segment, bool aligned, const Run& run, uint32_t tile,
                       uint32_t octets_per_thread, uint32_t thread) {
    constexpr int kBytes = OctetStorage<D>::kBytes;
    const int64_t first = segment.begin / kOctet;
    const uint32_t num = static_cast<uint32_t>((segment.end + kOctet - 1) / kOctet - first);
    const int head = static_cast<int>(segment.begin % kOctet), tail = static_cast<int>((segment.end - 1) % kOctet) + 1;
    uint32_t index = tile * kThreads * octets_per_thread + thread;
    OctetPlace<D> place;
    place.at = segment.byte_offset + (static_cast<int64_t>(index) * kOctet - head) * kBytes;
    for (uint32_t i = 0; i < octets_per_thread && index < num; ++i) {
        place.first = index == 0 ? head : 0;
        place.last = index == num - 1 ? tail : kOctet;
        place.whole = aligned && place.first == 0 && place.last == kOctet;
        run.octet(first + index, place);
        index += kThreads;
        place.at += kThreads * kOctet * kBytes;
    }
}

// Whether the segment's octets begin at multiples of 16 bytes. Buffers are aligned alike (checked before the launch).
template <DType D>
DZO_HD bool is_aligned(const uint8_t* buffer, const DeviceSegment& segment) {
    const int64_t head = segment.begin % kOctet * OctetStorage<D>::kBytes;
    return (reinterpret_cast<uintptr_t>(buffer) + static_cast<uintptr_t>(segment.byte_offset - head)) % 16 == 0;
}

template <class Program, DType D>
DZO_HD void run_segment(const VisitHeader& header, const TableReader& tables, const DeviceSegment& segment,
                        uint32_t tile, uint32_t thread) {
    const typename Program::template Run<D> run{header, tables, segment};
    run_octets<D>(segment, header.aligned != 0 && is_aligned<D>(header.weights, segment), run,
                  tile - segment.first_tile, header.octets_per_thread, thread);
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

// Generated noise: rne(z) of elements [offset, offset + numel), as a visit that only writes.
template <DType D>
struct GenerateRun {
    const Generate& request;
    const PhiloxKeys& keys;

    DZO_HD void octet(int64_t octet, const OctetPlace<D>& place) const {
        float z[kOctet];
        noise_octet(make_stream(static_cast<Purpose>(request.family), static_cast<uint32_t>(request.param),
                                static_cast<uint32_t>(request.step), static_cast<uint32_t>(request.probe)),
                    keys, octet, z);
        place.template store<false>(static_cast<uint8_t*>(request.out), z);
    }
};

template <DType D>
DZO_HD void generate_thread(const Generate& request, const PhiloxKeys& keys, uint32_t tile, uint32_t thread) {
    const DeviceSegment whole{0, request.offset, request.offset + request.numel, 0, 0, 0, 0};
    const bool aligned = is_aligned<D>(static_cast<const uint8_t*>(request.out), whole);
    run_octets<D>(whole, aligned, GenerateRun<D>{request, keys}, tile, kMaxOctetsPerThread, thread);
}

} // namespace distzo2
