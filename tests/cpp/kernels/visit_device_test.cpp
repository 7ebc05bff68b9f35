// What the CUDA kernels do, thread by thread, on the CPU: tables, tiles, whole and partial octets, and every program,
// against the CPU kernels bit for bit. The instructions of a GPU are left to the tests that need one.
#include "testing.h"

#include <cstdint>

#include "kernels/cpu/level.h"
#include "kernels/cuda/lookup_device.h"
#include "kernels/cuda/visit_device.h"
#include "kernels/kernels.h"
#include "visit_fixture.h"

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
        if (tables.shape.coded)
            run_grid<Coded<decltype(program)>>(tables);
        else if (tables.shape.mixed)
            run_grid<Mixed<decltype(program)>>(tables);
        else
            run_grid<decltype(program)>(tables);
        CHECK(actual.weights == expected.weights, what, ": weights differ at byte ",
              first_difference(actual.weights, expected.weights));
        for (size_t e = 0; e < visit.outs.size(); ++e)
            CHECK(actual.outs[e] == expected.outs[e], what, ": out ", e, " differs at byte ",
                  first_difference(actual.outs[e], expected.outs[e]));
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
                        visit.add_update(4, 1, {{1e-2f, 0.1f, 1.0f, 1.0f}, {1e-2f, 0.0f, 1.0f, zero}});
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

TEST(special_values) {
    const uint32_t specials[] = {0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x7F7FFFFF, 0xFF7FFFFF,
                                 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x477FE000, 0x477FF000, 0x33800000};
    constexpr int64_t kNum = sizeof specials / sizeof specials[0];
    for (DType dtype : kDTypes) {
        Visit visit;
        visit.add_segment(dtype, 20 * kNum, 1, 0, 0);
        visit.fill([&](const Segment&, int64_t i) { return bits_float(specials[i % kNum]); });
        visit.add_term(0, 1, 0, 2.0f);
        visit.add_update(1, 1, {{1e-3f, 0.5f, 1.0f, 1.0f}});
        visit.add_term(0, 2, 0, 1e-3f);
        visit.add_emit(1, {1.0f});
        visit.add_term(0, 2, 0, -1e-3f);
        visit.add_emit(1, {1.0f});
        check_visit(visit, 1, "special values");
    }
}

TEST(generated_noise) {
    for (int64_t family : {0, 1})
        for (int64_t offset : {int64_t{0}, int64_t{5}, int64_t{120}, (int64_t{1} << 37) - 7}) {
            constexpr int64_t kNumel = 9999;
            std::vector<float> expected(kNumel), actual(kNumel);
            InPlace request{expected.data(), DType::kFp32, kNumel, 3, family, 1, 2, 3, offset};
            generate_cpu(request);
            request.data = actual.data();
            for (const uint32_t per_thread : {1, 5}) {
                std::fill(actual.begin(), actual.end(), 0.0f);
                for (uint32_t tile = 0; tile < num_tiles_of(offset, kNumel, per_thread); ++tile)
                    for (uint32_t thread = 0; thread < kThreads; ++thread)
                        generate_thread<DType::kFp32>(request, philox_keys(3), per_thread, tile, thread);
                CHECK(std::memcmp(actual.data(), expected.data(), kNumel * sizeof(float)) == 0, family, ' ', offset);
            }
        }
}

// The lookup of rows, on the CPU and as the CUDA kernel's threads, against rows of the table perturbed as a whole.
TEST(lookup) {
    for (const auto& [dtype, family] : kDTypesAndFamilies)
        for (int64_t cols : {int64_t{1}, int64_t{7}, int64_t{8}, int64_t{100}, int64_t{1283}})
            for (int64_t offset : {int64_t{0}, int64_t{3}, (int64_t{1} << 34) - 200})
                for (const auto& [scale, out_dtype] : {std::pair{0.0f, dtype},
                                                       {-1e-3f, dtype},
                                                       {-1e-3f, DType::kFp32},
                                                       {-1e-3f, DType::kBf16},
                                                       {0.0f, DType::kFp16}}) {
                    constexpr int64_t kRows = 9;
                    const auto row_bytes = static_cast<size_t>(cols * dtype_bytes(out_dtype));
                    Visit whole;
                    whole.seed = 77;
                    whole.add_segment(dtype, kRows * cols, 5, offset, 0);
                    whole.fill_random(3);
                    const std::vector<uint8_t> table = whole.weights;
                    whole.emit_as(out_dtype);
                    whole.add_term(family, 6, 2, scale);
                    whole.add_emit(1, {1.0f});
                    whole.run();
                    std::vector<int64_t> ids = {4, 0, 8, 8, 3, 4};
                    for (int64_t i = 0; i < 40; ++i) // more than one batch of parts of rows
                        ids.push_back(i * i % kRows);
                    std::vector<uint8_t> expected;
                    for (int64_t id : ids) {
                        const auto row = whole.outs[0].begin() + id * static_cast<int64_t>(row_bytes);
                        expected.insert(expected.end(), row, row + static_cast<int64_t>(row_bytes));
                    }
                    std::vector<uint8_t> got(expected.size());
                    Lookup request{table.data(),
                                   got.data(),
                                   ids.data(),
                                   static_cast<int64_t>(ids.size()),
                                   kRows,
                                   cols,
                                   dtype,
                                   scale,
                                   77,
                                   family,
                                   6,
                                   5,
                                   2,
                                   offset,
                                   out_dtype};
                    lookup_cpu(request);
                    CHECK(got == expected, "cpu, cols ", cols, " offset ", offset);

                    std::fill(got.begin(), got.end(), uint8_t{0});
                    for (size_t row = 0; row < ids.size(); ++row)
                        for (int64_t thread = 0; thread < 32; ++thread) {
                            const auto keys = philox_keys(request.seed);
                            const auto at = static_cast<int64_t>(row);
                            const auto look_up = [&, mixed = out_dtype != dtype](auto type) {
                                if (mixed)
                                    lookup_thread<type.value, true>(request, keys, at, thread, 32);
                                else
                                    lookup_thread<type.value>(request, keys, at, thread, 32);
                            };
                            if (dtype == DType::kFp32)
                                look_up(std::integral_constant<DType, DType::kFp32>{});
                            else if (dtype == DType::kBf16)
                                look_up(std::integral_constant<DType, DType::kBf16>{});
                            else
                                look_up(std::integral_constant<DType, DType::kFp16>{});
                        }
                    CHECK(got == expected, "device, cols ", cols, " offset ", offset);
                }
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
