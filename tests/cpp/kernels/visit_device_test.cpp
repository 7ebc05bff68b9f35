// What the CUDA kernels do, thread by thread, on the CPU: tables, tiles, whole and partial octets, and every program,
// against the CPU kernels bit for bit. The instructions of a GPU are left to the tests that need one.
#include "testing.h"

#include <cstdint>

#include "kernels/cpu/level.h"
#include "kernels/cuda/lookup_device.h"
#include "kernels/cuda/visit_device.h"
#include "kernels/kernels.h"
#include "visit_cases.h"

using namespace distzo2;

namespace {

template <class Program>
void run_grid(const VisitTables& tables) {
    // Tables lie at a multiple of 16 bytes, as in kernel parameters and in a workspace.
    std::vector<Sixteen> aligned(tables.bytes.size() / 16 + 1);
    std::memcpy(static_cast<void*>(aligned.data()), tables.bytes.data(), tables.bytes.size());
    const TableReader reader{reinterpret_cast<const uint8_t*>(aligned.data())};
    for (uint32_t tile = 0; tile < tables.header.num_tiles; ++tile)
        for (uint32_t thread = 0; thread < kThreads; ++thread)
            run_thread<Program>(tables.header, reader, tile, thread);
}

const std::pair<DType, int64_t> kDTypesAndFamilies[] = {{DType::kFp32, 0}, {DType::kBf16, 0}, {DType::kFp16, 0},
                                                        {DType::kFp32, 1}, {DType::kBf16, 1}, {DType::kFp16, 1}};

void check_visit(const Visit& visit, int num_sms, const char* what) {
    Visit expected = visit;
    expected.run();
    const auto check = [&](auto program, bool applies) {
        if (!applies)
            return;
        Visit actual = visit;
        std::vector<uint8_t*> pointers;
        VisitTables tables;
        build_tables(actual.view(pointers), num_sms, tables);
        if (tables.shape.anchored)
            run_grid<Coded<AnchoredProgram>>(tables);
        else if (tables.shape.low_rank && tables.shape.mixed)
            run_grid<Coded<LowRankProgram>>(tables);
        else if (tables.shape.low_rank)
            run_grid<LowRankProgram>(tables);
        else if (tables.shape.coded)
            run_grid<Coded<decltype(program)>>(tables);
        else if (tables.shape.mixed)
            run_grid<Mixed<decltype(program)>>(tables);
        else
            run_grid<decltype(program)>(tables);
        check_equal(actual, expected, what);
    };
    Visit copy = visit;
    std::vector<uint8_t*> pointers;
    VisitTables tables;
    build_tables(copy.view(pointers), num_sms, tables);
    const VisitShape& shape = tables.shape;
    const auto is = [&](Purpose family, int num_updates, int num_emits) {
        return shape.simple && shape.family == family && shape.num_updates == num_updates &&
               shape.num_emits == num_emits;
    };
    check(AnyProgram{}, true);
    constexpr auto kNormal = Purpose::kNormal, kRademacher = Purpose::kRademacher;
    check(SimpleProgram<1, 2, kNormal>{}, is(kNormal, 1, 2));
    check(SimpleProgram<0, 2, kNormal>{}, is(kNormal, 0, 2));
    check(SimpleProgram<0, 1, kNormal>{}, is(kNormal, 0, 1));
    check(SimpleProgram<1, 0, kNormal>{}, is(kNormal, 1, 0));
    check(SimpleProgram<1, 2, kRademacher>{}, is(kRademacher, 1, 2));
    check(SimpleProgram<0, 2, kRademacher>{}, is(kRademacher, 0, 2));
    check(SimpleProgram<0, 1, kRademacher>{}, is(kRademacher, 0, 1));
    check(SimpleProgram<1, 0, kRademacher>{}, is(kRademacher, 1, 0));
}

// body(std::integral_constant<DType, dtype>).
template <class Body>
void with_dtype(DType dtype, Body body) {
    if (dtype == DType::kFp32)
        body(std::integral_constant<DType, DType::kFp32>{});
    else if (dtype == DType::kBf16)
        body(std::integral_constant<DType, DType::kBf16>{});
    else
        body(std::integral_constant<DType, DType::kFp16>{});
}

} // namespace

TEST(random_programs) {
    Random random{7};
    for (int round = 0; round < 60; ++round)
        check_visit(random_visit(random), 1 + static_cast<int>(random.below(3)), "random program");
}

TEST(simple_programs) {
    for (const auto& [dtype, family] : kDTypesAndFamilies)
        for (int num_updates : {0, 1})
            for (int num_emits : {0, 1, 2})
                for (const auto& [zero, out] : {std::pair{1.0f, 3}, {0.0f, 3}, {1.0f, 0}, {0.0f, 1}, {1.0f, 2}}) {
                    // zero: the second group's coefficients; out: the dtype of the emits, 3 where it is the weights'
                    Visit visit;
                    visit.num_groups = 2;
                    visit.seed = 0xABCDEF0123456789;
                    for (int64_t offset : {int64_t{0}, int64_t{3}, int64_t{1021}, (int64_t{1} << 34) - 100})
                        for (int64_t numel : {1, 7, 8, 9, 300, 5000})
                            visit.add_segment(dtype, numel, numel, offset, numel % 2, numel % 5);
                    visit.fill_random(12);
                    int64_t num = 0;
                    if (out < 3)
                        visit.emit_as([out](const Segment&) { return kDTypes[out]; }, [&num] { return ++num % 3 * 4; });
                    for (int u = 0; u < num_updates; ++u) {
                        visit.add_term(family, 4, 0, 0.5f);
                        visit.add_update(4, 1, {{1e-2f, 0.1f, 0.0f, 1.0f}, {1e-2f, 0.0f, 0.0f, zero}});
                    }
                    for (int e = 0; e < num_emits; ++e) {
                        visit.add_term(family, 5, 0, e == 0 ? 1e-3f : -1e-3f);
                        visit.add_emit(1, {1.0f, zero});
                    }
                    if (num_updates + num_emits == 0)
                        continue;
                    check_visit(visit, 1, "simple program");
                    visit.outs.clear();
                    visit.emits.clear();
                    visit.emit_scales.clear();
                    if (num_updates > 0)
                        check_visit(visit, 1000, "simple update");
                }
}

TEST(tiles_cover_large_segments) {
    for (int num_sms : {1, 2, 132}) {
        Visit visit;
        visit.add_segment(DType::kBf16, 5, 0, 1, 0);
        visit.add_segment(DType::kBf16, 100003, 1, 2, 0, 11);
        visit.add_segment(DType::kFp32, 40000, 2, 0, 0);
        visit.fill_random(13);
        visit.add_term(0, 1, 0, 1e-3f);
        visit.add_emit(1, {1.0f});
        check_visit(visit, num_sms, "large segments");
    }
}

// A parameter of as many elements as there may be, of which no byte is touched: parts whose octets are counted in 32
// bits, next to each other, and their last threads at their last octets.
TEST(octets_beyond_32_bits) {
    struct Recorder {
        mutable int64_t last = -1, end = 0;
        void octet(int64_t octet, const OctetPlace<DType::kBf16>& place) const {
            last = std::max(last, octet);
            end = std::max(end, place.at + 2 * place.last);
        }
    };
    Visit visit;
    visit.add_segment(DType::kBf16, 0, 0, 0, 0);
    visit.segments[0] = {22, kMaxElements - 11, static_cast<int64_t>(DType::kBf16), 7, 11, 0, 1, kMaxElements};
    std::vector<uint8_t*> pointers;
    VisitTables tables;
    build_tables(visit.view(pointers), 132, tables);
    const auto* parts = reinterpret_cast<const DeviceSegment*>(tables.bytes.data() + tables.header.segments_at);
    int64_t at = 22, begin = 11;
    for (uint32_t i = 0; i < tables.header.num_segments; ++i) {
        CHECK(parts[i].begin == begin && parts[i].byte_offset == at && parts[i].param == 7, "part ", i);
        CHECK(num_octets(begin, parts[i].end - begin) < (int64_t{1} << 32), "part ", i);
        at += 2 * (parts[i].end - begin);
        begin = parts[i].end;
        const uint32_t end_tile =
            i + 1 < tables.header.num_segments ? parts[i + 1].first_tile : tables.header.num_tiles;
        const Recorder recorder;
        for (uint32_t thread = 0; thread < kThreads; ++thread)
            run_octets<DType::kBf16>(parts[i], true, recorder, end_tile - parts[i].first_tile - 1,
                                     tables.header.octets_per_thread, thread);
        CHECK(recorder.last == (begin - 1) / kOctet && recorder.end == at, "part ", i, " ends at ", recorder.last);
    }
    CHECK_EQ(begin, kMaxElements);
}

// 2^20 normals, and a small visit, have work for each of the multiprocessors of an H200.
TEST(small_tensors_fill_the_device) {
    CHECK_EQ(num_tiles_of(0, 1 << 20, octets_per_thread((1 << 20) / kOctet, 132)), 512u);
    CHECK_EQ(octets_per_thread(int64_t{1} << 30, 132), 8u);
}

TEST(special_values_of_every_dtype) {
    special_values([](const Visit& visit, const char* what) { check_visit(visit, 1, what); });
}

TEST(noise) {
    generated_noise([](InPlace request, const std::vector<uint8_t>& expected) {
        for (const uint32_t per_thread : {1, 5}) {
            std::vector<uint8_t> out(expected.size());
            request.data = out.data();
            with_dtype(request.dtype, [&](auto dtype) {
                const uint32_t num_tiles = num_tiles_of(request.offset, request.numel, per_thread);
                for (uint32_t i = 0; i < num_tiles * kThreads; ++i)
                    generate_thread<dtype.value>(request, philox_keys(request.seed), per_thread, i / kThreads,
                                                 i % kThreads);
            });
            CHECK(out == expected, "offset ", request.offset);
        }
    });
}

TEST(low_rank_noise) {
    for (const auto& [dtype, family] : {std::pair{DType::kFp32, 16}, {DType::kBf16, 65}, {DType::kFp16, 64}})
        for (const int64_t cols : {3, 128, 1000}) {
            std::vector<uint8_t> expected(4 * 2000), out(expected.size());
            InPlace request{expected.data(), dtype, 2000, 7, family, 5, 6, 1, 77, 9, cols};
            generate_cpu(request);
            request.data = out.data();
            with_dtype(dtype, [&](auto type) {
                for (uint32_t i = 0; i < num_tiles_of(77, 2000, 1) * kThreads; ++i)
                    generate_thread<type.value>(request, philox_keys(7), 1, i / kThreads, i % kThreads,
                                                DeviceMatrix{9, cols});
            });
            CHECK(out == expected, "family ", family, ", ", cols, " columns");
        }
}

TEST(rows_of_the_perturbed_table) {
    lookups({1, 7, 8, 100, 1283}, [](const Lookup& request) {
        const PhiloxKeys keys = philox_keys(request.seed);
        with_dtype(request.dtype, [&](auto dtype) {
            for (int64_t i = 0; i < 32 * request.num_ids; ++i)
                if (request.out_dtype == request.dtype)
                    lookup_thread<dtype.value>(request, keys, i / 32, i % 32, 32);
                else
                    lookup_thread<dtype.value, true>(request, keys, i / 32, i % 32, 32);
        });
    });
}

TEST(lookup_of_a_row_that_is_not_there) {
    const std::vector<float> table(12, 1.0f);
    std::vector<float> out(8);
    const int64_t ids[] = {1, 3};
    Lookup request{table.data(), out.data(), ids, 2, 3, 4, DType::kFp32, 1.0f};
    CHECK_THROWS(lookup_cpu(request), "ids[1] is 3, and the table has 3 rows");
    for (int64_t row : {0, 1})
        lookup_thread<DType::kFp32>(request, philox_keys(0), row, 0, 1);
    for (int i = 0; i < 4; ++i)
        CHECK(out[i] == out[i] && out[4 + i] != out[4 + i]);
}

// Ids that another thread changes after they were checked are not followed out of the table.
TEST(lookup_checks_ids_where_they_are_used) {
    std::vector<const CpuLevel*> levels = {&kPortableLevel};
#if defined(DISTZO2_HAVE_AVX2)
    if (simd_available(SimdLevel::kAvx2))
        levels.push_back(&kAvx2Level);
#endif
#if defined(DISTZO2_HAVE_AVX512)
    if (simd_available(SimdLevel::kAvx512))
        levels.push_back(&kAvx512Level);
#endif
    const std::vector<uint32_t> table(12, 0); // +0 in every dtype
    const int64_t ids[] = {1, 3, 2, -1, int64_t{1} << 60};
    for (const CpuLevel* level : levels)
        for (DType dtype : kDTypes)
            for (float scale : {0.0f, 1.0f})
                for (int64_t family : {0, 1}) {
                    std::vector<uint32_t> out(20, 0);
                    const Lookup request{table.data(), out.data(), ids, 5, 3, 4, dtype, scale, 7, family};
                    level->lookup(request, 0, 20);
                    for (int64_t i = 0; i < 20; ++i) {
                        uint32_t bits = 0;
                        const int64_t bytes = dtype_bytes(dtype);
                        std::memcpy(&bits, reinterpret_cast<const uint8_t*>(out.data()) + i * bytes, bytes);
                        const uint32_t nan = dtype == DType::kFp32   ? kNanFp32
                                             : dtype == DType::kBf16 ? kNanBf16
                                                                     : kNanFp16;
                        CHECK((bits == nan) == (i / 4 == 1 || i / 4 >= 3), "element ", i, ": ", bits);
                    }
                }
}
