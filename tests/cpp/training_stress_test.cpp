// A small model trained by ZO steps, its blocks streamed by the copy engine through few slots, against the same
// training with resident weights: every step's losses and the weights at the end must be the same bits. Every transfer
// is delayed at random and poisons its target with NaN first; the journal lags behind; some prefetches are in vain.
// From memory and from a file, for the CPU and for the simulated CUDA driver, whose compute is asynchronous too.
//
// DISTZO2_STRESS_STEPS is the number of steps of each training (1000; fewer under a sanitizer).
#include "testing.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>

#include "kernels/kernels.h"
#include "runtime/copy_engine.h"
#include "runtime/cpu_device.h"
#include "simulated_driver.h"
#include "watchdog.h"

using namespace distzo2;

// Allocations of more than 64 KiB by anything in this process; not counted under a sanitizer, whose allocator it is.
static std::atomic<int> num_large_allocations{0};

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
extern "C" void* __libc_memalign(size_t alignment, size_t num_bytes);
extern "C" void* aligned_alloc(size_t alignment, size_t num_bytes) {
    num_large_allocations += num_bytes > 65536;
    return __libc_memalign(alignment, num_bytes);
}
static void* counted(size_t num_bytes, size_t alignment) {
    num_large_allocations += num_bytes > 65536;
    void* memory = alignment == 0 ? std::malloc(num_bytes) : __libc_memalign(alignment, num_bytes);
    if (memory == nullptr)
        throw std::bad_alloc();
    return memory;
}
void* operator new(size_t num_bytes) { return counted(num_bytes, 0); }
void* operator new(size_t num_bytes, std::align_val_t alignment) {
    return counted(num_bytes, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
#endif

namespace {

constexpr int kBlocks = 7;
constexpr int kWidth = 24;
constexpr int kBatch = 3;
constexpr float kEps = 1e-3f;
constexpr uint64_t kSeed = 42;
constexpr int64_t kNormal = 0, kRademacher = 1;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kDefaultSteps = 150;
#else
constexpr int kDefaultSteps = 1000;
#endif

int num_steps() {
    const char* text = std::getenv("DISTZO2_STRESS_STEPS");
    return text != nullptr ? std::atoi(text) : kDefaultSteps;
}

// A matrix and a bias, packed as units are: fp32 in even blocks, bf16 in odd ones. Sizes differ from block to block,
// since odd ones end with elements that the forward does not read.
struct Layout {
    explicit Layout(int block) {
        const DType dtype = block % 2 == 0 ? DType::kFp32 : DType::kBf16;
        const int64_t bytes = dtype_bytes(dtype), unread = block % 2 == 0 ? 0 : 37 * block;
        const int64_t num_weights = kWidth * kWidth, num_biases = kWidth + unread;
        const auto bias_at = static_cast<int64_t>(align_up(static_cast<size_t>(num_weights * bytes), 256));
        const auto code = static_cast<int64_t>(dtype);
        segments[0] = {0, num_weights, code, 2 * block, 0, 0, kWidth, kWidth};
        segments[1] = {bias_at, num_biases, code, 2 * block + 1, 0, 0, 1, num_biases};
        num_bytes = static_cast<size_t>(bias_at + num_biases * bytes);
    }
    float value(const std::byte* memory, int segment, int64_t i) const {
        const std::byte* base = memory + segments[segment].byte_offset;
        if (segments[segment].dtype == static_cast<int64_t>(DType::kFp32)) {
            float x;
            std::memcpy(&x, base + 4 * i, 4);
            return x;
        }
        uint16_t half;
        std::memcpy(&half, base + 2 * i, 2);
        const uint32_t bits = uint32_t{half} << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    Segment segments[2];
    size_t num_bytes;
};

const std::vector<Layout>& layouts() {
    static const std::vector<Layout> all = [] {
        std::vector<Layout> made;
        for (int block = 0; block < kBlocks; ++block)
            made.emplace_back(block);
        return made;
    }();
    return all;
}

std::vector<size_t> block_bytes() {
    std::vector<size_t> sizes;
    for (const Layout& layout : layouts())
        sizes.push_back(layout.num_bytes);
    return sizes;
}

size_t max_block_bytes() {
    const std::vector<size_t> sizes = block_bytes();
    return *std::max_element(sizes.begin(), sizes.end());
}

// Rows of one visit: the updates that a block has missed, each of one term, and both signs of the step's probe.
struct Program {
    Program(const std::vector<float>& coefs_of_steps, int64_t version, int64_t step, bool emits_too) {
        for (int64_t t = version; t < step; ++t) {
            terms.push_back({t % 3 == 0 ? kRademacher : kNormal, t, 0, 0});
            coefs.push_back(coefs_of_steps[static_cast<size_t>(t)]);
            updates.push_back({t, static_cast<int64_t>(updates.size()), 1});
            groups.push_back({2e-3f, 1e-4f, 1.0f, 1.0f});
        }
        for (int sign = 0; emits_too && sign < 2; ++sign) {
            emits.push_back({static_cast<int64_t>(terms.size()), 1});
            terms.push_back({step % 3 == 0 ? kRademacher : kNormal, step, 0, 0});
            coefs.push_back(sign == 0 ? kEps : -kEps);
            scales.push_back(1.0f);
        }
    }
    void run(const Layout& layout, std::byte* weights, uint8_t* const* outs, bool write_back) const {
        Materialize visit;
        visit.weights = reinterpret_cast<uint8_t*>(weights);
        visit.num_bytes = static_cast<int64_t>(layout.num_bytes);
        visit.segments = layout.segments;
        visit.num_segments = 2;
        visit.seed = kSeed;
        visit.terms = terms.data();
        visit.coefs = coefs.data();
        visit.num_terms = static_cast<int64_t>(terms.size());
        visit.updates = updates.data();
        visit.update_groups = groups.data();
        visit.num_updates = static_cast<int64_t>(updates.size());
        visit.num_groups = 1;
        visit.emits = emits.data();
        visit.emit_scales = scales.data();
        visit.num_emits = static_cast<int64_t>(emits.size());
        visit.outs = outs;
        visit.write_back = write_back;
        materialize_cpu(visit);
    }
    std::vector<Term> terms;
    std::vector<float> coefs;
    std::vector<Update> updates;
    std::vector<UpdateGroup> groups;
    std::vector<Emit> emits;
    std::vector<float> scales;
};

// The lanes of one step, and where they have come to: kernels of one stream work on it in turn.
struct Lanes {
    Lanes() : scratch(2, std::vector<uint8_t>(max_block_bytes())) {}
    void begin() {
        for (auto& lane : hidden)
            for (int example = 0; example < kBatch; ++example)
                for (int i = 0; i < kWidth; ++i)
                    lane[example][i] = std::sin(0.7f * static_cast<float>(example * kWidth + i));
    }
    void forward(const Layout& layout, int sign) {
        const auto* weights = reinterpret_cast<const std::byte*>(scratch[static_cast<size_t>(sign)].data());
        for (auto& h : hidden[sign]) {
            float out[kWidth];
            for (int i = 0; i < kWidth; ++i) {
                float sum = layout.value(weights, 1, i);
                for (int j = 0; j < kWidth; ++j)
                    sum += layout.value(weights, 0, i * kWidth + j) * h[j];
                out[i] = std::tanh(sum);
            }
            std::memcpy(h, out, sizeof out);
        }
    }
    double loss(int sign) const {
        double sum = 0;
        for (int example = 0; example < kBatch; ++example)
            for (int i = 0; i < kWidth; ++i) {
                const double difference = hidden[sign][example][i] - 0.1 * (i % 5) + 0.2 * example;
                sum += difference * difference;
            }
        return sum / (kBatch * kWidth);
    }
    std::vector<std::vector<uint8_t>> scratch;
    float hidden[2][kBatch][kWidth] = {};
};

// One visit, as it is put on the compute stream.
struct Kernel {
    Lanes* lanes;
    int block;
    std::byte* weights;
    bool write_back;
    Program program;
    static void run(void* argument) {
        const std::unique_ptr<Kernel> kernel(static_cast<Kernel*>(argument));
        const Layout& layout = layouts()[static_cast<size_t>(kernel->block)];
        uint8_t* const outs[2] = {kernel->lanes->scratch[0].data(), kernel->lanes->scratch[1].data()};
        kernel->program.run(layout, kernel->weights, outs, kernel->write_back);
        for (int sign = 0; sign < 2; ++sign)
            kernel->lanes->forward(layout, sign);
    }
};

using Weights = std::vector<std::vector<std::byte>>;

Weights initial_weights() {
    Weights weights;
    for (int block = 0; block < kBlocks; ++block) {
        const Layout& layout = layouts()[static_cast<size_t>(block)];
        weights.emplace_back(layout.num_bytes);
        for (const Segment& segment : layout.segments)
            generate_cpu({.out = weights.back().data() + segment.byte_offset,
                          .dtype = static_cast<DType>(segment.dtype),
                          .numel = segment.numel,
                          .seed = 7,
                          .param = segment.param});
        for (const Segment& segment : layout.segments) { // smaller by an update towards zero
            const float scale = 0.75f;
            update_cpu({.weights = weights.back().data() + segment.byte_offset,
                        .dtype = static_cast<DType>(segment.dtype),
                        .numel = segment.numel},
                       scale, 0.0f, 1.0f);
        }
    }
    return weights;
}

struct Outcome {
    std::vector<double> losses; // two a step
    Weights weights;
};

float step_coefficient(const Lanes& lanes, Outcome& outcome) {
    const double plus = lanes.loss(0), minus = lanes.loss(1);
    outcome.losses.insert(outcome.losses.end(), {plus, minus});
    return static_cast<float>((plus - minus) / (2.0 * static_cast<double>(kEps)));
}

const Outcome& resident_training() {
    static const Outcome outcome = [] {
        Outcome result{{}, initial_weights()};
        Lanes lanes;
        std::vector<float> coefs;
        const int64_t steps = num_steps();
        for (int64_t step = 0; step <= steps; ++step) {
            lanes.begin();
            for (int block = 0; block < kBlocks; ++block)
                Kernel::run(new Kernel{&lanes, block, result.weights[static_cast<size_t>(block)].data(), true,
                                       Program(coefs, std::max<int64_t>(0, step - 1), step, true)});
            if (step < steps)
                coefs.push_back(step_coefficient(lanes, result));
        }
        return result;
    }();
    return outcome;
}

// Lets the engine know, some time after each step, that the journal is on disk up to it.
class Journal {
  public:
    Journal(CopyEngine& engine, int max_delay_us)
        : thread_([this, &engine, max_delay_us] {
              for (int64_t durable = 0; durable >= 0;) {
                  random_delay(4 * max_delay_us + 1);
                  const int64_t written = written_.load();
                  if (written != durable && written >= 0)
                      engine.set_durable(written);
                  durable = written;
              }
          }) {}
    ~Journal() {
        written_ = -1;
        thread_.join();
    }
    void append(int64_t version) { written_ = version; }

  private:
    std::atomic<int64_t> written_{0};
    std::thread thread_;
};

struct Setting {
    bool cuda;
    bool from_file;
    int num_slots;
    int write_every;
    int max_delay_us;
    ReadsBy reads_by = ReadsBy::kAuto;
};

std::shared_ptr<Device> delayed_cpu(int max_delay_us) {
    return std::make_shared<CpuDevice>([max_delay_us](Direction, void* to, const void*, size_t num_bytes) {
        random_delay(max_delay_us);
        std::memset(to, 0xFF, num_bytes);
        random_delay(max_delay_us);
    });
}

// What a step in the steady state makes none of.
struct Made {
    int large_allocations = num_large_allocations;
    size_t mappings = Arena::num_made();
    int events = 0, streams = 0, pins = 0;
    explicit Made(const simulated::Driver* driver) {
        if (driver != nullptr) {
            events = driver->num_events_created;
            streams = driver->num_streams_created;
            pins = driver->num_registrations;
        }
    }
    bool operator==(const Made&) const = default;
    friend std::ostream& operator<<(std::ostream& out, const Made& made) {
        return out << made.large_allocations << " large allocations, " << made.mappings << " mappings, " << made.events
                   << " events, " << made.streams << " streams, " << made.pins << " pins";
    }
};

Outcome streamed_training(const Setting& setting, const simulated::Driver* driver, EngineStats& stats) {
    const std::vector<size_t> sizes = block_bytes();
    const size_t slot_bytes = align_up(max_block_bytes(), kPageBytes);
    const Weights initial = initial_weights();
    ScratchDirectory scratch;
    const auto device = setting.cuda ? make_device("cuda:0") : delayed_cpu(setting.max_delay_us);
    auto pool =
        std::make_shared<HostPool>(sizes, device, HostPoolOptions{.pin = setting.cuda, .chunk_bytes = 2 * kPageBytes});
    std::shared_ptr<BlockFile> file;
    for (size_t block = 0; block < sizes.size(); ++block)
        std::memcpy(pool->address(block), initial[block].data(), sizes[block]);

    Slots cpu_slots(setting.num_slots, slot_bytes);
    std::vector<std::byte*> slots = cpu_slots.addresses;
    Stream compute = nullptr;
    if (setting.cuda) {
        const DeviceGuard guard(*device);
        for (std::byte*& slot : slots) {
            cu::DevicePtr address = 0;
            cu::driver().memory_allocate(&address, slot_bytes);
            slot = reinterpret_cast<std::byte*>(address);
        }
        cu::driver().stream_create(&compute, cu::kStreamNonBlocking, 0);
    }
    std::unique_ptr<CopyEngine> engine;
    if (setting.from_file) {
        file = std::make_shared<BlockFile>(scratch.file("blocks"), sizes, true, std::nullopt,
                                           BlockFileOptions{.part_bytes = kPageBytes});
        for (size_t block = 0; block < sizes.size(); ++block)
            file->write(block, initial[block].data(), sizes[block], 0);
        DiskOptions disk;
        disk.reads_by = setting.reads_by;
        disk.hook = [&setting](Direction direction, int, size_t, std::byte* in_slot, size_t num_bytes) {
            random_delay(setting.max_delay_us);
            if (direction == Direction::kUpload && !setting.cuda)
                std::memset(in_slot, 0xFF, num_bytes);
            random_delay(setting.max_delay_us);
        };
        std::shared_ptr<HostPool> staging;
        if (setting.cuda)
            staging = std::make_shared<HostPool>(std::vector<size_t>(6, kMiB), device,
                                                 HostPoolOptions{.pin = true, .chunk_bytes = 2 * kPageBytes});
        engine = std::make_unique<CopyEngine>(device, file, slots, slot_bytes, staging, disk);
    } else {
        engine = std::make_unique<CopyEngine>(device, *pool, slots, slot_bytes);
    }

    Outcome outcome;
    Lanes lanes;
    std::vector<float> coefs;
    std::vector<int64_t> versions(kBlocks, 0);
    std::minstd_rand random(static_cast<unsigned>(setting.num_slots * 100 + setting.write_every));
    std::optional<Made> made_before;
    coefs.reserve(static_cast<size_t>(num_steps()));
    outcome.losses.reserve(2 * static_cast<size_t>(num_steps()));
    {
        Journal journal(*engine, setting.max_delay_us);
        for (int64_t step = 0; step < num_steps(); ++step) {
            if (step == 10)
                made_before.emplace(driver);
            if (step == 110)
                CHECK_EQ(Made(driver), *made_before);
            lanes.begin();
            for (int block = 0; block < kBlocks; ++block) {
                const int slot = engine->acquire(block, compute);
                for (int ahead = 1; ahead < setting.num_slots; ++ahead)
                    engine->prefetch((block + ahead) % kBlocks); // across the step's end too
                if (random() % 16 == 0)
                    engine->prefetch(static_cast<int>(random() % kBlocks));
                int64_t& version = versions[static_cast<size_t>(block)];
                const bool write_back = version < step && (step + block) % setting.write_every == 0;
                const DeviceGuard guard(*device);
                device->call(compute, Kernel::run,
                             new Kernel{&lanes, block, slots[static_cast<size_t>(slot)], write_back,
                                        Program(coefs, version, step, true)});
                if (write_back)
                    version = step;
                engine->release(block, compute, write_back, version);
            }
            {
                const DeviceGuard guard(*device);
                device->synchronize_stream(compute);
            }
            coefs.push_back(step_coefficient(lanes, outcome));
            journal.append(step + 1);
        }
    }
    engine->set_durable(num_steps());
    engine->flush();
    for (size_t block = 0; block < sizes.size(); ++block) {
        outcome.weights.emplace_back(pool->address(block), pool->address(block) + sizes[block]);
        if (file)
            file->read(block, outcome.weights[block].data(), sizes[block], 0);
        Program(coefs, versions[block], num_steps(), false)
            .run(layouts()[block], outcome.weights[block].data(), nullptr, true);
    }
    stats = engine->stats();
    engine->close();
    if (setting.cuda) {
        const DeviceGuard guard(*device);
        cu::driver().stream_destroy(compute);
        for (std::byte* slot : slots)
            cu::driver().memory_free(reinterpret_cast<cu::DevicePtr>(slot));
    }
    return outcome;
}

void compare(const char* name, const Setting& setting) {
    Watchdog watchdog(name, 250);
    std::unique_ptr<simulated::Driver> driver;
    if (setting.cuda) {
        driver = std::make_unique<simulated::Driver>();
        driver->max_delay_us = setting.max_delay_us;
        driver->max_registration_bytes = 2 * kPageBytes;
    }
    EngineStats stats;
    const Outcome streamed = streamed_training(setting, driver.get(), stats);
    const Outcome& resident = resident_training();
    REQUIRE(streamed.losses.size() == resident.losses.size());
    for (size_t i = 0; i < streamed.losses.size(); ++i)
        REQUIRE(std::isfinite(streamed.losses[i]) && streamed.losses[i] == resident.losses[i], "step ", i / 2,
                ": loss ", streamed.losses[i], " and ", resident.losses[i]);
    for (size_t block = 0; block < streamed.weights.size(); ++block)
        CHECK(streamed.weights[block] == resident.weights[block], "block ", block);
    // The blocks do not fit into the slots, so nearly every visit moves one in; a write-back moves one out.
    const auto visits = static_cast<uint64_t>(num_steps()) * kBlocks;
    CHECK(stats.uploads >= visits / 2, stats.uploads, " uploads in ", visits, " visits");
    CHECK(stats.downloads + stats.recalled_downloads >= visits / (2 * static_cast<uint64_t>(setting.write_every)));
    if (driver) {
        CHECK_EQ(driver->misuse(), "");
        CHECK_EQ(driver->leaks(), simulated::Driver::kNoLeaks);
    }
}

} // namespace

TEST(the_training_learns) { // else equal bits would say little
    const std::vector<double>& losses = resident_training().losses;
    double first = 0, last = 0;
    const size_t part = losses.size() / 10;
    for (size_t i = 0; i < part; ++i) {
        first += losses[i];
        last += losses[losses.size() - 1 - i];
    }
    CHECK(last < 0.9 * first, "mean loss ", first / static_cast<double>(part), " -> ",
          last / static_cast<double>(part));
}

TEST(cpu_from_memory) { compare("cpu_from_memory", {false, false, 3, 1, 60}); }
TEST(cpu_from_file) { compare("cpu_from_file", {false, true, 3, 1, 60}); }
TEST(cpu_from_file_writing_in_turn) { compare("cpu_from_file_writing_in_turn", {false, true, 2, 3, 60}); }
TEST(cuda_from_memory) { compare("cuda_from_memory", {true, false, 3, 1, 60}); }
TEST(cuda_from_memory_two_slots) { compare("cuda_from_memory_two_slots", {true, false, 2, 2, 60}); }
TEST(cuda_from_file) { compare("cuda_from_file", {true, true, 3, 1, 60}); }
TEST(cpu_from_file_by_threads) { compare("cpu_from_file_by_threads", {false, true, 3, 1, 60, ReadsBy::kThreads}); }
TEST(cuda_from_file_by_threads) { compare("cuda_from_file_by_threads", {true, true, 2, 3, 60, ReadsBy::kThreads}); }
