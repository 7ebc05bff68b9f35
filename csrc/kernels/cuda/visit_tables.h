// A visit's tables as the CUDA kernels read them: one block of bytes, small enough for the kernel's parameters or else
// in a device workspace. Built on the host for each launch; plain data, so that it is also what the tests on a CPU run.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cuda/octet.h"

namespace distzo2 {

constexpr int kThreads = 256;
constexpr int kMaxOctetsPerThread = 8;
// Threads count octets in 32 bits, so that longer runs of elements are cut.
constexpr int64_t kMaxPartOctets = int64_t{1} << 30;

struct DeviceSegment {
    int64_t byte_offset;
    int64_t begin, end; // elements of the parameter
    uint32_t param;
    uint32_t group;
    uint32_t first_tile;
    uint32_t dtype;
};

// Where a segment is emitted, in a table of its own: what is emitted as it is stored needs none. Of codes also where
// their scales are, as in MixedPlace; of a dtype how far behind the weights w0 lies.
struct DeviceOut {
    int64_t offset, scales_at;
    uint32_t dtype, scale_shift;
};

struct DeviceTerm {
    uint32_t tag; // of its Draw: purpose, or if `low_rank` the family, and probe
    uint32_t step;
    float coef;
    uint32_t noise; // equal for terms whose z may be kept from the last use: the same number, the same z
};

struct DeviceUpdate {
    uint32_t step, first_term, num_terms;
};

struct DeviceEmit {
    uint32_t first_term, num_terms;
};

// Where each table begins, in bytes of the block, and the scalars of the launch. The round keys are here, so that they
// are operands from constant memory.
struct VisitHeader {
    uint8_t* weights;
    PhiloxKeys keys;
    uint32_t num_segments, num_tiles, octets_per_thread;
    uint32_t num_updates, num_groups, num_emits;
    uint32_t segments_at, terms_at, updates_at, groups_at, emits_at, scales_at, outs_at;
    uint32_t write_back;
    uint32_t aligned;     // all outs have the same address modulo 16, as the weights have unless `mixed`
    uint32_t places_at;   // of the DeviceOut of each segment if `mixed`
    uint32_t matrices_at; // of its DeviceMatrix if `low_rank`
};

// The shape of the program, when every update and emit has one term, all of one family: a kernel is compiled for each.
struct VisitShape {
    bool simple;
    Purpose family;
    int num_updates; // 0 or 1
    int num_emits;   // 0, 1 or 2 (the same z)
    bool mixed;      // a segment is emitted in another dtype, or at another place, than it is stored
    bool coded;      // a segment is of a stored format; then `mixed` too
    bool low_rank;   // a term has low-rank noise, and a segment columns for it; or `anchored`
    bool anchored;   // a group has an anchor: one program serves all of these
};

struct VisitTables {
    VisitHeader header;
    VisitShape shape;
    std::vector<uint8_t> bytes;
};

inline int64_t num_octets(int64_t first_element, int64_t numel) {
    return numel == 0 ? 0 : (first_element + numel + kOctet - 1) / kOctet - first_element / kOctet;
}

// Few enough that small tensors fill the device a few times over, and many enough to spread a thread's setup.
inline uint32_t octets_per_thread(int64_t octets, int num_sms) {
    return static_cast<uint32_t>(
        std::clamp<int64_t>(octets / (int64_t{kThreads} * num_sms * 16), 1, kMaxOctetsPerThread));
}

inline uint32_t num_tiles_of(int64_t first_element, int64_t numel, uint32_t octets_per_thread) {
    const int64_t tile = int64_t{kThreads} * octets_per_thread;
    return static_cast<uint32_t>((num_octets(first_element, numel) + tile - 1) / tile);
}

// body(begin, end) for parts of elements [first, first + numel), cut between octets.
template <class Body>
void for_each_part(int64_t first, int64_t numel, Body body) {
    for (int64_t begin = first, end = begin; begin < first + numel; begin = end) {
        end = std::min(first + numel, (begin / kOctet + kMaxPartOctets) * kOctet);
        body(begin, end);
    }
}

template <class Row>
uint32_t append_rows(std::vector<uint8_t>& bytes, const Row* rows, int64_t num) {
    const size_t at = (bytes.size() + 15) / 16 * 16, added = static_cast<size_t>(num) * sizeof(Row);
    bytes.resize(at + added);
    if (added > 0)
        std::memcpy(bytes.data() + at, rows, added);
    return static_cast<uint32_t>(at);
}

// Of a table [num][num_groups], with a group of zeros after the others if `frozen`: with a rate and a scale of zero
// nothing reaches a segment.
template <class Row>
uint32_t append_groups(std::vector<uint8_t>& bytes, const Row* rows, int64_t num, int64_t num_groups, bool frozen) {
    if (!frozen)
        return append_rows(bytes, rows, num * num_groups);
    std::vector<Row> wider;
    for (int64_t i = 0; i < num; ++i) {
        wider.insert(wider.end(), rows + i * num_groups, rows + (i + 1) * num_groups);
        wider.push_back(Row{});
    }
    return append_rows(bytes, wider.data(), static_cast<int64_t>(wider.size()));
}

inline bool same_tensor(const Term& a, const Term& b) {
    return a.family == b.family && a.step == b.step && a.probe == b.probe;
}

inline void build_tables(const Materialize& visit, int num_sms, VisitTables& tables) {
    VisitHeader& header = tables.header;
    std::vector<uint8_t>& bytes = tables.bytes;
    bytes.clear();
    int64_t octets = 0;
    const auto* const groups = visit.update_groups;
    const bool anchored = std::any_of(groups, groups + visit.num_updates * visit.num_groups,
                                      [](const UpdateGroup& group) { return group.anchor != 0.0f; });
    bool frozen = false, mixed = false, coded = false, low_rank = anchored;
    for (int64_t s = 0; s < visit.num_segments; ++s) {
        const Segment& segment = visit.segments[s];
        octets += num_octets(segment.element_offset, segment.numel);
        frozen = frozen || segment.group == kNoGroup;
        for (int64_t t = 0; t < visit.num_terms && segment.cols > 0 && !low_rank; ++t)
            low_rank = rank_of(visit.terms[t].family) > 0;
        coded = coded || segment.dtype > static_cast<int64_t>(DType::kFp16);
        mixed = mixed || segment.out_dtype != segment.dtype || segment.out_offset != segment.byte_offset;
    }
    mixed = coded || anchored || (mixed && visit.num_emits > 0);
    header.octets_per_thread = octets_per_thread(octets, num_sms);
    header.weights = visit.weights;
    header.keys = philox_keys(visit.seed);
    header.num_updates = static_cast<uint32_t>(visit.num_updates);
    header.num_groups = static_cast<uint32_t>(visit.num_groups + (frozen ? 1 : 0));
    header.num_emits = static_cast<uint32_t>(visit.num_emits);
    header.write_back = visit.write_back ? 1 : 0;
    header.aligned = 1;
    const uint8_t* const first = mixed && visit.num_emits > 0 ? visit.outs[0] : visit.weights;
    for (int64_t e = 0; e < visit.num_emits; ++e)
        if ((reinterpret_cast<uintptr_t>(visit.outs[e]) - reinterpret_cast<uintptr_t>(first)) % 16 != 0)
            header.aligned = 0;

    std::vector<DeviceSegment> segments;
    std::vector<DeviceOut> places;
    std::vector<DeviceMatrix> matrices;
    uint32_t tiles = 0;
    for (int64_t s = 0; s < visit.num_segments; ++s) {
        const Segment& segment = visit.segments[s];
        for_each_part(segment.element_offset, segment.numel, [&](int64_t begin, int64_t end) {
            const int64_t skipped = begin - segment.element_offset;
            const auto group = segment.group == kNoGroup ? visit.num_groups : segment.group;
            segments.push_back({segment.byte_offset + skipped * dtype_bytes(static_cast<DType>(segment.dtype)), begin,
                                end, static_cast<uint32_t>(segment.param), static_cast<uint32_t>(group), tiles,
                                static_cast<uint32_t>(segment.dtype)});
            if (low_rank)
                matrices.push_back({segment.rows, segment.cols});
            if (mixed) {
                const bool codes = is_code(static_cast<DType>(segment.dtype));
                const int shift = codes ? __builtin_ctzll(static_cast<uint64_t>(segment.scale_group / kOctet)) : 0;
                places.push_back({segment.out_offset + skipped * dtype_bytes(static_cast<DType>(segment.out_dtype)),
                                  segment.scale_offset -
                                      (codes ? 4 * (segment.element_offset / kOctet >> shift) : segment.byte_offset),
                                  static_cast<uint32_t>(segment.out_dtype), static_cast<uint32_t>(shift)});
            }
            tiles += num_tiles_of(begin, end - begin, header.octets_per_thread);
        });
    }
    header.num_tiles = tiles;
    header.num_segments = static_cast<uint32_t>(segments.size());
    header.segments_at = append_rows(bytes, segments.data(), static_cast<int64_t>(segments.size()));

    // Terms, updates and emits. A term of an emit that names the same tensor as the term before it keeps its number.
    std::vector<DeviceTerm> terms(static_cast<size_t>(visit.num_terms));
    for (int64_t t = 0; t < visit.num_terms; ++t) {
        const Term& term = visit.terms[t];
        const Purpose purpose = low_rank ? static_cast<Purpose>(term.family) : kind_of(term.family);
        const Draw draw = make_draw(purpose, 0, static_cast<uint32_t>(term.step), static_cast<uint32_t>(term.probe));
        const bool repeats = t > 0 && same_tensor(term, visit.terms[t - 1]);
        terms[t] = {draw.tag, draw.step, visit.coefs[t], repeats ? terms[t - 1].noise : static_cast<uint32_t>(t)};
    }
    header.terms_at = append_rows(bytes, terms.data(), visit.num_terms);
    std::vector<DeviceUpdate> updates;
    for (int64_t u = 0; u < visit.num_updates; ++u)
        updates.push_back({static_cast<uint32_t>(visit.updates[u].step),
                           static_cast<uint32_t>(visit.updates[u].first_term),
                           static_cast<uint32_t>(visit.updates[u].num_terms)});
    header.updates_at = append_rows(bytes, updates.data(), visit.num_updates);
    header.groups_at = append_groups(bytes, visit.update_groups, visit.num_updates, visit.num_groups, frozen);
    std::vector<DeviceEmit> emits;
    for (int64_t e = 0; e < visit.num_emits; ++e)
        emits.push_back(
            {static_cast<uint32_t>(visit.emits[e].first_term), static_cast<uint32_t>(visit.emits[e].num_terms)});
    header.emits_at = append_rows(bytes, emits.data(), visit.num_emits);
    header.scales_at = append_groups(bytes, visit.emit_scales, visit.num_emits, visit.num_groups, frozen);
    header.outs_at = append_rows(bytes, visit.outs, visit.num_emits);
    header.places_at = append_rows(bytes, places.data(), static_cast<int64_t>(places.size()));
    header.matrices_at = append_rows(bytes, matrices.data(), static_cast<int64_t>(matrices.size()));

    VisitShape& shape = tables.shape;
    shape.simple = visit.num_updates <= 1 && visit.num_emits <= 2 && visit.num_terms > 0 && !low_rank;
    shape.family = shape.simple ? kind_of(visit.terms[0].family) : Purpose::kNormal;
    const auto is_simple = [&](int64_t first, int64_t num) {
        return num == 1 && kind_of(visit.terms[first].family) == shape.family;
    };
    for (int64_t u = 0; u < visit.num_updates; ++u)
        shape.simple = shape.simple && is_simple(visit.updates[u].first_term, visit.updates[u].num_terms);
    for (int64_t e = 0; e < visit.num_emits; ++e)
        shape.simple = shape.simple && is_simple(visit.emits[e].first_term, visit.emits[e].num_terms) &&
                       same_tensor(visit.terms[visit.emits[e].first_term], visit.terms[visit.emits[0].first_term]);
    shape.num_updates = static_cast<int>(visit.num_updates);
    shape.num_emits = static_cast<int>(visit.num_emits);
    shape.mixed = mixed;
    shape.coded = coded;
    shape.low_rank = low_rank;
    shape.anchored = anchored;
}

} // namespace distzo2
